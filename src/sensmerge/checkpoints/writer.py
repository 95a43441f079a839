"""Writing safetensors shards: the header is known before the first byte, the file is preallocated, and hashed as it is written."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import xxhash

from ..errors import ResourceError
from ..records import TensorSpec
from .formats import ITEM_SIZES, Raw

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One output file: its name and its tensors, in the order of their data."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(spec.elements * ITEM_SIZES[spec.dtype] for spec in self.tensors)

    def header(self) -> bytes:
        """The 8 length bytes and the JSON header, padded with blanks so that the data is 8-byte aligned."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in self.tensors:
            end = offset + spec.elements * ITEM_SIZES[spec.dtype]
            entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def places(self, data_start: int) -> dict[str, tuple[int, int, int]]:
        """For each tensor the offset of its first byte, its item size and its bytes; `data_start` is the header's length."""
        found, offset = {}, data_start
        for spec in self.tensors:
            size = spec.elements * ITEM_SIZES[spec.dtype]
            found[spec.name] = offset, ITEM_SIZES[spec.dtype], size
            offset += size
        return found


def split_into_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> tuple[Shard, ...]:
    """Shards of at most `shard_bytes` (a larger tensor has one to itself), tensors kept in the order given.

    Within a shard wider dtypes come first, so that every tensor is aligned to its own item size.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        size = spec.elements * ITEM_SIZES[spec.dtype]
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += size
    names = (
        [SINGLE_FILE]
        if len(groups) == 1
        else [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    )
    return tuple(
        Shard(name, tuple(sorted(group, key=lambda spec: -ITEM_SIZES[spec.dtype])))
        for name, group in zip(names, groups, strict=True)
    )


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index that maps tensors to shards; nothing for a single file."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": dict(sorted((spec.name, shard.file) for shard in shards for spec in shard.tensors)),
    }
    try:
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise write_failure(folder / INDEX_FILE, error) from error


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


class ShardWriter:
    """Writes one shard's tensors in pieces, in any order and from any number of threads, at places known beforehand.

    The whole file is allocated first, so that a full disk is found before any work. `close` makes it durable and returns its
    XXH3-128 (hex), which is formed while the pieces come in. Raises ResourceError when the disk is full and ValueError if the
    pieces do not cover the tensors promised in the header.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._path = folder / shard.file
        header = shard.header()
        self._size = len(header) + shard.data_bytes
        self._places = shard.places(len(header))
        try:
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except OSError as error:
            raise write_failure(self._path, error) from error
        self._digest = _OrderedDigest(self._descriptor)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, self._size)
            self._write(header, 0)
        except OSError as error:
            os.close(self._descriptor)
            raise write_failure(self._path, error) from error

    def write(self, name: str, start: int, piece: Raw) -> None:
        """Write raw elements of tensor `name` (in the output dtype) from its element `start` on."""
        place, item, size = self._places[name]
        data = piece.view(np.uint8)
        if start * item + data.nbytes > size:
            raise ValueError(f"{self._path}: more bytes than '{name}' has")
        try:
            self._write(data.data, place + start * item)
        except OSError as error:
            raise write_failure(self._path, error) from error

    def close(self) -> str:
        """Flush to the disk and return the file's hash."""
        if self._digest.end != self._size:
            raise ValueError(f"{self._path}: {self._size - self._digest.end} bytes of tensor data were not written")
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_failure(self._path, error) from error
        self.abandon()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close without a promise; the file is for deletion. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], offset + done)
        if len(view):
            self._digest.add(offset, view)


# Pieces that wait for an earlier one are kept in memory up to this much, and read again from the file beyond it.
WAITING_BYTES = 16 << 20
# So much of a file, once written, is sent on its way to the disk while the rest is computed.
WRITEBACK_BYTES = 32 << 20


class _OrderedDigest:
    """XXH3-128 of a file whose pieces are written in any order: each is hashed when all before it were."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = xxhash.xxh3_128()
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[int, bytes | None]] = {}
        self._kept = 0
        self._hashing = False
        self._sent = 0
        self.end = 0

    def add(self, offset: int, view: memoryview) -> None:
        """Take note of a piece that was written; hash it, and what waited for it, if its turn has come."""
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
        while self.end < stop:
            piece = os.pread(self._descriptor, min(1 << 20, stop - self.end), self.end)
            if not piece:
                raise OSError(errno.EIO, "the file became shorter while it was written")
            self._take(memoryview(piece))

    def _take(self, view: memoryview) -> None:
        self._hash.update(view)
        self.end += len(view)
        if self.end - self._sent >= WRITEBACK_BYTES:
            start_writeback(self._descriptor, self._sent, self.end - self._sent)
            self._sent = self.end


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range, where the C library has it."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Have the kernel begin to write these bytes to the disk, so that the last fsync has less to wait for. A hint: never fails."""
    sync = _sync_file_range()
    if sync is not None:
        write_only = 2  # SYNC_FILE_RANGE_WRITE: start, wait for nothing
        sync(descriptor, offset, size, write_only)


def output_config(config: Mapping[str, object], dtype: str | None) -> dict[str, object]:
    """config.json for the merged model: the donor's, with the dtype the weights were written in (a transformers name)."""
    merged = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    if dtype is not None:
        present = [key for key in ("dtype", "torch_dtype") if key in merged]
        merged.update(dict.fromkeys(present or ["dtype"], dtype))
    return merged
