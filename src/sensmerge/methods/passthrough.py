"""One model as it is, optionally scaled: what layer stacking with `slices` is made of (mergekit's passthrough)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernels.mix import mix
from .method import Call, Method, Numbers, Steps
from .option import Option


def steps(call: Call) -> Steps:
    """θ · scale."""

    def numbers(results: Sequence[Any]) -> tuple[Numbers, Numbers]:
        return np.zeros((1, 1)), np.array([[0.0, call.numbers("scale")[0]]])

    return Steps(mix, numbers)


METHOD = Method(
    name="passthrough",
    summary="one model as it is, optionally scaled",
    citation="mergekit, passthrough",
    steps=steps,
    options=(Option("scale", "number", 1.0, "what every weight is multiplied by", per_model=True),),
    base="member",
    experts=(1, 1),
    vectors="never",
)
