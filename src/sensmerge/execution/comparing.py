"""A merge that is compared with a model on disk instead of being written: the memory of a merge, whatever the tensors' sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..checkpoints.formats import FLOATS, ITEM_SIZES, Raw, to_float32
from ..checkpoints.source import TensorSource
from ..methods import Method
from ..records import TensorPlan
from .convert import BITS, NARROW
from .tiles import Worker


@dataclass(frozen=True)
class Difference:
    """Where a stored tensor is not what was computed: its first unlike element, how many there are, and both values there."""

    first: int
    count: int
    stored: str
    computed: str


class ComparingSink:
    """Rounds each tile as a merge does and compares each chunk, bit for bit, with the tensor of that name in `stored`."""

    def __init__(self, stored: TensorSource, method: Method, advance: Callable[[int], None]) -> None:
        self.differences: dict[str, Difference] = {}
        self._stored, self._adds, self._advance = stored, method.adds, advance
        self._lock = threading.Lock()

    def tile(self, worker: Worker, tensor: TensorPlan, first: int, size: int, chunk: tuple[int, int]) -> None:
        """Round `worker.out[:size]`; what is not finite is a difference like any other."""
        dtype = tensor.spec.dtype
        raw = worker.output(chunk[1] - chunk[0], BITS[dtype])[first - chunk[0] : first - chunk[0] + size]
        NARROW[dtype](size, worker.out, worker.base, tensor.scale, self._adds, raw)

    def chunk(self, worker: Worker, tensor: TensorPlan, chunk: tuple[int, int]) -> None:
        """Compare what the tiles of a chunk left."""
        size = chunk[1] - chunk[0]
        self.raw(tensor, chunk[0], worker.output(size, BITS[tensor.spec.dtype])[:size])

    def raw(self, tensor: TensorPlan, start: int, piece: Raw) -> None:
        """Compare finished elements with the stored ones."""
        item = ITEM_SIZES[tensor.spec.dtype]
        stored = np.empty(len(piece) * item, np.uint8)
        self._stored.read_into(tensor.spec.name, start, stored)
        computed = piece.view(np.uint8)
        if not np.array_equal(stored, computed):
            unlike = (stored.reshape(-1, item) != computed.reshape(-1, item)).any(axis=1)
            at = int(np.argmax(unlike))
            here = slice(at * item, at * item + item)
            told = [_told(values[here].copy(), tensor.spec.dtype) for values in (stored, computed)]
            self._note(tensor.spec.name, Difference(start + at, int(unlike.sum()), *told))
        with self._lock:
            self._advance(len(piece))

    def _note(self, name: str, found: Difference) -> None:
        with self._lock:
            known = self.differences.get(name)
            if known is not None:
                first = min(known, found, key=lambda each: each.first)
                found = Difference(first.first, known.count + found.count, first.stored, first.computed)
            self.differences[name] = found


def _told(element: Raw, dtype: str) -> str:
    """One element for a message: a number, or its bytes where the dtype is not floating point."""
    if dtype not in FLOATS:
        return f"bytes {element.tobytes().hex()}"
    return f"{to_float32(element.view(FLOATS[dtype]), dtype)[0]:.9g}"
