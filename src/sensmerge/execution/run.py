"""Writing all shards of a plan into an open staging folder, a tile at a time: memory does not grow with the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import progress
from ..checkpoints.source import TensorSource
from ..checkpoints.writer import ShardWriter, write_index
from ..methods import METHODS
from ..plan import shards_of
from ..records import MergePlan
from .tiles import tensor_tiles, tiles_of


def execute(
    plan: MergePlan, base: TensorSource | None, experts: Sequence[TensorSource], folder: Path
) -> dict[str, str]:
    """Write the plan's shards (and index) into `folder`; `experts` in the plan's order. Returns XXH3-128 (hex) by file.

    Raises NonFiniteError, InputFileError, ResourceError; the folder then holds partial files and is for deletion. Memory: K + 2
    tiles of 1 MiB. Cost: one read of every input byte, one write of every output byte.
    """
    method = METHODS.get(plan.method, where="merge_method")
    tensors = {tensor.spec.name: tensor for tensor in plan.tensors}
    hashes: dict[str, str] = {}
    shards = shards_of(plan)
    with progress.task("merging", sum(tensor.spec.elements for tensor in plan.tensors)) as advance:
        for shard in shards:
            writer = ShardWriter(folder, shard)
            try:
                for spec in shard.tensors:
                    tile = tensor_tiles(plan, method, tensors[spec.name], base, experts)
                    for start, count in tiles_of(tensors[spec.name]):
                        writer.append(tile(start, count))
                        advance(count)
                hashes[shard.file] = writer.close()
            except BaseException:
                writer.abandon()
                raise
    write_index(folder, shards)
    return hashes
