"""What a coefficient rule is, and the softmax that several of them share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """A rule: `weigh(alpha_IL, tau_I, temperature) -> sigma_IL`, all float64; every column of σ sums to 1.

    Each column of the result depends on the same column of α alone, so that a group outside the blocks can be weighed by the
    same rule. `uses_temperature` says whether T changes anything, `needs_sensitivity` and `needs_distances` whether α and τ do.
    """

    name: str
    summary: str
    uses_temperature: bool
    needs_sensitivity: bool
    needs_distances: bool
    weigh: Callable[[Array, Array, float], Array]


def sum_over_experts(values_IL: Array) -> Array:
    """Σ_i of each column, float64 [L], exact before one rounding: the order of the experts cannot change a bit."""
    return np.array([math.fsum(column) for column in values_IL.T.tolist()])


def share_of_experts(values_IL: Array) -> Array:
    """Each entry over its column's sum, float64 [K, L]; 1/K in a column that sums to zero."""
    sums_L = sum_over_experts(values_IL)
    shares_IL = values_IL / np.where(sums_L > 0, sums_L, 1.0)
    shares_IL[:, sums_L == 0] = 1.0 / len(values_IL)
    return shares_IL


def softmax_over_experts(scores_IL: Array, temperature: float) -> Array:
    """softmax over the experts (axis 0) of scores/T, float64 [K, L].

    Shifted by the maximum before the division, so that no temperature, however small, makes it overflow.
    """
    with np.errstate(over="ignore"):
        shifted_IL = (scores_IL - scores_IL.max(axis=0, keepdims=True)) / temperature
    # math.exp, not np.exp: a vectorised exp may round one value differently at another place in the array.
    return share_of_experts(np.array([[math.exp(score) for score in row] for row in shifted_IL.tolist()]))
