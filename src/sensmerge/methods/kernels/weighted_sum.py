"""Σ f_k x_k + f_0 θ_0, divided once."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel import kernel


@kernel
def weighted_sum(n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, out: Any) -> None:
    """out = (Σ experts[k, 0] · x_k + groups[0, 3] · base) / groups[0, 0], in float32, summed in processing order.

    Every factor is rounded once. A factor of zero leaves the base unread, a divisor of one divides nothing.
    """
    factor = np.float32(experts[0, 0])
    row = x[0]
    for i in range(n):
        out[i] = row[i] * factor
    for k in range(1, x.shape[0]):
        factor = np.float32(experts[k, 0])
        row = x[k]
        for i in range(n):
            out[i] += row[i] * factor
    if groups[0, 3] != 0.0:
        factor = np.float32(groups[0, 3])
        for i in range(n):
            out[i] += base[i] * factor
    if groups[0, 0] != 1.0:
        divisor = np.float32(groups[0, 0])
        for i in range(n):
            out[i] /= divisor
