"""The phases of a tensor: adding up, selecting, merging. Each is made of units that workers do side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.formats import ITEM_SIZES, Raw
from ..checkpoints.source import TensorSource
from ..errors import IncompatibleModelsError
from ..methods.kernel import Kernel
from ..methods.method import Numbers, Ranks, Sums
from ..records import TensorPlan
from .order_statistics import Counters, Selection, count_coarse, count_fine
from .schedule import Phase
from .tiles import CHUNK_BYTES, Bytes, TensorWork, Worker, divided

# What all workers together keep of the chunks of tensors that are read more than once.
KEPT_BYTES = 48 << 20
# Elements of a tensor that is rather sorted than counted.
SORTED = 1 << 16


class ChunkStore:
    """Chunks that one phase read and the next needs, in a fixed number of blocks; what finds no room is read again."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._block_bytes = chunk_bytes + 4096
        self._left = KEPT_BYTES // self._block_bytes
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, int], tuple[Bytes, list[Bytes]]] = {}
        self._free: list[Bytes] = []

    def read(self, work: TensorWork, worker: Worker, start: int, stop: int, *, again: bool) -> list[Bytes]:
        """The bytes of a chunk of every input; `again` says whether a later phase will ask for it once more."""
        place = work.plan.spec.name, start
        with self._lock:
            kept = self._kept.get(place)
        if kept is not None:
            return kept[1]
        block = self._block(work.block_bytes()) if again else None
        if block is None:
            return work.read(start, stop, worker.block(work.block_bytes()))
        parts = work.read(start, stop, block)
        with self._lock:
            self._kept[place] = block, parts
        return parts

    def release(self, work: TensorWork, start: int) -> None:
        """Give up a chunk after its last phase."""
        with self._lock:
            kept = self._kept.pop((work.plan.spec.name, start), None)
            if kept is not None:
                self._free.append(kept[0])

    def _block(self, size: int) -> Bytes | None:
        with self._lock:
            if size > self._block_bytes:
                return None
            if self._free:
                return self._free.pop()
            if self._left:
                self._left -= 1
                return np.empty(self._block_bytes, np.uint8)
            return None


class Sink(Protocol):
    """Where merged tiles go."""

    def tile(self, worker: Worker, tensor: TensorPlan, first: int, size: int, chunk: tuple[int, int]) -> None:
        """Take `worker.out[:size]`, the method's result for the elements from `first` on."""

    def chunk(self, worker: Worker, tensor: TensorPlan, chunk: tuple[int, int]) -> None:
        """All tiles of a chunk were given."""

    def raw(self, tensor: TensorPlan, start: int, piece: Raw) -> None:
        """Take elements that are finished: in the output's dtype."""


