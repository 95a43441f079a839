"""f_0 · base + Σ f_k x_k, with factors for the whole tensor, for each row or for each column: `groups` float64 [G, K + 1]."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel import kernel


@kernel
def mix(n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, out: Any) -> None:
    """out = groups[0, 0] · base + Σ groups[0, 1 + k] · x_k; a factor of zero for the base leaves it unread."""
    if groups[0, 0] == 0.0:
        for i in range(n):
            out[i] = np.float32(0)
    else:
        factor = np.float32(groups[0, 0])
        for i in range(n):
            out[i] = base[i] * factor
    for k in range(x.shape[0]):
        factor = np.float32(groups[0, 1 + k])
        row = x[k]
        for i in range(n):
            out[i] += row[i] * factor


@kernel
def mix_rows(n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, out: Any) -> None:
    """The same with the factors of each row; tiles are made of whole rows."""
    for line in range(n // columns):
        start, stop = line * columns, (line + 1) * columns
        group = groups[first // columns + line]
        result = out[start:stop]
        factor = np.float32(group[0])
        if factor == 0:
            for i in range(columns):
                result[i] = np.float32(0)
        else:
            below = base[start:stop]
            for i in range(columns):
                result[i] = below[i] * factor
        for k in range(x.shape[0]):
            factor = np.float32(group[1 + k])
            row = x[k, start:stop]
            for i in range(columns):
                result[i] += row[i] * factor


@kernel
def mix_columns(n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, out: Any) -> None:
    """The same with the factors of each column: `columns` groups, element e of the tensor in group e mod `columns`."""
    for i in range(n):
        group = groups[(first + i) % columns]
        total = np.float32(0)
        if group[0] != 0.0:
            total = base[i] * np.float32(group[0])
        for k in range(x.shape[0]):
            total += x[k, i] * np.float32(group[1 + k])
        out[i] = total
