"""The ratio σ_i^l = τ_i α_i^l / Σ_i τ_i α_i^l.

It equals softmax(log(τα)) at T = 1: no temperature, and no dependence on how many layers α was normalised over."""

from __future__ import annotations

from .rule import Array, Rule, share_of_experts


def weigh(alpha_IL: Array, tau_I: Array, temperature: float) -> Array:
    """σ, float64 [K, L]; 1/K where every product is zero."""
    return share_of_experts(tau_I[:, None] * alpha_IL)


RULE = Rule(
    "normalized",
    "tau * alpha / sum: no temperature",
    uses_temperature=False,
    needs_sensitivity=True,
    needs_distances=True,
    weigh=weigh,
)
