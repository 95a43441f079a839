"""The two factors: α from sensitivities (eq. 3), τ from distances (eq. 5)."""

from __future__ import annotations

import math

import numpy as np

from .rule import Array


def task_specific(sensitivity_L: Array) -> Array:
    """α_i = s_i / ‖s_i‖₂ over the L groups (eq. 3), float64 [L]; 1/√L where every s is zero."""
    norm = math.hypot(*sensitivity_L.tolist())
    if norm == 0.0:
        return np.full(len(sensitivity_L), 1.0 / math.sqrt(len(sensitivity_L)))
    return sensitivity_L / norm


def cross_task(distances_II: Array, axis: str = "row", direction: str = "distance") -> Array:
    """τ (eq. 5), float64 [K], summing to 1, from the K×K distances g (row i: model i; column j: task j's samples).

    `axis` row: τ_i = Σ_{j≠i} g_ij, as the paper's text says; column: Σ_{j≠i} g_ji, as its formula is printed. `direction`
    distance: the expert that stands farthest gets the largest τ; similarity: (1/τ_i) / Σ 1/τ (an expert at distance zero takes
    all, several share it). 1/K for K = 1 or where all distances are zero.
    """
    experts = len(distances_II)
    away = distances_II if axis == "row" else distances_II.T
    sums = np.array([math.fsum(float(away[i, j]) for j in range(experts) if j != i) for i in range(experts)])
    if not sums.any():
        return np.full(experts, 1.0 / experts)
    if direction == "similarity":
        sums = (sums == 0.0).astype(np.float64) if (sums == 0.0).any() else 1.0 / sums
    return sums / math.fsum(sums)
