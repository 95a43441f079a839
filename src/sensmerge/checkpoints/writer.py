"""Writing safetensors shards: the header is known before the first byte, the file is preallocated, and hashed as it is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from ..errors import ResourceError
from ..records import TensorSpec
from . import files
from .digest import Journal, OrderedDigest, proven
from .files import write_failure
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
        files.write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    except OSError as error:
        raise write_failure(folder / INDEX_FILE, error) from error


class ShardWriter:
    """Writes one shard's tensors in pieces, in any order and from any number of threads, at places known beforehand.

    The whole file is allocated first, so that a full disk is found before any work. `close` makes it durable and returns its
    XXH3-128 (hex), which is formed while the pieces come in. With a `journal`, an unfinished file is gone on with: `finished` are
    the tensors whose bytes are proven to be there; without one the file must not exist. Raises ResourceError when the disk is
    full and ValueError if the pieces do not cover the tensors promised in the header.
    """

    def __init__(self, folder: Path, shard: Shard, journal: Journal | None = None) -> None:
        self._path = folder / shard.file
        header = shard.header()
        self.size = len(header) + shard.data_bytes
        self._places = shard.places(len(header))
        try:
            self._descriptor = files.open_output(self._path, new=journal is None)
        except OSError as error:
            raise write_failure(self._path, error) from error
        try:
            self._begin(shard.file, header, journal)
        except OSError as error:
            os.close(self._descriptor)
            raise write_failure(self._path, error) from error
        begun = self._digest.end
        self.finished = frozenset(name for name, (at, _, size) in self._places.items() if at + size <= begun)

    def _begin(self, file: str, header: bytes, journal: Journal | None) -> None:
        """Find what is there, make room for the rest, and write the header unless it is there. Raises OSError."""
        marks = frozenset(place + size for place, _, size in self._places.values())
        end, begun = 0, xxhash.xxh3_128()
        if journal is not None and os.pread(self._descriptor, len(header), 0) == header:
            claims = journal.claims.get(file, {})
            end, begun = proven(self._descriptor, {at: digest for at, digest in claims.items() if at in marks})
        files.allocate(self._descriptor, self.size)
        told = None if journal is None else (journal, file, marks)
        self._digest = OrderedDigest(self._descriptor, end=end, begun=begun, journal=told)
        if end == 0:
            self._write(header, 0)

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
        if self._digest.end != self.size:
            raise ValueError(f"{self._path}: {self.size - self._digest.end} bytes of tensor data were not written")
        try:
            files.sync(self._descriptor)
        except OSError as error:
            raise write_failure(self._path, error) from error
        self.abandon()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close without a promise. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        files.write_at(self._descriptor, view, offset)
        if len(view):
            self._digest.add(offset, view)


def open_shards(folder: Path, shards: Sequence[Shard], journal: Journal | None = None) -> dict[str, ShardWriter]:
    """A writer for every shard, by file name, all with their room on the disk. Raises ResourceError saying how much is missing."""
    writers: dict[str, ShardWriter] = {}
    needed = sum(len(shard.header()) + shard.data_bytes for shard in shards)
    try:
        free = shutil.disk_usage(folder).free + sum(
            (folder / shard.file).stat().st_blocks * 512 for shard in shards if (folder / shard.file).exists()
        )
        for shard in shards:
            writers[shard.file] = ShardWriter(folder, shard, journal)
    except BaseException as error:
        for writer in writers.values():
            writer.abandon()
        full = error.__cause__ if isinstance(error, ResourceError) else None
        if isinstance(full, OSError) and full.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(folder, needed, free, full) from full
        if isinstance(error, OSError):
            raise write_failure(folder, error) from error
        raise
    return writers


def _no_room(folder: Path, needed: int, free: int, full: OSError) -> ResourceError:
    missing = f"{needed:,} bytes are needed for the weights and {free:,} are free: {needed - free:,} are missing"
    return ResourceError(
        "the disk is full",
        where=str(folder),
        why=missing if needed > free else f"{needed:,} bytes are needed for the weights: {full.strerror}",
        fix="free some space or choose another output folder, then run the same command again",
    )


def output_config(config: Mapping[str, object], dtype: str | None) -> dict[str, object]:
    """config.json for the merged model: the donor's, with the dtype the weights were written in (a transformers name)."""
    merged = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    if dtype is not None:
        present = [key for key in ("dtype", "torch_dtype") if key in merged]
        merged.update(dict.fromkeys(present or ["dtype"], dtype))
    return merged
