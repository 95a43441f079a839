"""One process for one output: a lock file that says who holds it, and is trusted only as far as that can be checked.

The file is locked with flock, which the system takes back when its process ends, however it ends; and it names its holder, since
flock says yes to everybody on some network file systems.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OutputError
from . import files
from .files import write_failure

# What this process holds: flock alone would not tell its threads apart everywhere.
_held: set[Path] = set()


@contextmanager
def locked(path: Path, out: Path) -> Iterator[None]:
    """Hold the lock file `path` of the output `out`; it is removed afterwards.

    Raises OutputError naming the holder if another process, here or on another machine, holds it; what a process left that died
    on this machine, in a container or not, is taken over. Not covered: two machines that take the lock in the same instant on a
    file system whose flock does nothing.
    """
    try:
        descriptor = _take(path, out)
    except OSError as error:
        raise write_failure(path, error) from error
    try:
        yield
    finally:
        _held.discard(path)
        try:
            # While it is held: nobody else's lock can be in this place.
            files.remove(path)
        except OSError:
            # A lock that stays names a process that will be dead.
            pass
        finally:
            os.close(descriptor)


def _take(path: Path, out: Path) -> int:
    while True:
        descriptor = files.open_output(path, new=False)
        try:
            mine = _is_mine(descriptor, path, out)
        except BaseException:
            os.close(descriptor)
            raise
        if mine:
            return descriptor
        # Its last holder removed it in this instant.
        os.close(descriptor)


def _is_mine(descriptor: int, path: Path, out: Path) -> bool:
    """Lock the open file and write this process into it; False if it is no longer the one at `path`."""
    flocked = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(path, out, _holder(descriptor), alive=True) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        flocked = False
    try:
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            return False
    except FileNotFoundError:
        return False
    holder = _holder(descriptor)
    if path in _held or (holder and not _is_dead(holder, flocked=flocked)):
        raise _busy(path, out, holder, alive=_is_here(holder))
    os.ftruncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    me = {**_identity(), "pid": os.getpid(), "start": _start_of(os.getpid()), "since": since}
    files.write_at(descriptor, memoryview(json.dumps(me).encode()), 0)
    _held.add(path)
    return True


def _holder(descriptor: int) -> dict[str, Any]:
    """Who the file names; nobody if it was cut off: who was killed so early had written nothing else."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) and type(found.get("pid")) is int else {}


def _identity() -> dict[str, str]:
    """This machine, and this start of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return {"host": socket.gethostname(), "boot": boot}


def _start_of(pid: int) -> str | None:
    """When a process began, in the system's own count: a later process with the same number began later. None if it is unknown."""
    try:
        # The name of the program, in parentheses, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_here(holder: dict[str, Any]) -> bool:
    return bool(holder.get("host") == socket.gethostname())


def _is_dead(holder: dict[str, Any], *, flocked: bool) -> bool:
    """Is it sure that the holder has ended? `flocked`: the system gave us the file."""
    boot = _identity()["boot"]
    if not _is_here(holder):
        # One start of one system under two names: containers. While that one lived, the system would not have given us the file.
        return flocked and bool(boot) and holder.get("boot") == boot
    if holder.get("boot") != boot:
        return True
    if holder["pid"] == os.getpid():
        # Not held by this process, which its own list tells.
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    start = _start_of(holder["pid"])
    return start is not None and holder.get("start") not in (None, start)


def _busy(path: Path, out: Path, holder: dict[str, Any], *, alive: bool) -> OutputError:
    pid, since = holder.get("pid"), holder.get("since", "now")
    who = f"process {pid} on {holder.get('host')}, since {since}" if holder else "another process, since a moment ago"
    return OutputError(
        "another merge writes this output",
        where=str(out),
        why=f"it is held by {who}",
        fix="wait until it has ended, or choose another output folder"
        if alive
        else f"if that process has ended (it cannot be seen from this machine): rm {shlex.quote(str(path))}",
    )
