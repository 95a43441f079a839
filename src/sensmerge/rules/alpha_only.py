"""The ablation without eq. 5 (Table 4, task-specific): σ_i^l = softmax over i of (α_i^l / T)."""

from __future__ import annotations

from .rule import Array, Rule, softmax_over_experts


def weigh(alpha_IL: Array, tau_I: Array, temperature: float) -> Array:
    """σ, float64 [K, L], from α alone."""
    return softmax_over_experts(alpha_IL, temperature)


RULE = Rule(
    "alpha_only",
    "softmax(alpha / T): task-specific scaling alone",
    uses_temperature=True,
    needs_sensitivity=True,
    needs_distances=False,
    weigh=weigh,
)
