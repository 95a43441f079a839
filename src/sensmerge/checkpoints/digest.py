"""The hash of a file whose pieces are written in any order, and the journal of how far it has come."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from . import files

# Pieces that wait for an earlier one are kept in memory up to this much, and read again from the file beyond it.
WAITING_BYTES = 16 << 20
# So much of a file, once written, is sent on its way to the disk while the rest is computed.
WRITEBACK_BYTES = 32 << 20
# So much is read at a time.
READ_BYTES = 1 << 20


class Journal:
    """What is known of an unfinished merge's files: the hash of each file's first bytes, up to the end of a tensor.

    Lines are written as the hash passes the end of a tensor, and not synced: a line is a claim, which is proven when the file's
    bytes have that hash. So neither pages that never reached the disk nor a line that was cut off can do harm.
    """

    def __init__(self, path: Path) -> None:
        """Open the journal, or begin one. Raises OSError."""
        self.claims: dict[str, dict[int, str]] = {}
        found = path.read_bytes() if path.exists() else b""
        for line in found.decode(errors="replace").splitlines():
            match line.split("\t"):
                case [file, end, digest] if end.isdecimal() and end.isascii() and len(end) < 20:
                    self.claims.setdefault(file, {})[int(end)] = digest
        self._lock = threading.Lock()
        self._descriptor = files.open_log(path)
        # Whatever was cut off ends here.
        self._start = b"" if not found or found.endswith(b"\n") else b"\n"

    @property
    def holds_work(self) -> bool:
        """Is there anything worth going on with?"""
        return bool(self.claims)

    def note(self, file: str, end: int, digest: str) -> None:
        """The first `end` bytes of `file` have this hash. Raises OSError."""
        with self._lock:
            self.claims.setdefault(file, {})[end] = digest
            line, self._start = self._start + f"{file}\t{end}\t{digest}\n".encode(), b""
            files.append(self._descriptor, line)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def proven(descriptor: int, claims: Mapping[int, str]) -> tuple[int, xxhash.xxh3_128]:
    """The longest prefix of a file whose claimed XXH3-128 is right, and its hash, to go on with: (0, an empty hash) if none is.

    Cost: one read of the file up to the last claim. Raises OSError.
    """
    running, end = xxhash.xxh3_128(), 0
    best = running.copy()
    at = 0
    for claim in sorted(claims):
        for piece in _pieces(descriptor, at, claim):
            running.update(piece)
            at += len(piece)
        if at < claim:
            break
        if running.hexdigest() == claims[claim]:
            end, best = claim, running.copy()
    return end, best


def _pieces(descriptor: int, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes from `start` to `stop`, or to the end of the file."""
    block = memoryview(bytearray(min(READ_BYTES, max(stop - start, 0))))
    while start < stop:
        got = files.read_into(descriptor, block[: stop - start], start)
        if got == 0:
            return
        yield block[:got]
        start += got


class OrderedDigest:
    """XXH3-128 of a file whose pieces are written in any order: each is hashed when all before it were.

    `end` is how far the hash has come; it may begin with a hash of the first `end` bytes. At every place in `marks` the journal,
    if there is one, is told.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        end: int = 0,
        begun: xxhash.xxh3_128 | None = None,
        journal: tuple[Journal, str, frozenset[int]] | None = None,
    ) -> None:
        self._descriptor = descriptor
        self._hash = xxhash.xxh3_128() if begun is None else begun
        self._journal = journal
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[int, bytes | None]] = {}
        self._kept = 0
        self._hashing = False
        self._sent = end
        self.end = end

    def add(self, offset: int, view: memoryview) -> None:
        """Take note of a piece that was written; hash it, and what waited for it, if its turn has come. Raises OSError."""
        with self._lock:
            if self._hashing or offset != self.end:
                keep = self._kept + len(view) <= WAITING_BYTES
                self._kept += len(view) if keep else 0
                self._waiting[offset] = len(view), bytes(view) if keep else None
                return
            self._hashing = True
        self._take(view)
        while True:
            with self._lock:
                waiting = self._waiting.pop(self.end, None)
                if waiting is None:
                    self._hashing = False
                    return
                size, kept = waiting
                self._kept -= size if kept is not None else 0
            if kept is not None:
                self._take(memoryview(kept))
            else:
                self._read_again(size)

    def hexdigest(self) -> str:
        """The hash of everything up to `end`."""
        return self._hash.hexdigest()

    def _read_again(self, size: int) -> None:
        stop = self.end + size
        for piece in _pieces(self._descriptor, self.end, stop):
            self._take(piece)
        if self.end < stop:
            raise OSError(errno.EIO, "the file became shorter while it was written")

    def _take(self, view: memoryview) -> None:
        self._hash.update(view)
        self.end += len(view)
        if self._journal is not None and self.end in self._journal[2]:
            journal, file, _ = self._journal
            journal.note(file, self.end, self.hexdigest())
        if self.end - self._sent >= WRITEBACK_BYTES:
            files.start_writeback(self._descriptor, self._sent, self.end - self._sent)
            self._sent = self.end
