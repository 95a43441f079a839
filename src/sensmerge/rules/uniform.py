"""No preference: σ_i^l = 1/K. With total K this is the plain merge, bit for bit."""

from __future__ import annotations

import numpy as np

from .rule import Array, Rule


def weigh(alpha_IL: Array, tau_I: Array, temperature: float) -> Array:
    """σ = 1/K, float64 [K, L]."""
    return np.full_like(alpha_IL, 1.0 / len(tau_I))


RULE = Rule(
    "uniform",
    "1/K: the plain merge",
    uses_temperature=False,
    needs_sensitivity=False,
    needs_distances=False,
    weigh=weigh,
)
