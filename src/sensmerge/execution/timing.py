"""How fast a merge would run here, from a short one: some rows of its largest tensor, read, merged and thrown away."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..checkpoints.formats import FLOATS, ITEM_SIZES, Raw
from ..checkpoints.source import TensorSource
from ..methods import METHODS
from ..plan import inputs_of
from ..records import MergePlan, TensorPlan, TensorSpec
from .engine import run_plan
from .tiles import Worker

# Bytes that are read of all inputs together.
SAMPLE_BYTES = 32 << 20


@dataclass(frozen=True)
class Speed:
    """Bytes of input a second: as read from where they lie, and as merged once they are in memory."""

    reading: float
    merging: float


class Nowhere:
    """A sink that keeps nothing."""

    def tile(self, worker: Worker, tensor: TensorPlan, first: int, size: int, chunk: tuple[int, int]) -> None:
        """Nothing is kept."""

    def chunk(self, worker: Worker, tensor: TensorPlan, chunk: tuple[int, int]) -> None:
        """Nothing is kept."""

    def raw(self, tensor: TensorPlan, start: int, piece: Raw) -> None:
        """Nothing is kept."""


def measured_speed(plan: MergePlan, readers: Mapping[str, TensorSource], jobs: int) -> Speed | None:
    """The speed on at most 32 MiB of the inputs; None for a method of whole tensors, whose parts say nothing of the whole.

    The sample may lie in memory already, and then reading looks faster than it is. Raises what a merge raises for those bytes.
    """
    tensors = [tensor for tensor in plan.tensors if tensor.spec.dtype in FLOATS and tensor.spec.elements]
    if METHODS.get(plan.method, where="merge_method").whole is not None or not tensors:
        return None
    part = _rows_of(max(tensors, key=lambda tensor: tensor.spec.elements), readers)
    size = _bytes(part, readers)
    started = time.perf_counter()
    for each in inputs_of(part):
        item = ITEM_SIZES[readers[each.model].tensors[each.tensor].dtype]
        readers[each.model].read_into(each.tensor, 0, np.empty(part.spec.elements * item, np.uint8))
    reading = time.perf_counter() - started
    small = replace(plan, tensors=(part,))
    # The first run loads the kernels, or compiles them.
    run_plan(small, readers, Nowhere(), jobs=jobs)
    started = time.perf_counter()
    run_plan(small, readers, Nowhere(), jobs=jobs)
    merging = time.perf_counter() - started
    return Speed(size / max(reading, 1e-6), size / max(merging, 1e-6))


def _bytes(tensor: TensorPlan, readers: Mapping[str, TensorSource]) -> int:
    items = sum(ITEM_SIZES[readers[each.model].tensors[each.tensor].dtype] for each in inputs_of(tensor))
    return tensor.spec.elements * items


def _rows_of(tensor: TensorPlan, readers: Mapping[str, TensorSource]) -> TensorPlan:
    """The first rows of a tensor, as many as the sample may hold, as a tensor of its own."""
    first, *rest = tensor.spec.shape or (1,)
    rows = max(1, min(first, SAMPLE_BYTES * first // max(1, _bytes(tensor, readers))))
    shape = (rows, *rest) if tensor.spec.shape else ()
    options = {**tensor.options, "scope": "tensor"} if tensor.options.get("scope") == "global" else tensor.options
    return replace(tensor, spec=TensorSpec(tensor.spec.name, tensor.spec.dtype, shape), options=options)
