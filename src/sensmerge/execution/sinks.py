"""Where merged tiles go: into the shards of a staging folder, rounded to the output's dtype, or into memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.formats import Raw, is_finite
from ..checkpoints.writer import Shard, ShardWriter
from ..errors import NonFiniteError
from ..methods import Method
from ..records import TensorPlan
from .convert import BITS, NARROW
from .tiles import Worker, position


class FileSink:
    """Scales, adds and rounds each tile, and writes each chunk to its place. Raises NonFiniteError, ResourceError.

    `writers` are those of the `shards` by file, and closed with the sink; `advance` is told how many elements were written.
    """

    def __init__(
        self,
        writers: Mapping[str, ShardWriter],
        shards: Sequence[Shard],
        method: Method,
        advance: Callable[[int], None],
    ) -> None:
        self._adds = method.adds
        self._advance = advance
        self._lock = threading.Lock()
        self._writers = writers
        self._tensors = {spec.name: writers[shard.file] for shard in shards for spec in shard.tensors}

    def tile(self, worker: Worker, tensor: TensorPlan, first: int, size: int, chunk: tuple[int, int]) -> None:
        """Round `worker.out[:size]` into the worker's output."""
        dtype = tensor.spec.dtype
        raw = worker.output(chunk[1] - chunk[0], BITS[dtype])[first - chunk[0] : first - chunk[0] + size]
        if not NARROW[dtype](size, worker.out, worker.base, tensor.scale, self._adds, raw):
            raise self._refuse(worker, tensor, first, size, raw)

    def chunk(self, worker: Worker, tensor: TensorPlan, chunk: tuple[int, int]) -> None:
        """Write what the tiles of a chunk left."""
        size = chunk[1] - chunk[0]
        self.raw(tensor, chunk[0], worker.output(size, BITS[tensor.spec.dtype])[:size])

    def raw(self, tensor: TensorPlan, start: int, piece: Raw) -> None:
        """Write finished elements, in the output's dtype."""
        self._tensors[tensor.spec.name].write(tensor.spec.name, start, piece)
        with self._lock:
            self._advance(len(piece))

    def close(self) -> dict[str, str]:
        """Make every file durable; returns its XXH3-128 (hex) by name."""
        return {file: writer.close() for file, writer in self._writers.items()}

    def abandon(self) -> None:
        """Close what is open, without a promise."""
        for writer in self._writers.values():
            writer.abandon()

    def _refuse(self, worker: Worker, tensor: TensorPlan, first: int, size: int, raw: Raw) -> NonFiniteError:
        dtype = tensor.spec.dtype
        finite = is_finite(raw.view(np.float16) if dtype == "F16" else raw, dtype)
        at = int(np.argmin(finite))
        with np.errstate(over="ignore", invalid="ignore"):
            value = worker.out[at]
            if self._adds:
                value = worker.base[at] + np.float32(tensor.scale) * value
        return NonFiniteError(
            "the merge made a number that its dtype cannot hold",
            where=f"tensor '{tensor.spec.name}', element {position(tensor.spec.shape, first + at)}",
            why=f"{value:.6g} does not fit into {dtype}",
            fix="write `out_dtype: bfloat16` or `out_dtype: float32` into the recipe, or use smaller weights"
            if dtype == "F16"
            else "use smaller weights, or a smaller lambda",
        )


class MemorySink:
    """Keeps the method's results as they are, float32: updates before λ where the method adds."""

    def __init__(self, tensors: Sequence[TensorPlan]) -> None:
        self.values: dict[str, NDArray[np.float32]] = {
            tensor.spec.name: np.empty(tensor.spec.elements, np.float32) for tensor in tensors
        }

    def tile(self, worker: Worker, tensor: TensorPlan, first: int, size: int, chunk: tuple[int, int]) -> None:
        """Copy `worker.out[:size]`."""
        self.values[tensor.spec.name][first : first + size] = worker.out[:size]

    def chunk(self, worker: Worker, tensor: TensorPlan, chunk: tuple[int, int]) -> None:
        """Nothing is left to do."""

    def raw(self, tensor: TensorPlan, start: int, piece: Raw) -> None:
        """Integers have no update."""
        raise TypeError(f"'{tensor.spec.name}' is not floating point")
