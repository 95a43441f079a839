"""What all methods of the task-vector family share: sparsify each task vector, then sum, or elect signs and sum what agrees.

Sens coefficients multiply a task vector after it was sparsified and before any election; a normalising method divides by the
recipe's own weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .kernel import Kernel
from .kernels.elect import elect
from .kernels.sums import magnitudes
from .kernels.weighted_sum import weighted_sum
from .method import Call, Numbers, Ranks, Steps, Sums


@dataclass(frozen=True)
class Sparsifier:
    """How each task vector is thinned out.

    `limits(ranks)` gives each expert's two numbers for the kernel, from the result of `ranks` where there is such a pass.
    `factor` is what the kept entries of each expert are multiplied by.
    """

    kernel: Kernel
    limits: Callable[[Any], Sequence[tuple[float, float]]]
    ranks: Ranks | None = None
    whole_rows: bool = False
    factor: Sequence[float] | None = None


def task_vector_steps(call: Call, sparsifier: Sparsifier | None = None, *, election: bool) -> Steps:
    """The steps of one tensor: θ_0 + λ · (Σ w c t, with or without an election, normalised or not), t the sparsified δ."""
    ranks = sparsifier.ranks if sparsifier is not None else None
    l1 = sparsifier is not None and call.options.get("rescale") == "l1"
    passes: list[Sums | Ranks] = [] if ranks is None else [ranks]
    if l1:
        passes += [Sums(magnitudes, call.experts), Sums(magnitudes, call.experts, sparsified=True)]
    normalised = bool(call.options["normalize"])

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        found = list(results)
        selected = found.pop(0) if ranks is not None and found else None
        experts = np.zeros((call.experts, 4))
        scales = [1.0] * call.experts if sparsifier is None or sparsifier.factor is None else list(sparsifier.factor)
        if len(found) == 2:
            scales = [
                scale * float(before) / float(after) if after else scale
                for scale, before, after in zip(scales, found[0][0], found[1][0], strict=True)
            ]
        for k, (w, c, scale) in enumerate(zip(call.weights, call.coefficients, scales, strict=True)):
            experts[k, :2] = w * c * scale, w
        if sparsifier is not None and (ranks is None or selected is not None):
            experts[:, 2:] = sparsifier.limits(selected)
        divisor = math.fsum(call.weights) if normalised and not election else 1.0
        keep = 1.0 if call.options.get("rescale") == "keep" else 0.0
        return experts, np.array([[divisor, 1.0 if normalised else 0.0, keep, 0.0]])

    return Steps(
        combine=elect if election else weighted_sum,
        numbers=numbers,
        passes=tuple(passes),
        sparsify=None if sparsifier is None else sparsifier.kernel,
        whole_rows=sparsifier is not None and sparsifier.whole_rows,
    )
