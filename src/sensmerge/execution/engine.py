"""All tensors of a plan through their phases, on some threads, into a sink."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.formats import FLOATS
from ..checkpoints.source import TensorSource
from ..methods import METHODS
from ..methods.method import Ranks
from ..records import MergePlan, TensorPlan
from .order_statistics import Counters, Selection
from .phases import ChunkStore, CopyPhase, CountPhase, Sink, phases
from .schedule import Phase, Schedule, run_in_threads
from .tiles import CHUNK_BYTES, TensorWork, Worker
from .whole import WholePhase

Tensors = Iterator[Iterator[Phase]]


def run_plan(
    plan: MergePlan,
    readers: Mapping[str, TensorSource],
    sink: Sink,
    *,
    jobs: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    names: set[str] | None = None,
    device: str = "auto",
    finished: Collection[str] = (),
) -> None:
    """Merge the tensors of `plan` (those in `names`, but for those that are `finished`) and give every tile to `sink`.

    `jobs` threads, one for each core by default. `device` (auto, cpu, cuda) is for methods of whole tensors. Raises NonFiniteError,
    InputFileError, IncompatibleModelsError, and what the sink raises.
    """
    method = METHODS.get(plan.method, where="merge_method")
    if method.whole is not None:
        from ..calibration.models import choose_device

        device = choose_device(device)
    workers = [Worker() for _ in range(jobs or cores())]
    floats = [tensor for tensor in plan.tensors if tensor.spec.dtype in FLOATS and tensor.spec.elements]

    def run(tensors: Tensors) -> None:
        # Small tensors pass quickly: a few begun ahead keep every worker busy while one ends a phase.
        run_in_threads(Schedule(tensors, ahead=len(workers) + 2), workers)

    def begun(tensor: TensorPlan) -> TensorWork:
        return TensorWork(tensor, method, readers, chunk_bytes)

    # Whole-model thresholds need every tensor, merged already or not; where nothing is left to merge they need none.
    left = method.steps is not None and any(tensor.spec.name not in finished for tensor in floats)
    thresholds = _global_thresholds([*floats], begun, run) if left else None
    store, counters = ChunkStore(chunk_bytes), Counters()

    def tensors() -> Tensors:
        for tensor in plan.tensors:
            if (names is not None and tensor.spec.name not in names) or tensor.spec.name in finished:
                continue
            if tensor.spec.dtype not in FLOATS:
                yield iter([CopyPhase(tensor, readers, sink)])
            elif tensor.spec.elements and method.whole is not None:
                yield iter([WholePhase(tensor, method, readers, sink, device)])
            elif tensor.spec.elements:
                yield phases(begun(tensor), store, counters, sink, thresholds)

    run(tensors())


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _global_thresholds(
    plans: Sequence[TensorPlan], begun: Callable[[TensorPlan], TensorWork], run: Callable[[Tensors], None]
) -> NDArray[np.float32] | None:
    """The values that a method selects over the whole model, float32 [rows, places]; None if it selects none."""
    if not plans:
        return None
    first = begun(plans[0])
    step = next((each for each in first.steps.passes if isinstance(each, Ranks) and each.everywhere), None)
    if step is None:
        return None
    selection = Selection(step.rows, Counters())
    store = ChunkStore()

    def counting(fine: bool) -> Tensors:
        for plan in plans:
            yield iter([CountPhase(begun(plan), step, [], selection, store, fine=fine, again=False)])

    run(counting(False))
    selection.locate(step.places(sum(plan.spec.elements for plan in plans), selection.zeros()))
    run(counting(True))
    return selection.values()
