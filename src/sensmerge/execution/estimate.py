"""What a merge costs, from the engine's own constants and the headers: bytes that are read again, and memory at its peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoints.formats import FLOATS, ITEM_SIZES
from ..checkpoints.source import Checkpoint
from ..methods import METHODS
from ..methods.method import Ranks, Sums
from ..plan import inputs_of
from ..records import MergePlan, TensorPlan
from .order_statistics import COARSE, FINE
from .phases import KEPT_BYTES, SORTED
from .tiles import CHUNK_BYTES, STRETCHES, TensorWork

# What Python, NumPy and the compiled kernels hold before the first tensor, with room for compiling; measured on Linux.
INTERPRETER_BYTES = 200 << 20
# What torch adds, where a method of whole tensors needs it.
TORCH_BYTES = 350 << 20
# What waits to be hashed, of a file that is written.
WAITING_BYTES = 16 << 20
# The names, shapes and places of one tensor of the plan and of each of its inputs.
PLAN_BYTES = 4096


@dataclass(frozen=True)
class Cost:
    """Bytes that are read a second time (or more often), and memory at the peak without the page cache; both are estimates."""

    bytes_again: int
    peak_bytes: int


def cost_of(plan: MergePlan, readers: Mapping[str, Checkpoint], jobs: int) -> Cost:
    """The cost of `execute(plan, …)` with `jobs` threads. Reads nothing."""
    method = METHODS.get(plan.method, where="merge_method")
    floats = [tensor for tensor in plan.tensors if tensor.spec.dtype in FLOATS and tensor.spec.elements]
    fixed = INTERPRETER_BYTES + PLAN_BYTES * sum(2 + len(tensor.experts) for tensor in plan.tensors)
    fixed += 2 * min(WAITING_BYTES, plan.bytes_written) + _formed(floats, readers)
    if method.steps is None:
        # A thread holds a tensor of every input as read and as float32, and the method's own copies of it.
        sizes = sorted((each.spec.elements * 4 * (2 * len(list(inputs_of(each))) + 4) for each in floats), reverse=True)
        return Cost(0, fixed + TORCH_BYTES + sum(sizes[:jobs]))
    works = [TensorWork(tensor, method, readers) for tensor in floats]
    again = sum(_again(work) for work in works)
    kept = KEPT_BYTES if any(work.steps.passes for work in works) else 0
    moved = max((_moved(work) for work in works), default=0)
    passes = max((_passes(work) for work in works), default=0)
    return Cost(again, fixed + jobs * moved + min(kept, plan.bytes_read) + jobs * passes)


def _formed(tensors: list[TensorPlan], readers: Mapping[str, Checkpoint]) -> int:
    """What inputs hold that are formed while they are read (a LoRA's): the largest such tensor in float32, a few times."""
    formed = [
        readers[part.model].tensors[part.tensor].elements
        for tensor in tensors
        for part in inputs_of(tensor)
        if readers[part.model].stored_dtype(part.tensor) != readers[part.model].tensors[part.tensor].dtype
    ]
    return 12 * max(formed, default=0)


def _input_bytes(work: TensorWork) -> int:
    return work.elements * sum(each.item for each in work.inputs)


def _again(work: TensorWork) -> int:
    """What the passes of one tensor read again, beyond what the engine keeps of it."""
    block = CHUNK_BYTES + 4096
    blocks = KEPT_BYTES // block if work.block_bytes() <= block else 0
    chunks = -(-work.elements // work.chunk)
    missing = 1.0 - min(1.0, blocks / chunks)
    reads = 0.0
    for step in work.steps.passes:
        if isinstance(step, Ranks) and step.everywhere:
            # Two passes over the whole model, of which nothing is kept.
            reads += 2.0
        else:
            reads += missing * (2 if isinstance(step, Ranks) and work.elements > SORTED else 1)
    return int(reads * _input_bytes(work))


def _moved(work: TensorWork) -> int:
    """A thread's own: a chunk as read, the tiles, a chunk as written."""
    measured = max((step.rows for step in work.steps.passes if isinstance(step, Ranks) and step.measure), default=0)
    tiles = work.tile * 4 * (2 + len(work.experts) + measured)
    return work.block_bytes() + tiles + work.chunk * ITEM_SIZES[work.plan.spec.dtype]


def _passes(work: TensorWork) -> int:
    """What passes add up in: partial sums of each stretch, histograms, a small tensor to be sorted."""
    total = 0
    for step in work.steps.passes:
        if isinstance(step, Sums):
            groups = {"tensor": 1, "row": work.elements // work.columns, "column": work.columns}[step.by]
            stretches = 1 if step.by == "row" else STRETCHES
            total = max(total, stretches * groups * step.width * 8)
        else:
            places = max(len(row) for row in step.places(work.elements, [0] * step.rows))
            total = max(total, step.rows * 8 * (COARSE + places * FINE) + step.rows * 8 * min(work.elements, SORTED))
    return total
