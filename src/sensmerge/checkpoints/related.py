"""Whether experts were fine-tuned from this base: how far they stand from it, on a few blocks of every matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .fingerprint import evenly_spaced_blocks
from .formats import FLOATS, ITEM_SIZES, to_float32
from .source import TensorSource

# ‖δ‖/‖θ_0‖ of two models that have nothing in common is √2; fine-tuning, even long and at a high rate, stays below 1.
LIMIT = 1.0
# Whole tensors are compared in pieces of this many elements.
PIECE = 1 << 22


def sampled(source: TensorSource, name: str) -> NDArray[np.float32]:
    """The values of a tensor on its fingerprint blocks: at most 16 blocks of 2048 elements, evenly spaced, in float32.

    Where they lie depends on the number of elements alone, so that equal places of two tensors are compared whatever their
    dtypes. Cost: 16 reads.
    """
    spec = source.tensors[name]
    # The blocks are those of a tensor of two bytes an element.
    blocks = [(offset // 2, size // 2) for offset, size in evenly_spaced_blocks(spec.elements * 2)]
    return np.concatenate([to_float32(source.read(name, start, count), spec.dtype) for start, count in blocks])


def is_same(source: TensorSource, one: str, other: str) -> bool:
    """Whether two tensors of a model hold the same numbers. Cost: the blocks where they differ, else a pass over both."""
    first, second = source.tensors[one], source.tensors[other]
    if first.shape != second.shape or first.dtype not in FLOATS or second.dtype not in FLOATS:
        return False
    if not np.array_equal(sampled(source, one), sampled(source, other), equal_nan=True):
        return False
    piece = PIECE // ITEM_SIZES[first.dtype]
    for start in range(0, first.elements, piece):
        count = min(piece, first.elements - start)
        ours, theirs = (
            to_float32(source.read(name, start, count), source.tensors[name].dtype) for name in (one, other)
        )
        if not np.array_equal(ours, theirs, equal_nan=True):
            return False
    return True


def distances_from(base: TensorSource, experts: Mapping[str, TensorSource]) -> dict[str, float]:
    """‖θ_i − θ_0‖ / ‖θ_0‖ of each expert by its name, float64, over the fingerprint blocks of every matrix both have.

    Tensors of fewer than two dimensions are left out: norms stand near 1 in every model and would hide what differs. An expert
    that shares no matrix with the base, a base of zeros, and one whose numbers are not finite are left out too: the merge tells
    those by their places. Cost: 16 reads a matrix and model.
    """
    names = [name for name, spec in base.tensors.items() if len(spec.shape) > 1 and spec.elements]
    deltas: dict[str, list[float]] = {name: [] for name in experts}
    norms: dict[str, list[float]] = {name: [] for name in experts}
    for name in names:
        spec = base.tensors[name]
        sharing = [
            each
            for each, expert in experts.items()
            if (found := expert.tensors.get(name)) is not None and found.shape == spec.shape and found.dtype in FLOATS
        ]
        if spec.dtype not in FLOATS or not sharing:
            continue
        origin = sampled(base, name).astype(np.float64)
        for each in sharing:
            with np.errstate(invalid="ignore"):
                delta = sampled(experts[each], name) - origin
                deltas[each].append(float(np.dot(delta, delta)))
                norms[each].append(float(np.dot(origin, origin)))
    squares = {each: _sum(deltas[each]) / norm for each in experts if (norm := _sum(norms[each])) > 0}
    return {each: math.sqrt(square) for each, square in squares.items() if math.isfinite(square)}


def _sum(values: Sequence[float]) -> float:
    """The exact sum; NaN where a value is not finite."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
