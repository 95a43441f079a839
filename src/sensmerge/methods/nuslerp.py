"""SLERP of two models by weight, of their task vectors where there is a base (mergekit's nuslerp).

The vectors are whole tensors (`nuslerp_flatten`), else the rows along the last dimension, else (`nuslerp_row_wise`) the columns
along the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernels.gram import gram, gram_of_columns, gram_of_rows, symmetric
from .kernels.mix import mix, mix_columns, mix_rows
from .method import Call, Method, Numbers, Steps, Sums
from .option import WEIGHT, Option
from .spherical import slerp_factors

SMALLEST_NORM = 1e-7
# 1 - cos² below this is colinear.
COLINEAR = 1e-16


def _share(weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    return 0.5 if abs(total) < 1e-6 else weights[1] / total


def steps(call: Call) -> Steps:
    """The angles between the two, then one weighted sum with factors for the tensor, each row or each column."""
    t = _share(call.weights)
    lead = 1.0 if call.has_base else 0.0

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        if not results:
            return np.zeros((2, 1)), np.zeros((1, 1))
        products = symmetric(results[0], 2)
        lengths = np.maximum(np.sqrt(np.diagonal(products, axis1=1, axis2=2)), SMALLEST_NORM)
        cosine = np.clip(products[:, 0, 1] / (lengths[:, 0] * lengths[:, 1]), -1.0, 1.0)
        factors = slerp_factors(t, cosine, 1.0 - cosine**2 <= COLINEAR)
        return np.zeros((2, 1)), np.column_stack([np.full(len(factors), lead), factors])

    if call.options["nuslerp_flatten"] or not call.shape:
        return Steps(mix, numbers, passes=(Sums(gram, 4),))
    if call.options["nuslerp_row_wise"] and len(call.shape) > 1:
        columns = call.elements // call.shape[0]
        return Steps(mix_columns, numbers, passes=(Sums(gram_of_columns, 4, by="column"),), columns=columns)
    return Steps(mix_rows, numbers, passes=(Sums(gram_of_rows, 4, by="row"),), whole_rows=True)


METHOD = Method(
    name="nuslerp",
    summary="spherical interpolation of two models, or of their task vectors, by weight",
    citation="mergekit, nuslerp; Shoemake, SIGGRAPH 1985",
    steps=steps,
    options=(
        WEIGHT,
        Option("nuslerp_flatten", "truth", True, "each tensor is one vector"),
        Option("nuslerp_row_wise", "truth", False, "without flatten: vectors along the first dimension, not the last"),
    ),
    base="optional",
    experts=(2, 2),
    vectors="with_base",
)
