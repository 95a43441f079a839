"""Arcee Fusion: take the expert's weight where it matters most, keep the base elsewhere (Arcee AI, mergekit's arcee_fusion).

How much an element matters is its distance from the base times the divergence KL(p‖q) of its row, with p and q the softmax of the
expert's and the base's row. It is taken where that is at least median + 1.5 (q3 - q1) over the tensor. The quartiles are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernel import kernel
from .method import Call, Method, Numbers, Ranks, Steps, Sums


@kernel
def divergences(
    n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, keys: Any, out: Any
) -> None:
    """out[r, 0] = Σ p log(p / q) over row r, float64, p and q the softmax of its expert and base rows plus 1e-8."""
    for line in range(n // columns):
        start, stop = line * columns, (line + 1) * columns
        ours, theirs = x[0, start:stop], base[start:stop]
        top_p, top_q = np.float64(ours.max()), np.float64(theirs.max())
        sum_p, sum_q = 0.0, 0.0
        for i in range(columns):
            sum_p += np.exp(np.float64(ours[i]) - top_p)
            sum_q += np.exp(np.float64(theirs[i]) - top_q)
        total = 0.0
        for i in range(columns):
            p = np.exp(np.float64(ours[i]) - top_p) / sum_p + 1e-8
            q = np.exp(np.float64(theirs[i]) - top_q) / sum_q + 1e-8
            total += p * np.log(p / q)
        out[first // columns + line, 0] = total


@kernel
def importances(
    n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, keys: Any, out: Any
) -> None:
    """out[0] = |θ_1 - θ_0| times groups[row, 0]; never negative."""
    for i in range(n):
        divergence = max(groups[(first + i) // columns, 0], 0.0)
        out[0, i] = np.float32(abs(np.float64(x[0, i]) - np.float64(base[i])) * divergence)


@kernel
def fuse(n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, out: Any) -> None:
    """out = θ_1 where the importance is at least groups[0, 1], else θ_0."""
    least = groups[0, 1]
    for i in range(n):
        divergence = max(groups[(first + i) // columns, 0], 0.0)
        importance = np.float32(abs(np.float64(x[0, i]) - np.float64(base[i])) * divergence)
        out[i] = x[0, i] if np.float64(importance) >= least else base[i]


def steps(call: Call) -> Steps:
    """A divergence for each row, three quartiles for the tensor, then element by element."""

    def places(elements: int, zeros: Sequence[int]) -> list[list[int]]:
        return [[math.floor(quarter * (elements - 1)) for quarter in (0.25, 0.5, 0.75)]]

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        unused = np.zeros((1, 1))
        if not results:
            return unused, np.zeros((1, 2))
        groups = np.zeros((len(results[0]), 2))
        groups[:, 0] = results[0][:, 0]
        if len(results) == 2:
            low, median, high = (float(value) for value in results[1][0])
            groups[:, 1] = median + 1.5 * (high - low)
        return unused, groups

    passes = (Sums(divergences, 1, by="row"), Ranks(places, 1, measure=importances))
    return Steps(fuse, numbers, passes=passes, whole_rows=True)


METHOD = Method(
    name="arcee_fusion",
    summary="the expert's weights where they matter most, the base's elsewhere",
    citation="Arcee AI, Arcee Fusion, mergekit",
    steps=steps,
    experts=(1, 1),
    vectors="never",
)
