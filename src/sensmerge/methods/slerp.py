"""Spherical interpolation between the base (t = 0) and one other model (t = 1), each tensor as one vector.

Shoemake, 1985, Animating rotation with quaternion curves; for weights as in mergekit: plain interpolation where the two are nearly
colinear (|cos| > 0.9995).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernels.gram import gram, include_base, symmetric
from .kernels.mix import mix
from .method import Call, Method, Numbers, Steps, Sums
from .option import REQUIRED, Option
from .spherical import slerp_factors

COLINEAR = 0.9995
SMALLEST_NORM = 1e-8

T = Option("t", "number", REQUIRED, "0 is the base, 1 the other model")


def steps(call: Call) -> Steps:
    """The angle between the two, then one weighted sum."""
    t = float(call.options["t"])
    unused = np.zeros((1, 1))

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        if not results:
            return unused, include_base(results, True)
        products = symmetric(results[0], 2)
        lengths = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
        lengths = np.where(lengths > SMALLEST_NORM, lengths, 1.0)
        cosine = products[:, 0, 1] / (lengths[:, 0] * lengths[:, 1])
        return unused, slerp_factors(t, cosine, np.abs(cosine) > COLINEAR)

    return Steps(mix, numbers, passes=(Sums(gram, 4),))


METHOD = Method(
    name="slerp",
    summary="spherical interpolation between the base and one other model",
    citation="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
    steps=steps,
    options=(T,),
    experts=(1, 1),
    vectors="never",
)
