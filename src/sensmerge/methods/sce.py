"""SCE: select the elements that vary most between the task vectors, weigh each model by their energy, erase minority signs
(Wan et al., 2024, FuseChat, arXiv 2408.07990).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernel import kernel
from .kernels.sums import squares
from .method import Call, Method, Numbers, Ranks, Steps, Sums
from .option import INT8_MASK, Option


@kernel
def variances(
    n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, keys: Any, out: Any
) -> None:
    """out[0] = the population variance of each element over the experts, formed in float64."""
    block = 512
    mean, total = np.empty(block, np.float64), np.empty(block, np.float64)
    for start in range(0, n, block):
        size = min(block, n - start)
        mean[:] = 0.0
        total[:] = 0.0
        for k in range(x.shape[0]):
            row = x[k, start : start + size]
            for i in range(size):
                mean[i] += np.float64(row[i])
        for i in range(size):
            mean[i] /= x.shape[0]
        for k in range(x.shape[0]):
            row = x[k, start : start + size]
            for i in range(size):
                apart = np.float64(row[i]) - mean[i]
                total[i] += apart * apart
        result = out[0, start : start + size]
        for i in range(size):
            result[i] = np.float32(total[i] / x.shape[0])


@kernel
def select(n: int, first: int, columns: int, x: Any, experts: Any, groups: Any, keys: Any) -> None:
    """x_k = 0 for every expert where the variance (formed as above) is below groups[0, 0]; in place."""
    block = 512
    least = np.float32(groups[0, 0])
    mean, total = np.empty(block, np.float64), np.empty(block, np.float64)
    for start in range(0, n, block):
        size = min(block, n - start)
        mean[:] = 0.0
        total[:] = 0.0
        for k in range(x.shape[0]):
            row = x[k, start : start + size]
            for i in range(size):
                mean[i] += np.float64(row[i])
        for i in range(size):
            mean[i] /= x.shape[0]
        for k in range(x.shape[0]):
            row = x[k, start : start + size]
            for i in range(size):
                apart = np.float64(row[i]) - mean[i]
                total[i] += apart * apart
        for k in range(x.shape[0]):
            row = x[k, start : start + size]
            for i in range(size):
                row[i] = row[i] if np.float32(total[i] / x.shape[0]) >= least else np.float32(0)


@kernel
def erase(n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, out: Any) -> None:
    """out = θ_0 + the mean, weighted by experts[k, 0], of the entries whose sign is that of their plain sum (0 counts as +)."""
    zero = np.float32(0)
    for i in range(n):
        majority = zero
        for k in range(x.shape[0]):
            majority += x[k, i]
        total, share = zero, zero
        for k in range(x.shape[0]):
            value = x[k, i]
            if (value > zero and majority >= zero) or (value < zero and majority < zero):
                weight = np.float32(experts[k, 0])
                total += weight * value
                share += weight
        out[i] = base[i] + (total / share if share != zero else zero)


def steps(call: Call) -> Steps:
    """Select by variance, weigh by energy, erase, average."""
    topk = float(call.options["select_topk"])
    selects = topk < 1.0

    def places(elements: int, zeros: Sequence[int]) -> list[list[int]]:
        return [[elements - int((elements - zeros[0]) * topk)]]

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        found = list(results)
        least = float(found.pop(0)[0][0]) if selects and found else 0.0
        experts = np.zeros((call.experts, 1))
        if found:
            energy = found[0][0]
            total = float(energy.sum())
            experts[:, 0] = energy / total if total else 1.0 / call.experts
        return experts, np.array([[least]])

    ranks = Ranks(places, 1, measure=variances)
    passes: tuple[Sums | Ranks, ...] = (Sums(squares, call.experts, sparsified=selects),)
    return Steps(erase, numbers, passes=(ranks, *passes) if selects else passes, sparsify=select if selects else None)


METHOD = Method(
    name="sce",
    summary="elements that vary most, models weighted by their energy, minority signs erased",
    citation="Wan et al., FuseChat, arXiv 2408.07990",
    steps=steps,
    options=(
        Option(
            "select_topk", "number", 1.0, "share of the elements kept, by variance over the models", low=0.0, high=1.0
        ),
        INT8_MASK,
    ),
)
