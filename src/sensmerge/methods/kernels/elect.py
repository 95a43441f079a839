"""The election of signs of TIES (Yadav et al., 2023, arXiv 2306.01708): only entries that agree with the majority count."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel import kernel


@kernel
def elect(n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, out: Any) -> None:
    """out = the sum of the f_k x_k whose sign is that of Σ f_k x_k (0 counts as +); normalised: over the sum of their w_k.

    `groups[0, 1]` is 1 for normalised. Zeros never agree; where nothing agrees the result is 0.
    """
    block = 1024
    zero, one = np.float32(0), np.float32(1)
    sign, total, shares = np.empty(block, np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    # Loops over slices with a bound of their own are what the compiler vectorises.
    for start in range(0, n, block):
        size = min(block, n - start)
        factor = np.float32(experts[0, 0])
        row = x[0, start : start + size]
        for i in range(size):
            sign[i] = row[i] * factor
        for k in range(1, x.shape[0]):
            factor = np.float32(experts[k, 0])
            row = x[k, start : start + size]
            for i in range(size):
                sign[i] += row[i] * factor
        for i in range(size):
            sign[i] = one if sign[i] >= zero else -one
        for i in range(size):
            total[i] = zero
        for i in range(size):
            shares[i] = zero
        for k in range(x.shape[0]):
            factor, weight = np.float32(experts[k, 0]), np.float32(experts[k, 1])
            row = x[k, start : start + size]
            for i in range(size):
                value = np.float32(row[i] * factor) * sign[i]
                agrees = value > zero
                total[i] += value if agrees else zero
                shares[i] += weight if agrees else zero
        result = out[start : start + size]
        if groups[0, 1] != 0.0:
            for i in range(size):
                share = shares[i]
                result[i] = total[i] * sign[i] / (share if share != zero else one)
        else:
            for i in range(size):
                result[i] = total[i] * sign[i]
