"""The file-system seam: the one place where weights are read, and where output is created, written, made durable and put in place.

Every call passes a checkpoint first, where a test can make the n-th call of a merge fail, or stop everything there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..errors import ResourceError

Place = Path | int
Passing = Callable[[str, Place], None]

_passing: Passing | None = None


def watch(passing: Passing | None) -> None:
    """Have `passing(call, place)` called before every call to the file system, `place` a path or a descriptor; None ends it.

    What it raises, an OSError of its choice or anything else, is what the call raises.
    """
    global _passing
    _passing = passing


def _pass(call: str, place: Place) -> None:
    if _passing is not None:
        _passing(call, place)


def write_failure(path: Path, error: OSError) -> ResourceError:
    """The error for an output that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, fix = (
            "the disk is full",
            "free some space or choose another output folder, then run the same command again",
        )
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        what, fix = "too many output files are open at once", "write fewer, larger files: --shard-size 5GB"
    else:
        what = "the output could not be written"
        fix = "check the folder's permissions and the disk, then run the same command again"
    return ResourceError(what, where=str(path), why=str(error), fix=fix)


# Descriptors


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """`preadv`: the number of bytes read into `view`, 0 at the end of the file."""
    _pass("read", descriptor)
    return os.preadv(descriptor, [view], offset)


def open_output(path: Path, *, new: bool = True) -> int:
    """A descriptor to read and write `path`, mode 0644 less the umask, never through a link; `new`: it must not exist yet."""
    _pass("open", path)
    return os.open(path, os.O_CREAT | (os.O_EXCL if new else 0) | os.O_RDWR | os.O_NOFOLLOW, 0o644)


def open_log(path: Path) -> int:
    """A descriptor that appends to `path`, never through a link."""
    _pass("open", path)
    return os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW, 0o644)


def allocate(descriptor: int, size: int) -> None:
    """Give the file exactly `size` bytes of room on the disk, where the system can; what it holds already stays."""
    _pass("allocate", descriptor)
    if os.fstat(descriptor).st_size > size:
        os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


def write_at(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`."""
    done = 0
    while done < len(view):
        _pass("write", descriptor)
        done += os.pwrite(descriptor, view[done:], offset + done)


def append(descriptor: int, data: bytes) -> None:
    """Write all of `data` where the descriptor stands."""
    done = 0
    while done < len(data):
        _pass("write", descriptor)
        done += os.write(descriptor, data[done:])


def sync(descriptor: int) -> None:
    """Return when the file's bytes are on the disk."""
    _pass("sync", descriptor)
    os.fsync(descriptor)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range, where the C library has it."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Have the kernel begin to write these bytes to the disk, so that the last fsync has less to wait for. A hint: never fails."""
    function = _sync_file_range()
    if function is not None:
        write_only = 2  # SYNC_FILE_RANGE_WRITE: start, wait for nothing
        function(descriptor, offset, size, write_only)


# Paths


def make_folder(path: Path) -> None:
    """A new folder."""
    _pass("mkdir", path)
    path.mkdir()


def write_text(path: Path, text: str) -> None:
    """Write a small file and make it durable, so that a reader sees the old text or the whole new one."""
    partial = path.with_name(f"{path.name}.partial")
    descriptor = open_output(partial, new=False)
    try:
        os.ftruncate(descriptor, 0)
        append(descriptor, text.encode())
        sync(descriptor)
    finally:
        os.close(descriptor)
    rename(partial, path)


def sync_path(path: Path) -> None:
    """Return when the file's bytes, or the folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder; they keep its names in order by themselves or not at all.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file below `folder`, every folder there and itself durable."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_path(Path(parent, name))
        sync_path(Path(parent))


def rename(source: Path, target: Path) -> None:
    """Rename; a file or an empty folder at `target` is replaced."""
    _pass("rename", target)
    source.rename(target)


@cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """Linux's renameat2, where the C library has it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux's RENAME_EXCHANGE); False where the system or the file system cannot."""
    function = _renameat2()
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        _pass("exchange", other)
        if function is None:
            return False
        if function(here, os.fsencode(one), here, os.fsencode(other), swap) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(other))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            return False
        raise
    return True


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    _pass("remove", path)
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with all it holds; nothing if it is gone already."""
    _pass("remove", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
