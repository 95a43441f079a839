"""Both factors added instead of multiplied: σ_i^l = softmax over i of ((α_i^l / Σ_i α_i^l + τ_i) / 2T)."""

from __future__ import annotations

from .rule import Array, Rule, share_of_experts, softmax_over_experts


def weigh(alpha_IL: Array, tau_I: Array, temperature: float) -> Array:
    """σ, float64 [K, L]; an expert's share of α is 1/K where every α is zero."""
    return softmax_over_experts((share_of_experts(alpha_IL) + tau_I[:, None]) / 2.0, temperature)


RULE = Rule(
    "additive",
    "softmax((share of alpha + tau) / 2T)",
    uses_temperature=True,
    needs_sensitivity=True,
    needs_distances=True,
    weigh=weigh,
)
