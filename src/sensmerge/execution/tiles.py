"""One output tensor as the engine sees it: its inputs, its division into tiles, chunks and stretches, and how a tile is filled.

A *tile* is what a kernel works on: 128 Ki elements, or as many whole rows as fit (at least one). A *chunk* is what is read at a
time: some tiles. A *stretch*, some chunks, is what one worker adds up alone. Tiles and stretches depend on the tensor's shape
alone, so that sums are formed in one order whatever the chunks, the number of workers or their speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import randomness
from ..checkpoints.formats import ITEM_SIZES, is_finite
from ..checkpoints.source import TensorSource
from ..errors import NonFiniteError
from ..methods import Method
from ..methods.method import Steps
from ..plan import call_of
from ..records import TensorInput, TensorPlan
from .convert import BITS, WIDEN

TILE = 1 << 17
STRETCHES = 16
CHUNK_BYTES = 1 << 20

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Input:
    """One tensor that is read: where, under what name, in what dtype."""

    source: TensorSource
    name: str
    dtype: str

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return ITEM_SIZES[self.dtype]


def position(shape: Sequence[int], flat: int) -> list[int]:
    """The indices of a flat place."""
    return [int(index) for index in np.unravel_index(flat, tuple(shape))] if shape else []


class TensorWork:
    """A tensor to be merged: what was planned, what is read, and how it is divided."""

    def __init__(
        self, plan: TensorPlan, method: Method, readers: Mapping[str, TensorSource], chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.plan = plan

        def opened(part: TensorInput) -> Input:
            source = readers[part.model]
            return Input(source, part.tensor, source.tensors[part.tensor].dtype)

        self.base = None if plan.base is None else opened(plan.base)
        self.experts = [opened(part) for part in plan.experts]
        self.subtracts = method.vectors == "always" or (method.vectors == "with_base" and self.base is not None)
        self.call = call_of(plan)
        assert method.steps is not None
        self.steps: Steps = method.steps(self.call)
        self.columns = self.steps.columns or self.call.columns
        self.elements = plan.spec.elements
        self.tile = max(1, TILE // self.columns) * self.columns if self.steps.whole_rows else TILE
        self.keys = np.zeros((len(self.experts), 2), np.uint32)
        if method.draws:
            seed = int(plan.options["seed"])
            self.keys[:] = [randomness.key(seed, part.model, plan.spec.name) for part in plan.experts]
        stretch = -(-self.elements // STRETCHES)
        self.stretch = max(self.tile, -(-stretch // self.tile) * self.tile)
        fit = chunk_bytes // sum(each.item for each in self.inputs)
        self.chunk = min(self.stretch, max(self.tile, fit // self.tile * self.tile))

    @property
    def inputs(self) -> list[Input]:
        """The base, if it is read, then the experts."""
        return self.experts if self.base is None else [self.base, *self.experts]

    @cached_property
    def stretches(self) -> list[tuple[int, int]]:
        """(start, stop) of each stretch."""
        return list(divided(0, self.elements, self.stretch))

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the chunks of a stretch."""
        return divided(start, stop, self.chunk)

    @cached_property
    def all_chunks(self) -> list[tuple[int, int]]:
        """(start, stop) of each chunk of the tensor, in order."""
        return [chunk for stretch in self.stretches for chunk in self.chunks(*stretch)]

    def read(self, start: int, stop: int, block: Bytes) -> list[Bytes]:
        """Read a chunk of every input into `block`; returns each input's bytes."""
        parts, at = [], 0
        for each in self.inputs:
            part = block[at : at + (stop - start) * each.item]
            each.source.read_into(each.name, start, part)
            parts.append(part)
            # Every part begins at a multiple of 64 bytes, so that its elements are aligned.
            at += -(-len(part) // 64) * 64
        return parts

    def block_bytes(self) -> int:
        """Bytes that `read` needs for a chunk."""
        return sum(-(-self.chunk * each.item // 64) * 64 for each in self.inputs)

    def refuse_input(self, each: Input, start: int, raw: Any) -> NonFiniteError:
        """The error for a tile of an input that holds NaN or infinity."""
        finite = is_finite(raw.view(np.float16) if each.dtype == "F16" else raw, each.dtype)
        first = start + int(np.argmin(finite))
        return NonFiniteError(
            "a weight is NaN or infinite",
            where=f"model {each.source.label}, tensor '{each.name}', element {position(self.plan.spec.shape, first)}"
            f" ({int((~finite).sum())} such elements in this part of the tensor)",
            why="it would spread into the merged model",
            fix="use an undamaged copy of the model",
        )


def divided(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """(from, to) of pieces of at most `size`."""
    for at in range(start, stop, size):
        yield at, min(at + size, stop)


class Worker:
    """What one thread owns: a block to read into, and float32 tiles that the cache holds."""

    def __init__(self) -> None:
        self._block: Bytes = np.empty(0, np.uint8)
        self.base = np.zeros(0, np.float32)
        self.x = np.zeros((0, 0), np.float32)
        self.out = np.zeros(0, np.float32)
        self.measured = np.zeros((0, 0), np.float32)
        self._output: Bytes = np.empty(0, np.uint8)

    def output(self, size: int, dtype: type[np.generic]) -> Any:
        """Room for a chunk of `size` merged elements, held as `dtype`; what was written there stays until the next chunk."""
        item = np.dtype(dtype).itemsize
        if len(self._output) < size * item:
            self._output = np.empty(size * item, np.uint8)
        return self._output[: size * item].view(dtype)

    def block(self, size: int) -> Bytes:
        """At least `size` bytes to read into."""
        if len(self._block) < size:
            self._block = np.empty(size, np.uint8)
        return self._block

    def fit(self, work: TensorWork, measured: int = 0) -> None:
        """Make the tiles large enough for `work`, with `measured` rows for what a method measures."""
        self.widen_to(work.tile)
        width = len(self.out)
        if self.x.shape != (len(work.experts), width):
            self.x = np.empty((len(work.experts), width), np.float32)
        if self.measured.shape != (measured, width):
            self.measured = np.empty((measured, width), np.float32)

    def widen_to(self, width: int) -> None:
        """Make `base` and `out` at least `width` elements long."""
        if len(self.out) < width:
            self.base, self.out = np.zeros(width, np.float32), np.empty(width, np.float32)

    def tiles(self, work: TensorWork, start: int, stop: int, parts: Sequence[Bytes]) -> Iterator[tuple[int, int]]:
        """Fill `base` and `x` with one tile of a chunk after the other; gives (place of its first element, its size).

        Raises NonFiniteError for NaN or infinity in an input.
        """
        raws = [
            (each, part.view(BITS[each.dtype]), WIDEN[each.dtype].compiled)
            for each, part in zip(work.inputs, parts, strict=True)
        ]
        lead = 0 if work.base is None else 1
        for at, end in divided(start, stop, work.tile):
            size = end - at
            for place, (each, raw, widen) in enumerate(raws):
                tile = raw[at - start : end - start]
                expert = place >= lead
                row = self.x[place - lead] if expert else self.base
                if not widen(size, tile, self.base, expert and work.subtracts, row):
                    raise work.refuse_input(each, at, tile)
            yield at, size
