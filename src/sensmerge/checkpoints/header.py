"""The header of a safetensors file, checked as strictly as the safetensors library checks it, before a byte is computed.

A file is 8 bytes of header length (little endian), that many bytes of JSON, then the data. The tensors must cover the data exactly:
no overlap, no hole, no tail. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputFileError, escaped
from ..records import TensorSpec
from .formats import ITEM_SIZES

MAX_HEADER_BYTES = 100_000_000
# Sizes and their products fit into 64 bits, as in the library.
MAX_SIZE = (1 << 64) - 1


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the header names '{key}' twice")
        key.encode()  # half a surrogate pair is no text: UnicodeEncodeError, a ValueError
        entries[key] = value
    return entries


def _size(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 20 or int(digits) >= 1 << 64:
        raise ValueError(f"{digits[:24]} is no size")
    return int(digits)


def _no_number(text: str) -> float:
    raise ValueError(f"{text[:24]} is no size")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON, in which every number is a size: a whole number from 0 below 2^64."""
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_size,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "the metadata is not a mapping of text to text")
    return header


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    shape, offsets = (entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else (None, None)
    if escaped(name, lines=True) != name:
        raise _broken(path, f"a tensor's name holds control characters: '{escaped(name[:200], lines=True)}'")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or len(entry) != 3:
        raise _broken(path, f"tensor '{name}' needs dtype, shape and two data_offsets, and nothing else")
    dtype, (begin, end) = entry.get("dtype"), offsets
    if isinstance(dtype, str) and dtype not in ITEM_SIZES:
        raise _broken(path, f"tensor '{name}' has dtype {dtype!r}, which is not supported")
    if not isinstance(dtype, str) or not all(type(size) is int for size in (*shape, begin, end)):
        raise _broken(path, f"tensor '{name}' has dtype {dtype!r}, {_of(shape)}, data_offsets {str(offsets)[:200]}")
    spec = TensorSpec(name, dtype, tuple(shape))
    if end - begin != _bytes(path, spec):
        raise _broken(path, f"tensor '{name}' {dtype} of {_of(shape)} has {end - begin} bytes of data")
    return StoredTensor(spec, path, data_start + begin, end - begin)


def _of(shape: list[Any]) -> str:
    """A shape for a message; a hostile one has millions of dimensions."""
    return f"shape {shape}" if len(shape) <= 16 else f"a shape of {len(shape)} dimensions"


def _bytes(path: Path, spec: TensorSpec) -> int:
    """The bytes of a tensor; multiplied out step by step, so that a long shape costs no long numbers."""
    count = 1
    for size in (*spec.shape, ITEM_SIZES[spec.dtype]):
        count *= size
        if count > MAX_SIZE:
            raise _broken(
                path, f"tensor '{spec.name}' {spec.dtype} of {_of(list(spec.shape))} is too large for 64 bits"
            )
    return count


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their data. Raises InputFileError; reads the header only."""
    try:
        # Without waiting: a pipe in place of a file has no writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise _broken(path, "it is no plain file")
            size = state.st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _broken(path, f"the header would take {length} bytes, the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise InputFileError(
            "cannot read this file", where=str(path), why=str(error), fix="check the path and its permissions"
        ) from error
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in _parse(path, text).items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    expected = 8 + length
    for tensor in tensors:
        if tensor.offset != expected:
            raise _broken(path, f"tensor '{tensor.spec.name}' begins at byte {tensor.offset}, {expected} was expected")
        expected += tensor.size
    if expected != size:
        raise _broken(path, f"the tensors end at byte {expected}, the file at byte {size}")
    return tensors
