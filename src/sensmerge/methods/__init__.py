"""Merge methods (floor 1): each one small file with a pure function and its citation.

A method knows nothing of Sens-Merging: coefficients reach it as plain numbers.
"""

from __future__ import annotations

from ..registry import Registry
from .method import Method

METHODS: Registry[Method] = Registry(
    "merge method",
    {
        "linear": "sensmerge.methods.linear:METHOD",
        "task_arithmetic": "sensmerge.methods.task_arithmetic:METHOD",
    },
    group="sensmerge.methods",
)

__all__ = ["METHODS", "Method"]
