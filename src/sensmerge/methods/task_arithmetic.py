"""Task Arithmetic: θ_0 + λ Σ w_i c_i δ_i with δ_i = θ_i - θ_0 (Ilharco et al., 2023, arXiv 2212.04089)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .method import Method, Tile, weighted_sum


def combine(
    base: Tile | None, experts: Sequence[Tile], w: Sequence[float], c: Sequence[float], options: Mapping[str, object]
) -> Tile:
    """The update Σ w_i c_i δ_i, float32 [n]; with `normalize`, divided by Σ w_i (never by the coefficients)."""
    if base is None:
        raise ValueError("task arithmetic needs a base")
    update = weighted_sum([expert - base for expert in experts], [wi * ci for wi, ci in zip(w, c, strict=True)])
    if options["normalize"]:
        update /= np.float32(math.fsum(w))
    return update


METHOD = Method(
    name="task_arithmetic",
    summary="base + lambda * sum of weighted task vectors",
    citation="Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089",
    needs_base=True,
    adds=True,
    takes_sens=True,
    options={"normalize": False},
    combine=combine,
)
