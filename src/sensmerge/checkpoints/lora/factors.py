"""The numbers of an adapter file, and the kernel that adds a product of two factors to a piece of a matrix."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputFileError
from ...methods.kernel import kernel
from ...records import TensorSpec
from ..formats import FLOATS, to_float32
from ..header import StoredTensor, read_header

Floats = NDArray[np.float32]

# Factors that are kept for the next piece; those of a layer take a few MB.
KEPT_BYTES = 64 << 20
# Ranks are added four at a time; zeros fill the last four.
TOGETHER = 4


@kernel
def add_product(first: int, rows: Any, columns: Any, scale: float, values: Any) -> None:
    """values[i] += scale · (rows @ columns)[element first + i], float32, the ranks added in order.

    `rows` [R, r] and `columns` [r, C], r a multiple of 4. What an element gets depends on its place alone: not on where a piece
    begins, nor on its length.
    """
    width = columns.shape[1]
    factor = np.float32(scale)
    block = 1024
    sums = np.empty(block, np.float32)
    done, n = 0, values.shape[0]
    while done < n:
        row = (first + done) // width
        left = (first + done) % width
        size = min(block, n - done, width - left)
        total = sums[:size]
        for i in range(size):
            total[i] = np.float32(0)
        for k in range(0, rows.shape[1], 4):
            f0, f1, f2, f3 = rows[row, k], rows[row, k + 1], rows[row, k + 2], rows[row, k + 3]
            c0 = columns[k, left : left + size]
            c1 = columns[k + 1, left : left + size]
            c2 = columns[k + 2, left : left + size]
            c3 = columns[k + 3, left : left + size]
            for i in range(size):
                total[i] = (((total[i] + f0 * c0[i]) + f1 * c1[i]) + f2 * c2[i]) + f3 * c3[i]
        piece = values[done : done + size]
        for i in range(size):
            piece[i] += total[i] * factor
        done += size


@kernel
def widen(raw: Any, values: Any) -> None:
    """values = the bf16 numbers whose bits are raw (uint16), exactly."""
    for i in range(values.shape[0]):
        values[i] = np.uint32(np.uint32(raw[i]) << np.uint32(16)).view(np.float32)


class AdapterFile:
    """The tensors of adapter_model.safetensors as float32; the last few factors are kept. May be used from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored: dict[str, StoredTensor] = {tensor.spec.name: tensor for tensor in read_header(path)}
        self.tensors: Mapping[str, TensorSpec] = {name: stored.spec for name, stored in self._stored.items()}
        if not self.tensors:
            raise InputFileError(
                "this adapter holds no tensors",
                where=str(path),
                why="its model would be the base itself",
                fix="save the adapter again with PEFT's `save_pretrained`, or name the base without it",
            )
        self._kept: OrderedDict[tuple[str, tuple[str, bool]], Floats] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def values(self, name: str, start: int, count: int) -> Floats:
        """`count` elements of a tensor from element `start` on, flat."""
        stored = self._stored[name]
        held = np.dtype(FLOATS[stored.spec.dtype])
        raw = np.empty(count * held.itemsize, np.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(stored.offset + start * held.itemsize)
                got = file.readinto(raw.data)
        except OSError as error:
            raise self._changed(name, str(error)) from error
        if got != len(raw):
            raise self._changed(name, f"{len(raw) - got} bytes are missing")
        return to_float32(raw.view(held), stored.spec.dtype)

    def rows(self, name: str, *, transposed: bool) -> Floats:
        """A factor as [size, ranks], zeros filling the ranks to a multiple of 4; `transposed`: it is stored as [ranks, size]."""
        return self._kept_or(name, ("rows", transposed))

    def columns(self, name: str, *, transposed: bool) -> Floats:
        """A factor as [ranks, size], filled likewise; `transposed`: it is stored as [size, ranks]."""
        return self._kept_or(name, ("columns", transposed))

    def _kept_or(self, name: str, form: tuple[str, bool]) -> Floats:
        """From memory, else from the file; the longest unused leave when there are too many bytes."""
        with self._lock:
            found = self._kept.get((name, form))
            if found is None:
                found = self._kept[name, form] = self._formed(name, form)
                self._bytes += found.nbytes
            self._kept.move_to_end((name, form))
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
            return found

    def _formed(self, name: str, form: tuple[str, bool]) -> Floats:
        kind, transposed = form
        spec = self.tensors[name]
        matrix = self.values(name, 0, spec.elements).reshape(spec.shape)
        matrix = matrix.T if transposed else matrix
        ranks = matrix.shape[1] if kind == "rows" else matrix.shape[0]
        spare = -ranks % TOGETHER
        padding = ((0, 0), (0, spare)) if kind == "rows" else ((0, spare), (0, 0))
        return np.ascontiguousarray(np.pad(matrix, padding))

    def _changed(self, name: str, why: str) -> InputFileError:
        return InputFileError(
            "this adapter file cannot be read any more",
            where=f"{self.path}, tensor '{name}'",
            why=why,
            fix="restore the file and run the command again",
        )

    def hash(self) -> str:
        """SHA-256 (hex) of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
