"""Running a plan: into the shards of an open staging folder, or into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import progress
from ..checkpoints.digest import Journal
from ..checkpoints.source import TensorSource
from ..checkpoints.writer import open_shards, write_index
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
    journal: Journal | None = None,
) -> dict[str, str]:
    """Write the plan's shards (and index) into `folder`; `readers` by `model:` string. Returns XXH3-128 (hex) by file.

    `jobs` threads (default: one for each core) give the same bytes as one, and so does any `chunk_bytes`. With the `journal` of
    an earlier call for the same plan, the tensors that are proven to be there are not merged again; a `scope` of the whole model
    still reads them. Raises NonFiniteError, InputFileError, ResourceError; the folder then holds partial files. Cost: one read of
    every input byte and one write of every output byte; where a method needs passes, what does not fit a buffer of 48 MiB is read
    again. Memory: about 2 MiB for each thread, and that buffer; a method of whole tensors holds those.
    """
    shards = shards_of(plan)
    method = METHODS.get(plan.method, where="merge_method")
    writers = open_shards(folder, shards, journal)
    finished = {name for writer in writers.values() for name in writer.finished}
    total = sum(tensor.spec.elements for tensor in plan.tensors)
    done = sum(tensor.spec.elements for tensor in plan.tensors if tensor.spec.name in finished)
    if done:
        progress.message(f"going on with an interrupted merge: {100 * done / total:.0f} % of it is there")
    with progress.task("merging", total) as advance:
        advance(done)
        sink = FileSink(writers, shards, method, advance)
        try:
            run_plan(plan, readers, sink, jobs=jobs, chunk_bytes=chunk_bytes, device=device, finished=finished)
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
