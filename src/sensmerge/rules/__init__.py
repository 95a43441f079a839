"""Coefficient rules (floor 1): how eq. 3's α and eq. 5's τ become eq. 6's σ. Each is one small file and a pure function."""

from __future__ import annotations

from ..registry import Registry
from .rule import Rule

RULES: Registry[Rule] = Registry(
    "coefficient rule",
    {
        "softmax": "sensmerge.rules.softmax:RULE",
        "normalized": "sensmerge.rules.normalized:RULE",
        "alpha_only": "sensmerge.rules.alpha_only:RULE",
        "cross_task_only": "sensmerge.rules.cross_task_only:RULE",
        "additive": "sensmerge.rules.additive:RULE",
        "uniform": "sensmerge.rules.uniform:RULE",
    },
    group="sensmerge.rules",
)

__all__ = ["RULES", "Rule"]
