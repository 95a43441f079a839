"""Distances between the logits of two models (floor 1): eq. 4 and its variants. Each is one small file and a pure function.

A distance is `distance(model_TV, expert_TV) -> [T]`: float logits of the model and of the task's own expert at T positions over V
tokens, to one float64 number a position, in the units its file names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Distance = Callable[["Tensor", "Tensor"], "Tensor"]

DISTANCES: Registry[Distance] = Registry(
    "distance",
    {name: f"sensmerge.distances.{name}:{name}" for name in ("l2", "kl", "js", "cosine")},
    group="sensmerge.distances",
)

__all__ = ["DISTANCES", "Distance"]
