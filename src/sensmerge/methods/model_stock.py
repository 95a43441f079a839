"""Model Stock: the angle between task vectors tells how far to go from the base to their average (arXiv 2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernels.gram import gram, gram_of_rows, symmetric
from .kernels.mix import mix, mix_rows
from .method import Call, Method, Numbers, Steps, Sums
from .option import Option


def ratios(products: Numbers) -> Numbers:
    """The interpolation ratio of each group, float64 [G], from Gram matrices [G, K, K]: K cos θ / (1 + (K - 1) cos θ).

    cos θ is the mean over all pairs of task vectors; 0 where one is zero. At the pole of the formula the base is kept.
    """
    count = products.shape[1]
    lengths = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
    outer = lengths[:, :, None] * lengths[:, None, :]
    cosines = np.divide(products, outer, out=np.zeros_like(products), where=outer > 0)
    first, second = np.triu_indices(count, 1)
    cosine = np.clip(cosines[:, first, second], -1.0, 1.0).mean(axis=1)
    below = 1.0 + (count - 1) * cosine
    pole = np.abs(below) < 1e-6
    found: Numbers = np.where(pole, 0.0, count * cosine / np.where(pole, 1.0, below))
    return found


def steps(call: Call) -> Steps:
    """The angles, of the tensor or of each row, then one weighted sum."""

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        unused = np.zeros((call.experts, 1))
        if not results:
            return unused, np.zeros((1, 1))
        share = ratios(symmetric(results[0], call.experts)) / call.experts
        return unused, np.column_stack([np.ones_like(share), *[share] * call.experts])

    width = call.experts**2
    if call.options["filter_wise"]:
        return Steps(mix_rows, numbers, passes=(Sums(gram_of_rows, width, by="row"),), whole_rows=True)
    return Steps(mix, numbers, passes=(Sums(gram, width),))


METHOD = Method(
    name="model_stock",
    summary="from the base towards the average, as far as the angle between the task vectors says",
    citation="Jang et al., Model Stock, arXiv 2403.19522",
    steps=steps,
    options=(Option("filter_wise", "truth", False, "an angle for each row instead of each tensor"),),
    experts=(2, None),
)
