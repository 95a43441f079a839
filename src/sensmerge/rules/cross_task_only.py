"""The ablation without eq. 3 (Table 4, cross-task): σ_i = softmax over i of (τ_i / T), the same in every layer."""

from __future__ import annotations

import numpy as np

from .rule import Array, Rule, softmax_over_experts


def weigh(alpha_IL: Array, tau_I: Array, temperature: float) -> Array:
    """σ, float64 [K, L], from τ alone."""
    return softmax_over_experts(np.broadcast_to(tau_I[:, None], alpha_IL.shape), temperature)


RULE = Rule(
    "cross_task_only",
    "softmax(tau / T): cross-task scaling alone",
    uses_temperature=True,
    needs_sensitivity=False,
    needs_distances=True,
    weigh=weigh,
)
