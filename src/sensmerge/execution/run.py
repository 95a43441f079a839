"""Running a plan: into the shards of an open staging folder, or into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import progress
from ..checkpoints.source import TensorSource
from ..checkpoints.writer import write_index
from ..methods import METHODS
from ..plan import shards_of
from ..records import MergePlan
from .engine import run_plan
from .sinks import FileSink, MemorySink
from .tiles import CHUNK_BYTES


def execute(
    plan: MergePlan,
    readers: Mapping[str, TensorSource],
    folder: Path,
    *,
    jobs: int | None = None,
    device: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, str]:
    """Write the plan's shards (and index) into `folder`; `readers` by `model:` string. Returns XXH3-128 (hex) by file.

    `jobs` threads (default: one for each core) give the same bytes as one, and so does any `chunk_bytes`. Raises NonFiniteError,
    InputFileError, ResourceError; the folder then holds partial files and is for deletion. Cost: one read of every input byte
    and one write of every output byte; where a method needs passes, what does not fit a buffer of 48 MiB is read again. Memory:
    about 2 MiB for each thread, and that buffer; a method of whole tensors holds those.
    """
    shards = shards_of(plan)
    method = METHODS.get(plan.method, where="merge_method")
    with progress.task("merging", sum(tensor.spec.elements for tensor in plan.tensors)) as advance:
        sink = FileSink(folder, shards, method, advance)
        try:
            run_plan(plan, readers, sink, jobs=jobs, chunk_bytes=chunk_bytes, device=device)
            hashes = sink.close()
        except BaseException:
            sink.abandon()
            raise
    write_index(folder, shards)
    return hashes


def updates(
    plan: MergePlan,
    readers: Mapping[str, TensorSource],
    names: set[str],
    *,
    jobs: int | None = None,
    device: str = "auto",
) -> dict[str, NDArray[np.float32]]:
    """The method's result for the tensors in `names`, float32, flat: the update before λ of a method that adds.

    The same numbers that `execute` would scale, add and round. Memory: the result.
    """
    sink = MemorySink([tensor for tensor in plan.tensors if tensor.spec.name in names])
    run_plan(plan, readers, sink, jobs=jobs, names=names, device=device)
    return sink.values
