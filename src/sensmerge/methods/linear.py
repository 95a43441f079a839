"""Weighted averaging: Σ w_i θ_i / Σ w_i (Wortsman et al., 2022, Model soups, arXiv 2203.05482).

With coefficients c_i it becomes (Σ w_i c_i θ_i + (Σ w_i - Σ w_i c_i) θ_0) / Σ w_i: each expert's share is moved towards or away
from the base, and at c_i = 1 the base drops out exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernels.weighted_sum import weighted_sum
from .method import Call, Method, Numbers, Steps
from .option import WEIGHT, normalize


def steps(call: Call) -> Steps:
    """One weighted sum."""
    factors = [w * c for w, c in zip(call.weights, call.coefficients, strict=True)]
    remainder = math.fsum([*call.weights, *(-factor for factor in factors)])
    divisor = math.fsum(call.weights) if call.options["normalize"] else 1.0
    if remainder != 0.0 and not call.has_base:
        raise ValueError("linear with coefficients needs a base")

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        return np.array([[factor] for factor in factors]), np.array([[divisor, 0.0, 0.0, remainder]])

    return Steps(weighted_sum, numbers)


METHOD = Method(
    name="linear",
    summary="weighted average of the models",
    citation="Wortsman et al., Model soups, arXiv 2203.05482",
    steps=steps,
    options=(WEIGHT, normalize(True)),
    base="member",
    vectors="never",
    takes_sens=True,
    check=Call.divides_by_zero,
)
