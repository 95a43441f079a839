"""TIES-Merging: trim each task vector to its largest entries, elect signs, average what agrees (Yadav et al., arXiv 2306.01708).

Every entry at least as large as the k-th largest is kept, k = int(density · n), ties included, so that no order decides.
`scope: global` takes n and the k-th largest over the whole model, as the paper's own code does; `scope: tensor` is mergekit's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .kernels.band import keep_band
from .method import Call, Method, Ranks, Steps
from .option import DENSITY, INT8_MASK, RESCALE_L1, WEIGHT, Option, normalize
from .task_vectors import Sparsifier, task_vector_steps


def trimmed(call: Call) -> Sparsifier:
    """Keeps |δ| from the exact threshold up."""
    density = call.numbers("density")

    def places(elements: int, zeros: Sequence[int]) -> list[list[int]]:
        return [[elements - kept(elements, share)] for share in density]

    def limits(ranks: Any) -> list[tuple[float, float]]:
        return [(0.0 if ranks is None else float(ranks[k][0]), math.inf) for k in range(call.experts)]

    everywhere = call.options["scope"] == "global"
    ranks = Ranks(places, call.experts, everywhere=everywhere) if any(share < 1 for share in density) else None
    return Sparsifier(keep_band, limits, ranks)


def kept(elements: int, density: float) -> int:
    """k: how many of a tensor's entries are kept; at least one unless the density is 0."""
    return max(1, int(density * elements)) if density > 0 else 0


def steps(call: Call) -> Steps:
    """Trim, elect, average."""
    return task_vector_steps(call, trimmed(call), election=True)


SCOPE = Option(
    "scope",
    "choice",
    "tensor",
    "whether the threshold is one for each tensor or one for the whole model",
    choices={"tensor": "tensor", "global": "global"},
)

METHOD = Method(
    name="ties",
    summary="task vectors trimmed to their largest entries, signs elected, agreeing entries averaged",
    citation="Yadav et al., TIES-Merging, arXiv 2306.01708",
    steps=steps,
    options=(WEIGHT, DENSITY, SCOPE, normalize(True), RESCALE_L1, INT8_MASK),
    adds=True,
    takes_sens=True,
)
