"""Real processes: stopped by signals, two at once, locks that the dead and the far away left, disks that are full."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensmerge.errors import OutputError
from tests.conftest import QUIET, Run
from tests.faults.injector import judging
from tests.faults.merges import Case, large, tiny, tree
from tests.faults.test_resuming import Acting

SENSMERGE = [sys.executable, "-m", "sensmerge"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return large(tmp_path_factory.mktemp("processes"))


def begin(case: Case) -> subprocess.Popen[str]:
    """A merge in a process of its own that has finished some tensor."""
    command = [*SENSMERGE, "merge", str(case.recipe), str(case.out), "--jobs", "1"]
    process = subprocess.Popen(
        command, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = case.work / "journal"
    for _ in range(6000):
        if (journal.exists() and journal.stat().st_size) or process.poll() is not None:
            break
        time.sleep(0.005)
    return process


def pasted(fix: str) -> list[str]:
    """The command at the end of a fix, as this machine's Python runs it."""
    words = shlex.split(fix[fix.index("sensmerge merge") :])
    return [*SENSMERGE, *words[1:]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_the_command_that_is_told_goes_on(case: Case, number: signal.Signals, code: int) -> None:
    case.clear(old=False)
    process = begin(case)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert not case.out.exists()
    assert [path.name for path in case.out.parent.iterdir()] == [case.work.name]
    assert "Traceback" not in told
    fix = told.rstrip().split("\n")[-1]
    done = subprocess.run(pasted(fix), env={**os.environ, **QUIET}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on with an interrupted merge" in done.stderr
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]


def test_the_second_process_is_told_who_holds_the_output(case: Case, sensmerge: Run) -> None:
    case.clear(old=False)
    first = begin(case)
    first.send_signal(signal.SIGSTOP)
    try:
        second = sensmerge("merge", case.recipe, case.out)
        assert second.returncode == 7, second.stderr
        assert f"process {first.pid} on {socket.gethostname()}, since 2" in second.stderr
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    first.communicate()
    assert sensmerge("merge", case.recipe, case.out).returncode == 0
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]


def holder(**changes: Any) -> dict[str, Any]:
    """What a lock says of a process here that is gone."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    boot = Path("/proc/sys/kernel/random/boot_id")
    here = {"host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else ""}
    return {**here, "pid": int(gone.stdout), "start": "1", "since": "2001-02-03", **changes}


def started(pid: int) -> str:
    """When a process began, as a lock tells it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


LEFT: dict[str, Callable[[], str]] = {
    "by the dead": lambda: json.dumps(holder()),
    "by the dead, in many words": lambda: json.dumps(holder(since="2001" * 60)),
    "before the machine was started": lambda: json.dumps(
        holder(pid=os.getppid(), start=started(os.getppid()), boot="earlier")
    ),
    "by one whose number another has now": lambda: json.dumps(holder(pid=1)),
    # Every container has a name of its own, and numbers of its own: 1 lives in each.
    "by a container that was killed": lambda: json.dumps(holder(host="4f9a2c", pid=1)),
    "empty": lambda: "",
    "cut off": lambda: json.dumps(holder())[:30],
    "no lock": lambda: "[1, 2]",
}


@pytest.mark.skipif(sys.platform != "linux", reason="when a process began is read from /proc")
@pytest.mark.parametrize("left", LEFT)
def test_a_lock_that_nobody_holds_is_taken_over(tmp_path: Path, left: str) -> None:
    case = tiny(tmp_path, old=False)
    lock = case.work.with_name(f"{case.work.name}.lock")
    lock.write_text(LEFT[left]())
    named: list[int] = []
    with judging(Acting("allocate", 1, lambda: named.append(json.loads(lock.read_text())["pid"]))):
        case.merge(overwrite=False)
    assert named == [os.getpid()]
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]


def test_a_lock_of_another_machine_is_refused_with_the_command_that_removes_it(tmp_path: Path) -> None:
    case = tiny(tmp_path, old=False)
    lock = case.work.with_name(f"{case.work.name}.lock")
    lock.write_text(json.dumps(holder(host="elsewhere", boot="its own")))
    with pytest.raises(OutputError, match="on elsewhere, since 2001-02-03") as caught:
        case.merge(overwrite=False)
    assert not case.out.exists()
    command = re.search(r"rm .*$", caught.value.fix)
    assert command is not None
    subprocess.run(command[0], shell=True, check=True)
    case.merge(overwrite=False)
    assert case.out.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="when a process began is read from /proc")
