"""The pieces of a sentencepiece model (`tokenizer.model`), read without its library: the protobuf fields that name them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# The kinds of a piece that are matched before a text is split; control pieces stand for nothing that is written.
CONTROL, USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Piece:
    """One piece: its text, its score (a log-probability or a negative rank), and its kind (1: a plain piece)."""

    text: str
    score: float
    kind: int


def pieces(data: bytes) -> list[Piece]:
    """The pieces of a sentencepiece model in the order of their ids. Raises ValueError for what is none."""
    try:
        found = [_piece(value) for number, value in _fields(data) if number == 1 and isinstance(value, bytes)]
    except (IndexError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"it is not a sentencepiece model: {error}") from error
    if not found:
        raise ValueError("it is not a sentencepiece model: it has no pieces")
    return found


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1), fields.get(2, 0.0), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, float) or not isinstance(kind, int):
        raise ValueError("it is not a sentencepiece model: a piece has no text")
    return Piece(text.decode("utf-8"), score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """(number, value) of each field of a protobuf message: bytes, whole numbers, float32; doubles are skipped."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 1:
            at += 8
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("it is not a sentencepiece model: it ends inside a field")
            yield number, data[at : at + size]
            at += size
        elif wire == 5:
            yield number, float(struct.unpack_from("<f", data, at)[0])
            at += 4
        else:
            raise ValueError(f"it is not a sentencepiece model: field {number} has wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length whole number and the place behind it."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("it is not a sentencepiece model: a number is too long")
