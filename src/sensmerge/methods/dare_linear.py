"""DARE: drop entries of each task vector at random and rescale the rest (Yu et al., 2023, arXiv 2311.03099), then Task Arithmetic.

`rescale: keep` divides by the density, as the paper does; mergekit matches the L1 norm of each tensor instead (`rescale: l1`).
"""

from __future__ import annotations

from typing import Any

from .kernels.drop import drop
from .method import Call, Method, Steps
from .option import DENSITY, INT8_MASK, SEED, WEIGHT, Option, normalize
from .task_vectors import Sparsifier, task_vector_steps

RESCALE = Option(
    "rescale",
    "choice",
    "keep",
    "keep: divide what is kept by the density; l1: keep the L1 norm; none",
    choices={"keep": "keep", True: "keep", "none": "none", False: "none", "l1": "l1"},
)


def dropped(call: Call) -> Sparsifier:
    """Keeps each entry with probability `density`."""
    density = call.numbers("density")

    def limits(ranks: Any) -> list[tuple[float, float]]:
        return [(share, 0.0) for share in density]

    factor = [1.0 / share if call.options["rescale"] == "keep" and share > 0 else 1.0 for share in density]
    return Sparsifier(drop, limits, factor=factor)


def steps(call: Call) -> Steps:
    """Drop, rescale, sum."""
    return task_vector_steps(call, dropped(call), election=False)


METHOD = Method(
    name="dare_linear",
    summary="task vectors with entries dropped at random and the rest rescaled, then summed",
    citation="Yu et al., Language Models are Super Mario (DARE), arXiv 2311.03099",
    steps=steps,
    options=(WEIGHT, DENSITY, RESCALE, SEED, normalize(False), INT8_MASK),
    adds=True,
    takes_sens=True,
    draws=True,
    check=Call.divides_by_zero,
)
