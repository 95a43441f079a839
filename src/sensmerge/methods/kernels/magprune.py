"""Random dropping by rank: DELLA's MAGPRUNE (Deep et al., 2024, arXiv 2406.11617)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...randomness import FIRST, HIGH, SECOND
from ..kernel import kernel


@kernel
def magprune(n: int, first: int, columns: int, x: Any, experts: Any, groups: Any, keys: Any) -> None:
    """x_k = 0 where the draw is not below p = (density - ε) + 2 ε rank / (columns - 1); in place, tiles of whole rows.

    `experts[k, 2]` is the density, `experts[k, 3]` ε; the rank is that of |x_k| in its row, ascending, equal ones by place. With
    `groups[0, 2]` 1 what is kept is divided by its p. The ranks come from a stable radix sort of the magnitudes' bits.
    """
    order, other = np.empty(columns, np.int32), np.empty(columns, np.int32)
    counts = np.empty(2048, np.int64)
    for k in range(x.shape[0]):
        density, epsilon = experts[k, 2], experts[k, 3]
        if density >= 1.0:
            continue
        low_key, high_key = np.uint32(keys[k, 0]), np.uint32(keys[k, 1])
        for line in range(n // columns):
            row = x[k, line * columns : (line + 1) * columns]
            bits = row.view(np.uint32)
            for i in range(columns):
                order[i] = i
            for digit in range(3):
                shift = np.uint32(11 * digit)
                counts[:] = 0
                for i in range(columns):
                    counts[((bits[i] & 0x7FFFFFFF) >> shift) & 2047] += 1
                total = 0
                for value in range(2048):
                    count = counts[value]
                    counts[value] = total
                    total += count
                for i in range(columns):
                    value = ((bits[order[i]] & 0x7FFFFFFF) >> shift) & 2047
                    other[counts[value]] = order[i]
                    counts[value] += 1
                order, other = other, order
            place = first + line * columns
            for rank in range(columns):
                i = order[rank]
                probability = density
                if columns > 1:
                    probability = (density - epsilon) + 2.0 * epsilon * rank / (columns - 1)
                element = np.uint64(place + i)
                word = np.uint32(np.uint32(element) + low_key)
                word = np.uint32(word ^ (word >> np.uint32(16)))
                word = np.uint32(word * np.uint32(FIRST))
                word = np.uint32(word ^ (word >> np.uint32(15)))
                upper = np.uint32(np.uint32(element >> np.uint64(32)) * np.uint32(HIGH))
                word = np.uint32(word ^ np.uint32(high_key ^ upper))
                word = np.uint32(word * np.uint32(SECOND))
                word = np.uint32(word ^ (word >> np.uint32(15)))
                if np.float64(word) * 2.0**-32 >= probability:
                    row[i] = np.float32(0)
                elif groups[0, 2] != 0.0:
                    row[i] = np.float32(np.float64(row[i]) / probability)
