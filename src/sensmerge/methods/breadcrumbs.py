"""Model Breadcrumbs: drop the smallest and the largest entries of each task vector (Davari & Belilovsky, 2023, arXiv 2312.06795).

Of n entries the int(gamma · n) largest go, then the smallest, until int(density · n) remain. Where density leaves less room than
gamma asks for, fewer of the largest go. Entries equal to either end of the band are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .kernels.band import keep_band
from .method import Call, Method, Ranks, Steps
from .option import DENSITY, INT8_MASK, RESCALE_L1, WEIGHT, Option, normalize
from .task_vectors import Sparsifier, task_vector_steps

GAMMA = Option(
    "gamma", "number", 0.01, "share of each task vector cut off as its largest", per_model=True, low=0.0, high=1.0
)


def band(call: Call) -> Sparsifier:
    """Keeps |δ| between two exact order statistics."""
    density, gamma = call.numbers("density"), call.numbers("gamma")

    def places(elements: int, zeros: Sequence[int]) -> list[list[int]]:
        found = []
        for share, cut in zip(density, gamma, strict=True):
            target = int(share * elements)
            bottom = max(0, elements - target - int(cut * elements))
            # One past the largest holds infinity: a band that begins there is empty.
            found.append([bottom, bottom + target - 1] if target else [elements, elements])
        return found

    def limits(ranks: Any) -> list[tuple[float, float]]:
        return [
            (0.0, math.inf) if ranks is None else (float(ranks[k][0]), float(ranks[k][1])) for k in range(call.experts)
        ]

    ranks = Ranks(places, call.experts) if any(share < 1 for share in density) else None
    return Sparsifier(keep_band, limits, ranks)


def steps(call: Call) -> Steps:
    """Cut both tails, sum."""
    return task_vector_steps(call, band(call), election=False)


METHOD = Method(
    name="breadcrumbs",
    summary="task vectors without their smallest and largest entries, summed",
    citation="Davari & Belilovsky, Model Breadcrumbs, arXiv 2312.06795",
    steps=steps,
    options=(WEIGHT, DENSITY, GAMMA, normalize(False), RESCALE_L1, INT8_MASK),
    adds=True,
    takes_sens=True,
    check=Call.divides_by_zero,
)
