"""The paper's rule, eq. 6: σ_i^l = softmax over i of (τ_i α_i^l / T)."""

from __future__ import annotations

from .rule import Array, Rule, softmax_over_experts


def weigh(alpha_IL: Array, tau_I: Array, temperature: float) -> Array:
    """σ, float64 [K, L]; T > 0, T → 0 gives all to the largest τα, T → ∞ is uniform."""
    return softmax_over_experts(tau_I[:, None] * alpha_IL, temperature)


RULE = Rule(
    "softmax",
    "softmax(tau * alpha / T): the paper, eq. 6",
    uses_temperature=True,
    needs_sensitivity=True,
    needs_distances=True,
    weigh=weigh,
)