def test_a_file_system_whose_flock_says_yes_to_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the name of a living process in the file counts."""
    case = tiny(tmp_path, old=False)
    lock = case.work.with_name(f"{case.work.name}.lock")
    with subprocess.Popen(["sleep", "60"]) as living:
        lock.write_text(json.dumps(holder(pid=living.pid, start=started(living.pid))))
        monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
        with pytest.raises(OutputError, match=f"process {living.pid} on"):
            case.merge(overwrite=False)
        living.kill()
    case.merge(overwrite=False)
    assert case.out.exists()


def test_two_merges_of_one_process_where_flock_says_yes_to_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny(tmp_path)
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    told: list[str] = []

    def second() -> None:
        with pytest.raises(OutputError) as caught:
            case.merge()
        told.append(caught.value.what)

    with judging(Acting("allocate", 2, second)):
        case.merge()
    assert told == ["another merge writes this output"]
    assert (case.out / "config.json").exists()


def test_a_lock_that_its_holder_removes_in_this_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking another process may take the place: what was opened is then nobody's lock."""
    case = tiny(tmp_path, old=False)
    lock = case.work.with_name(f"{case.work.name}.lock")
    flock, others = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not others:
            lock.unlink()
            others.append(os.open(lock, os.O_CREAT | os.O_RDWR))
            flock(others[0], how)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="another merge writes this output"):
        case.merge(overwrite=False)
    os.close(others[0])
    case.merge(overwrite=False)
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]


FULL = r"""
set -u
disk=$1; size=$2; more=$3; shift 3
mount -t tmpfs -o size=$size tmpfs "$disk" || exit 77
"$@"; echo "rc $?"; ls -A "$disk"
mount -o remount,size=$more "$disk" || exit 77
"$@"; echo "rc $?"; ls -A "$disk"; cp -r "$disk/out" "$disk.copy"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small tmpfs in a private namespace")
@pytest.mark.parametrize("kept", [False, True], ids=["no room for the weights", "no room for the rest"])
def test_a_disk_that_is_really_full(tmp_path: Path, kept: bool) -> None:
    """Before any work: nothing is left, and how much is missing is told. Later: kept. With more room the command ends well."""
    case = tiny(tmp_path / "case", old=False)
    case.merge(overwrite=False)
    disk = tmp_path / "disk"
    disk.mkdir()
    # A page for each file that has bytes, folders cost none: the shards, the state, the lock and the journal, and then no more.
    size = "24k" if kept else "12k"
    command = [*SENSMERGE, "merge", str(case.recipe), str(disk / "out"), "--shard-size", "220"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL, "sh", str(disk), size, "10m", *command],
        env={**os.environ, **QUIET}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no private mount here: {done.stderr.strip()}")
    assert "error: the disk is full" in done.stderr, done.stderr
    codes = re.findall(r"^rc (\d+)$", done.stdout, re.MULTILINE)
    assert codes == ["6", "0"], done.stderr
    between = done.stdout.split("rc 6")[1].split("rc 0")[0]
    assert (".out.sensmerge" in between) is kept, done.stdout
    assert ("bytes are needed for the weights" in done.stderr) is not kept, done.stderr
    assert ("goes on from here: sensmerge merge" in done.stderr) is kept, done.stderr
    one, other = tree(tmp_path / "disk.copy"), tree(case.out)
    assert {n: b for n, b in one.items() if "merge.json" not in n} == {
        n: b for n, b in other.items() if "merge.json" not in n
    }


LIMITED = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000)); "
LIMITED += "sys.argv = ['sensmerge', *sys.argv[1:]]; runpy.run_module('sensmerge', run_name='__main__')"


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE and posix_fallocate")
def test_a_file_that_may_not_grow(case: Case) -> None:
    case.clear(old=False)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "merge", str(case.recipe), str(case.out)],
        env={**os.environ, **QUIET}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "File too large" in done.stderr
    assert list(case.out.parent.iterdir()) == []
