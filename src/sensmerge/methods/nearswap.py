"""NearSwap: take the other model where it is within t of the base, and move by t where it is not
(alchemonaut, 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernel import kernel
from .method import Call, Method, Numbers, Steps
from .option import REQUIRED, Option


@kernel
def swap(n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, out: Any) -> None:
    """out = f·θ_1 + (1 - f)·θ_0 with f = t / max(|θ_0 - θ_1|, 1e-6), between 0 and 1; t is groups[0, 0]."""
    t = np.float32(groups[0, 0])
    one, zero, least = np.float32(1), np.float32(0), np.float32(1e-6)
    other = x[0]
    for i in range(n):
        apart = abs(base[i] - other[i])
        share = t / (apart if apart > least else least)
        share = one if share > one else (share if share > zero else zero)
        out[i] = share * other[i] + (one - share) * base[i]


def steps(call: Call) -> Steps:
    """Element by element."""

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        return np.zeros((1, 1)), np.array([[float(call.options["t"])]])

    return Steps(swap, numbers)


METHOD = Method(
    name="nearswap",
    summary="the other model where it is within t of the base, a step of t towards it elsewhere",
    citation="alchemonaut, NearSwap, 2024",
    steps=steps,
    options=(Option("t", "number", REQUIRED, "how far two weights may be apart to be swapped"),),
    experts=(1, 1),
    vectors="never",
)