class SumsPhase:
    """Adds up: one partial sum for each stretch, summed in order at the end."""

    def __init__(self, work: TensorWork, step: Sums, results: Sequence[Any], store: ChunkStore) -> None:
        self.units = work.stretches
        self._work, self._step, self._store = work, step, store
        self._experts, self._groups = numbers(work, results)
        groups = {"tensor": 1, "row": work.elements // work.columns, "column": work.columns}[step.by]
        self._by_row = step.by == "row"
        # The rows of a tensor lie in one stretch each, so they need no partial sums.
        self._partial = np.zeros((1 if self._by_row else len(self.units), groups, step.width))
        self.result: Numbers = self._partial[0]

    def work(self, worker: Worker, unit: int) -> None:
        """Add up one stretch."""
        work, step = self._work, self._step
        worker.fit(work)
        out = self._partial[0 if self._by_row else unit]
        add = step.kernel.compiled
        sparsify = sparsifier(work) if step.sparsified else None
        for start, stop in work.chunks(*self.units[unit]):
            parts = self._store.read(work, worker, start, stop, again=True)
            for first, size in worker.tiles(work, start, stop, parts):
                if sparsify is not None:
                    sparsify(size, first, work.columns, worker.x, self._experts, self._groups, work.keys)
                add(size, first, work.columns, worker.base, worker.x, self._experts, self._groups, work.keys, out)

    def finish(self) -> None:
        """Sum the stretches in order."""
        self.result = self._partial.sum(axis=0)


class CountPhase:
    """One of the two counts of a selection, over |x_k| or what the method measures."""

    def __init__(
        self,
        work: TensorWork,
        step: Ranks,
        results: Sequence[Any],
        selection: Selection,
        store: ChunkStore,
        *,
        fine: bool,
        again: bool = True,
    ) -> None:
        self.units = work.all_chunks
        self._work, self._step, self._store = work, step, store
        self._selection, self._fine, self._again = selection, fine, again
        self._numbers = numbers(work, results)

    def work(self, worker: Worker, unit: int) -> None:
        """Count one chunk."""
        work = self._work
        worker.fit(work, _measured_rows(self._step))
        counter = self._selection.counter(worker)
        start, stop = self.units[unit]
        parts = self._store.read(work, worker, start, stop, again=self._again)
        for first, size in worker.tiles(work, start, stop, parts):
            values = _measure(worker, work, self._step, self._numbers, first, size)
            if self._fine:
                count_fine(size, values, self._selection.bins, counter.fine)
            else:
                count_coarse(size, values, counter.coarse, counter.zeros)

    def finish(self) -> None:
        """The selection adds up what the workers counted."""


def _measured_rows(step: Ranks) -> int:
    return 0 if step.measure is None else step.rows


def _measure(
    worker: Worker, work: TensorWork, step: Ranks, told: tuple[Numbers, Numbers], first: int, size: int
) -> NDArray[np.float32]:
    if step.measure is None:
        return worker.x
    step.measure(size, first, work.columns, worker.base, worker.x, *told, work.keys, worker.measured)
    return worker.measured


class SortPhase:
    """A selection in a tensor that is small enough to be sorted."""

    def __init__(self, work: TensorWork, step: Ranks, results: Sequence[Any], store: ChunkStore) -> None:
        self.units = [(0, work.elements)]
        self._work, self._step, self._store = work, step, store
        self._numbers = numbers(work, results)
        self.result = np.zeros((step.rows, 0), np.float32)

    def work(self, worker: Worker, unit: int) -> None:
        """Read, sort, select."""
        work, step = self._work, self._step
        worker.fit(work, _measured_rows(step))
        sizes = np.empty((step.rows, work.elements), np.float32)
        for start, stop in work.all_chunks:
            parts = self._store.read(work, worker, start, stop, again=True)
            for first, size in worker.tiles(work, start, stop, parts):
                values = _measure(worker, work, step, self._numbers, first, size)
                sizes[:, first : first + size] = np.abs(values[:, :size])
        sizes.sort(axis=1)
        places = np.array(step.places(work.elements, np.sum(sizes == 0, axis=1).tolist()), np.int64)
        # One past the largest holds infinity.
        ended = np.column_stack([sizes, np.full(step.rows, np.inf, np.float32)])
        self.result = np.take_along_axis(ended, places, axis=1)

    def finish(self) -> None:
        """Nothing is left to do."""


class MergePhase:
    """The last phase: sparsify, combine, and hand each tile on."""

    def __init__(self, work: TensorWork, results: Sequence[Any], store: ChunkStore, sink: Sink) -> None:
        self.units = work.all_chunks
        self._work, self._store, self._sink = work, store, sink
        self._experts, self._groups = numbers(work, results)

    def work(self, worker: Worker, unit: int) -> None:
        """Merge one chunk."""
        work, sink = self._work, self._sink
        worker.fit(work)
        combine, sparsify = work.steps.combine.compiled, sparsifier(work)
        chunk = self.units[unit]
        parts = self._store.read(work, worker, *chunk, again=False)
        for first, size in worker.tiles(work, *chunk, parts):
            if sparsify is not None:
                sparsify(size, first, work.columns, worker.x, self._experts, self._groups, work.keys)
            combine(size, first, work.columns, worker.base, worker.x, self._experts, self._groups, worker.out)
            sink.tile(worker, work.plan, first, size, chunk)
        self._store.release(work, chunk[0])
        sink.chunk(worker, work.plan, chunk)

    def finish(self) -> None:
        """Nothing is left to do."""


class CopyPhase:
    """A tensor that is not floating point: equal in all models, and copied."""

    def __init__(self, tensor: TensorPlan, readers: Mapping[str, TensorSource], sink: Sink) -> None:
        self.units = list(divided(0, tensor.spec.elements, CHUNK_BYTES // ITEM_SIZES[tensor.spec.dtype]))
        self._tensor, self._readers, self._sink = tensor, readers, sink

    def work(self, worker: Worker, unit: int) -> None:
        """Compare and copy one chunk. Raises IncompatibleModelsError."""
        start, stop = self.units[unit]
        tensor = self._tensor
        parts = [*([] if tensor.base is None else [tensor.base]), *tensor.experts]
        first, *others = [self._readers[part.model].read(part.tensor, start, stop - start) for part in parts]
        for part, other in zip(parts[1:], others, strict=True):
            if other.tobytes() != first.tobytes():
                raise IncompatibleModelsError(
                    f"the {tensor.spec.dtype} tensor '{tensor.spec.name}' differs between the models",
                    where=f"{parts[0].model} and {part.model}",
                    why="integers and truth values cannot be merged, only copied where they are equal",
                    fix="use models whose buffers are equal",
                )
        self._sink.raw(tensor, start, first)

    def finish(self) -> None:
        """Nothing is left to do."""


def numbers(work: TensorWork, results: Sequence[Any]) -> tuple[Numbers, Numbers]:
    """What the kernels are told, as C-contiguous float64."""
    experts, groups = work.steps.numbers(results)
    return np.ascontiguousarray(experts, np.float64), np.ascontiguousarray(groups, np.float64)


def sparsifier(work: TensorWork) -> Any:
    """The compiled sparsifier, or None."""
    step: Kernel | None = work.steps.sparsify
    return None if step is None else step.compiled


def phases(
    work: TensorWork, store: ChunkStore, counters: Counters, sink: Sink, thresholds: NDArray[np.float32] | None
) -> Iterator[Phase]:
    """The phases of one tensor, each made when the one before is complete; `thresholds` are those of the whole model."""
    results: list[Any] = []
    for step in work.steps.passes:
        if isinstance(step, Sums):
            adding = SumsPhase(work, step, results, store)
            yield adding
            results.append(adding.result)
        elif step.everywhere:
            results.append(thresholds)
        elif work.elements <= SORTED:
            sorting = SortPhase(work, step, results, store)
            yield sorting
            results.append(sorting.result)
        else:
            selection = Selection(step.rows, counters)
            yield CountPhase(work, step, results, selection, store, fine=False)
            selection.locate(step.places(work.elements, selection.zeros()))
            yield CountPhase(work, step, results, selection, store, fine=True)
            results.append(selection.values())
    yield MergePhase(work, results, store, sink)
