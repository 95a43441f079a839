"""Writing safetensors shards: the header is known before the first byte, the file is preallocated, and hashed as it is written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ResourceError(
        "the disk is full" if full else "the output could not be written",
        where=str(path),
        why=str(error),
        fix="free some space or choose another output folder, then run the same command again"
        if full
        else "check the folder's permissions and the disk, then run the same command again",
    )


class ShardWriter:
    """Writes one shard's tensors in order, in pieces; `close` makes it durable and returns its XXH3-128 (hex).

    The whole file is allocated first, so that a full disk is found before any work. Raises ResourceError when the disk is full
    and ValueError if the pieces do not add up to the tensors promised in the header.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._path = folder / shard.file
        self._remaining = shard.data_bytes
        self._hash = xxhash.xxh3_128()
        header = shard.header()
        try:
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except OSError as error:
            raise write_failure(self._path, error) from error
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, len(header) + shard.data_bytes)
            self._write(header)
        except OSError as error:
            os.close(self._descriptor)
            raise write_failure(self._path, error) from error

    def append(self, piece: Raw) -> None:
        """Append one piece of the current tensor (raw elements in the output dtype)."""
        data = piece.view(np.uint8)
        self._remaining -= data.nbytes
        try:
            self._write(data.data)
        except OSError as error:
            raise write_failure(self._path, error) from error

    def close(self) -> str:
        """Flush to the disk and return the file's hash."""
        if self._remaining != 0:
            raise ValueError(f"{self._path}: {self._remaining} bytes of tensor data were not written")
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_failure(self._path, error) from error
        os.close(self._descriptor)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close without a promise; the file is for deletion."""
        os.close(self._descriptor)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._hash.update(view)
        while view:
            view = view[os.write(self._descriptor, view) :]


def output_config(config: Mapping[str, object], dtype: str | None) -> dict[str, object]:
    """config.json for the merged model: the donor's, with the dtype the weights were written in (a transformers name)."""
    merged = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    if dtype is not None:
        present = [key for key in ("dtype", "torch_dtype") if key in merged]
        merged.update(dict.fromkeys(present or ["dtype"], dtype))
    return merged
