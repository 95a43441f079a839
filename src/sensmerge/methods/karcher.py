"""The Karcher mean: the point on the sphere nearest to all models by squared angle (arXiv 2603.04972), at their mean length.

The iteration runs on coefficients over the unit vectors, with all inner products from one Gram matrix: a K x K problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernels.gram import gram, symmetric
from .kernels.mix import mix
from .method import Call, Method, Numbers, Steps, Sums
from .option import Option


def karcher_coefficients(products: Numbers, iterations: int, tolerance: float) -> Numbers:
    """Coefficients [K] over unit vectors with inner products `products` [K, K], float64, of the unit Karcher mean.

    Starts at the normalised average (or the first vector, where that vanishes) and stops when a step is below `tolerance`.
    """
    count = len(products)
    share = 1.0 / count

    def length(coefficients: Numbers) -> float:
        return math.sqrt(max(0.0, float(coefficients @ products @ coefficients)))

    mean = np.full(count, share)
    mean = np.eye(count)[0] if length(mean) < tolerance else mean / length(mean)
    for _ in range(iterations):
        tangent = np.zeros(count)
        for vector, cosine in enumerate(np.clip(products @ mean, -1.0, 1.0)):
            angle = math.acos(cosine)
            # Towards the mean itself there is nothing to add; away from its opposite there is no one direction.
            if tolerance <= angle <= math.pi - tolerance:
                tangent += share * angle / math.sin(angle) * (np.eye(count)[vector] - cosine * mean)
        step = length(tangent)
        if step < tolerance:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / length(mean)
    return mean


def steps(call: Call) -> Steps:
    """The lengths and angles, the iteration, then one weighted sum."""

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        unused = np.zeros((call.experts, 1))
        if call.experts == 1:
            return unused, np.array([[0.0, 1.0]])
        if not results:
            return unused, np.zeros((1, 1))
        products = symmetric(results[0], call.experts)[0]
        lengths = np.sqrt(np.diag(products))
        tolerance = float(call.options["tol"])
        real = np.flatnonzero(lengths > tolerance)
        factors = np.zeros(call.experts)
        if len(real):
            units = products[np.ix_(real, real)] / np.outer(lengths[real], lengths[real])
            mean = karcher_coefficients(units, int(call.options["max_iter"]), tolerance)
            factors[real] = float(lengths.mean()) * mean / lengths[real]
        return unused, np.array([[0.0, *factors]])

    return Steps(mix, numbers, passes=(Sums(gram, call.experts**2),) if call.experts > 1 else ())


METHOD = Method(
    name="karcher",
    summary="Karcher mean of all models on the sphere, at their mean length",
    citation="Karcher mean of weights, arXiv 2603.04972",
    steps=steps,
    options=(
        Option("max_iter", "whole", 10, "most steps of the iteration", low=0),
        Option("tol", "number", 1e-5, "where it stops, and what counts as zero", low=0.0),
    ),
    base="joins",
    vectors="never",
)
