"""Barycentric interpolation on a sphere of any number of models (Goddard, 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea).

Unit vectors are averaged by weight, the average is put back on the sphere, and its length is the weighted mean of the lengths. The
step in the tangent space at the average, which the method is usually described with, is zero: the tangents' weighted sum vanishes
there by construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernels.gram import gram, symmetric
from .kernels.mix import mix
from .method import Call, Method, Numbers, Steps, Sums
from .option import WEIGHT, Option


def steps(call: Call) -> Steps:
    """The lengths and angles, then one weighted sum."""
    lead = 1.0 if call.has_base else 0.0
    total = math.fsum(call.weights)
    eps = float(call.options["eps"])
    w = np.array(call.weights) / (total if call.options["normalize_weights"] and total else 1.0)

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        unused = np.zeros((call.experts, 1))
        if call.experts == 1:
            return unused, np.array([[lead, 1.0]])
        if not results:
            return unused, np.zeros((1, 1))
        products = symmetric(results[0], call.experts)[0]
        lengths = np.sqrt(np.diag(products))
        shares = w / (lengths + eps)
        length = math.sqrt(max(0.0, float(shares @ products @ shares)))
        # Vectors that cancel have no direction between them: their plain average is all that is left.
        factors = w if length < eps else shares * (float(lengths @ w) / length)
        return unused, np.array([[lead, *factors]])

    return Steps(mix, numbers, passes=(Sums(gram, call.experts**2),) if call.experts > 1 else ())


METHOD = Method(
    name="multislerp",
    summary="spherical interpolation of any number of models, or of their task vectors, by weight",
    citation="Goddard, Multi-SLERP, 2025",
    steps=steps,
    options=(
        WEIGHT,
        Option("normalize_weights", "truth", True, "divide the weights by their sum"),
        Option("eps", "number", 1e-8, "what counts as zero", low=0.0),
    ),
    base="optional",
    vectors="with_base",
)
