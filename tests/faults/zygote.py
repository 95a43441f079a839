"""A process that has everything imported and compiled, and forks the command line again and again: `python zygote.py RECIPE`.

It merges RECIPE once to be warm, says "ready", and then reads one JSON list of arguments a line; it answers with the number of
the process that runs them, and after one more line with its exit code, once it has ended. Its standard error goes to the file
that is named first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import sensmerge as sm
from sensmerge.cli import main


def run(log: str, arguments: list[str]) -> None:
    """The command line, in this process; never returns."""
    code = 1
    try:
        for descriptor, file in ((1, os.devnull), (2, log)):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), descriptor)
        sys.argv = ["sensmerge", *arguments]
        main()
    except SystemExit as done:
        code = int(done.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sm.merge(sm.load_recipe(sys.argv[1]), Path(folder) / "warm", jobs=1)
    print("ready", flush=True)
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(log, arguments)
        print(pid, flush=True)
        # Its number belongs to nobody else until it is asked after: whoever kills it kills no other.
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
