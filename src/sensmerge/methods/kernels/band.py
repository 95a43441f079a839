"""Keeping the entries whose magnitude lies in a band: the trimming of TIES and of Model Breadcrumbs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel import kernel


@kernel
def keep_band(n: int, first: int, columns: int, x: Any, experts: Any, groups: Any, keys: Any) -> None:
    """x_k = 0 where not experts[k, 2] <= |x_k| <= experts[k, 3]; in place. Ties with either end are kept."""
    for k in range(x.shape[0]):
        low, high = np.float32(experts[k, 2]), np.float32(experts[k, 3])
        row = x[k]
        for i in range(n):
            value = row[i]
            size = abs(value)
            row[i] = value if (size >= low) & (size <= high) else np.float32(0)
