"""The header of a safetensors file, checked as strictly as the safetensors library checks it, before a byte is computed.

A file is 8 bytes of header length (little endian), that many bytes of JSON, then the data. The tensors must cover the data exactly:
no overlap, no hole, no tail. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputFileError
from ..records import TensorSpec
from .formats import ITEM_SIZES

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's spec and the absolute place of its bytes in `file`."""

    spec: TensorSpec
    file: Path
    offset: int
    size: int


def _broken(path: Path, why: str) -> InputFileError:
    return InputFileError(
        "this safetensors file is damaged or not a safetensors file",
        where=str(path),
        why=why,
        fix="download or save the file again",
    )


def _without_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        twice = next(key for key, _ in pairs if [name for name, _ in pairs].count(key) > 1)
        raise _broken(path, f"the header names '{twice}' twice")
    return entries


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"tensor '{name}' lacks dtype, shape or data_offsets") from error
    if not sound or dtype not in ITEM_SIZES:
        raise _broken(path, f"tensor '{name}' has dtype {dtype!r}, shape {shape}, data_offsets {[begin, end]}")
    spec = TensorSpec(name, dtype, shape)
    if end - begin != spec.elements * ITEM_SIZES[dtype]:
        raise _broken(path, f"tensor '{name}' of shape {shape} {dtype} has {end - begin} bytes of data")
    return StoredTensor(spec, path, data_start + begin, end - begin)


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their data. Raises InputFileError; reads the header only."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _broken(path, f"the header would take {length} bytes, the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise InputFileError(
            "cannot read this file", where=str(path), why=str(error), fix="check the path and its permissions"
        ) from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _without_duplicates(path, pairs))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _broken(path, f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    expected = 8 + length
    for tensor in tensors:
        if tensor.offset != expected:
            raise _broken(path, f"tensor '{tensor.spec.name}' begins at byte {tensor.offset}, {expected} was expected")
        expected += tensor.size
    if expected != size:
        raise _broken(path, f"the tensors end at byte {expected}, the file at byte {size}")
    return tensors
