"""What a merge method is: a pure function over one tile of elements, and the facts a plan needs to know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tile = NDArray[np.float32]

Combine = Callable[[Tile | None, Sequence[Tile], Sequence[float], Sequence[float], Mapping[str, object]], Tile]


@dataclass(frozen=True)
class Method:
    """A merge method: `combine(base, experts, w, c, options)` merges one tile.

    `base` is float32 [n] (None where the recipe has no base and the method needs none), `experts` K arrays float32 [n], `w` the
    recipe's K weights, `c` the K data-driven coefficients (all exactly 1.0 in a plain merge), `options` the method's own
    parameters. Where `adds` is true the result is the *update*, to be scaled by λ and added to the base; otherwise it is the
    merged tile itself, and the method has no λ. Pure: the inputs are not changed, and every element of the result depends on
    the same element of the inputs alone, so tiles may have any size and come in any order. Cost: K multiply-adds an element.
    """

    name: str
    summary: str
    citation: str
    needs_base: bool
    adds: bool
    takes_sens: bool
    options: Mapping[str, object]
    combine: Combine


def weighted_sum(tiles: Sequence[Tile], factors: Sequence[float]) -> Tile:
    """Σ factor_i · tile_i in float32, each factor rounded once to float32, summed in the order given."""
    total = tiles[0] * np.float32(factors[0])
    for tile, factor in zip(tiles[1:], factors[1:], strict=True):
        total += tile * np.float32(factor)
    return total
