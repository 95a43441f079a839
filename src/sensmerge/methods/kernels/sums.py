"""Sums over a tensor in float64: magnitudes, squares, inner products.

Each adds into 512 lanes side by side, which the compiler vectorises without changing the order of any addition: the result is the
same on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel import kernel


@kernel
def magnitudes(
    n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, keys: Any, out: Any
) -> None:
    """out[0, k] += Σ |x_k|."""
    lanes = np.empty(512, np.float64)
    for k in range(x.shape[0]):
        for j in range(512):
            lanes[j] = 0.0
        for start in range(0, n, 512):
            row = x[k, start : min(start + 512, n)]
            for j in range(row.shape[0]):
                lanes[j] += abs(np.float64(row[j]))
        out[0, k] += lanes.sum()


@kernel
def squares(
    n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, keys: Any, out: Any
) -> None:
    """out[0, k] += Σ x_k²."""
    lanes = np.empty(512, np.float64)
    for k in range(x.shape[0]):
        for j in range(512):
            lanes[j] = 0.0
        for start in range(0, n, 512):
            row = x[k, start : min(start + 512, n)]
            for j in range(row.shape[0]):
                lanes[j] += np.float64(row[j]) * np.float64(row[j])
        out[0, k] += lanes.sum()
