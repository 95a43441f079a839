"""Merge methods (floor 1): each one small file with pure functions and its citation.

A method knows nothing of Sens-Merging: coefficients reach it as plain numbers. Adding one is adding its file and its line here.
"""

from __future__ import annotations

from ..registry import Registry
from .method import Method

NAMES = (
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
)

METHODS: Registry[Method] = Registry(
    "merge method", {name: f"sensmerge.methods.{name}:METHOD" for name in NAMES}, group="sensmerge.methods"
)

__all__ = ["METHODS", "Method"]
