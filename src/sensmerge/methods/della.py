"""DELLA: drop entries at random, small ones more often, then elect signs (Deep et al., 2024, arXiv 2406.11617).

Within each row (the last dimension) the chance to stay rises with the rank of |δ| from density - ε to density + ε. `rescale: l1` is
mergekit's; `rescale: keep` divides each entry by its own chance, as the paper does.
"""

from __future__ import annotations

import math
from typing import Any

from .kernels.magprune import magprune
from .method import Call, Method, Steps
from .option import DENSITY, INT8_MASK, SEED, WEIGHT, Option, normalize
from .task_vectors import Sparsifier, task_vector_steps

EPSILON = Option(
    "epsilon", "number", 0.15, "how far the chance to stay differs from density", per_model=True, low=0.0, high=1.0
)
RESCALE = Option(
    "rescale",
    "choice",
    "l1",
    "l1: keep the L1 norm; keep: divide each entry by its chance to stay; none",
    choices={"l1": "l1", True: "l1", "keep": "keep", "none": "none", False: "none"},
)


def pruned(call: Call) -> Sparsifier:
    """Keeps each entry with a probability that follows its rank in the row."""
    pairs = list(zip(call.numbers("density"), call.numbers("epsilon"), strict=True))

    def limits(ranks: Any) -> list[tuple[float, float]]:
        # Density 0 keeps nothing, whatever epsilon says.
        return [(density, epsilon if density > 0 else 0.0) for density, epsilon in pairs]

    return Sparsifier(magprune, limits, whole_rows=True)


def check(call: Call) -> tuple[str, str] | None:
    """density ± epsilon must be probabilities."""
    for density, epsilon in zip(call.numbers("density"), call.numbers("epsilon"), strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            fitting = math.floor(900 * min(density, 1 - density)) / 1000
            why = f"density {density:g} - epsilon {epsilon:g} must be above 0, and density + epsilon below 1"
            return why, f"write `epsilon: {fitting:g}`, for these tensors or for all"
    return None


def steps(call: Call) -> Steps:
    """Drop by rank, rescale, elect, average."""
    return task_vector_steps(call, pruned(call), election=True)


METHOD = Method(
    name="della",
    summary="task vectors with entries dropped by rank and the rest rescaled, signs elected",
    citation="Deep et al., DELLA-Merging, arXiv 2406.11617",
    steps=steps,
    options=(WEIGHT, DENSITY, EPSILON, RESCALE, SEED, normalize(True), INT8_MASK),
    adds=True,
    takes_sens=True,
    draws=True,
    check=check,
)
