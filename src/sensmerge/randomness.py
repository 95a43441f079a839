"""Counter-based uniform numbers keyed by (seed, expert, tensor, element): the same draw whatever is read first, or by whom.

A draw depends on its key and on the element's place alone, so a mask does not change with the order of experts, tensors, chunks or
threads, and another expert beside changes nothing. The mixing is two rounds of xor-shift and multiplication over 32 bits (the
constants of Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31/), with a second key word between the rounds.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FIRST, SECOND, HIGH = 0x21F0AAAD, 0x735A2D97, 0x9E3779B9


def key(seed: int, expert: str, tensor: str) -> tuple[int, int]:
    """The two 32-bit words that key the draws of one expert (its `model:` string) for one output tensor."""
    digest = hashlib.sha256(json.dumps([int(seed), expert, tensor]).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniforms(seed: int, expert: str, tensor: str, start: int, count: int) -> NDArray[np.float64]:
    """The draws of elements `start` … `start + count - 1` of a tensor, float64 [count] in [0, 1), multiples of 2^-32.

    An entry survives a drop with density p where its draw is below p. Cost: a few nanoseconds an element; merges draw the same
    numbers inside their compiled loops.
    """
    import numpy as np

    low, high = key(seed, expert, tensor)
    place = np.arange(start, start + count, dtype=np.uint64)
    word = place.astype(np.uint32) + np.uint32(low)
    word ^= word >> np.uint32(16)
    word *= np.uint32(FIRST)
    word ^= word >> np.uint32(15)
    # Tensors of more than 2^32 elements: the upper half of the place goes in with the second key word.
    word ^= np.uint32(high) ^ ((place >> np.uint64(32)).astype(np.uint32) * np.uint32(HIGH))
    word *= np.uint32(SECOND)
    word ^= word >> np.uint32(15)
    return word.astype(np.float64) * 2.0**-32
