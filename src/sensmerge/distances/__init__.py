"""Distances between the logits of two models (floor 1): eq. 4 and its variants. Each is one small file of pure functions."""

from __future__ import annotations

from ..registry import Registry
from .distance import Distance

DISTANCES: Registry[Distance] = Registry(
    "distance",
    {name: f"sensmerge.distances.{name}:{name}" for name in ("l2", "kl", "js", "cosine")},
    group="sensmerge.distances",
)

__all__ = ["DISTANCES", "Distance"]
