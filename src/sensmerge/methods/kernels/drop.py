"""Random dropping of entries, keyed by place (DARE; Yu et al., 2023, arXiv 2311.03099)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...randomness import FIRST, HIGH, SECOND
from ..kernel import kernel


@kernel
def drop(n: int, first: int, columns: int, x: Any, experts: Any, groups: Any, keys: Any) -> None:
    """x_k = 0 where the draw of sensmerge.randomness is not below experts[k, 2]; in place.

    The draws are made in whole 32-bit words: `word · 2^-32 < density` exactly where `word < ⌈density · 2^32⌉`.
    """
    for k in range(x.shape[0]):
        density = experts[k, 2]
        row = x[k]
        # No draw is above 1 - 2^-32; and 2^32 itself has no uint32 (what the cast gives differs between processors).
        words = np.ceil(density * 4294967296.0)
        if words >= 4294967296.0:
            continue
        limit = np.uint32(words)
        low_key, high_key = np.uint32(keys[k, 0]), np.uint32(keys[k, 1])
        start = 0
        while start < n:
            # The upper half of a place is one for all elements up to the next multiple of 2^32.
            upper = np.uint32((first + start) >> 32)
            part = row[start : min(n, ((np.int64(upper) + 1) << 32) - first)]
            offset = np.uint32(np.uint32(first + start) + low_key)
            second_key = np.uint32(high_key ^ np.uint32(upper * np.uint32(HIGH)))
            for i in range(part.shape[0]):
                word = np.uint32(np.uint32(i) + offset)
                word = np.uint32(word ^ (word >> np.uint32(16)))
                word = np.uint32(word * np.uint32(FIRST))
                word = np.uint32(word ^ (word >> np.uint32(15)))
                word = np.uint32(word ^ second_key)
                word = np.uint32(word * np.uint32(SECOND))
                word = np.uint32(word ^ (word >> np.uint32(15)))
                part[i] = part[i] if word < limit else np.float32(0)
            start += part.shape[0]
