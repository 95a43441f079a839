"""Weighted averaging: Σ w_i θ_i / Σ w_i (Wortsman et al., 2022, Model soups, arXiv 2203.05482).

With coefficients c_i it becomes (Σ w_i c_i θ_i + (Σ w_i - Σ w_i c_i) θ_0) / Σ w_i: each expert's share is moved towards or away
from the base, and at c_i = 1 the base drops out exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .method import Method, Tile, weighted_sum


def combine(
    base: Tile | None, experts: Sequence[Tile], w: Sequence[float], c: Sequence[float], options: Mapping[str, object]
) -> Tile:
    """The merged tile, float32 [n]; without `normalize` it is not divided by Σ w_i."""
    factors = [wi * ci for wi, ci in zip(w, c, strict=True)]
    total = weighted_sum(experts, factors)
    remainder = math.fsum([*w, *(-factor for factor in factors)])
    if remainder != 0.0:
        if base is None:
            raise ValueError("linear with coefficients needs a base")
        total += base * np.float32(remainder)
    if options["normalize"]:
        total /= np.float32(math.fsum(w))
    return total


METHOD = Method(
    name="linear",
    summary="weighted average of the models",
    citation="Wortsman et al., Model soups, arXiv 2203.05482",
    needs_base=False,
    adds=False,
    takes_sens=True,
    options={"normalize": True},
    combine=combine,
)
