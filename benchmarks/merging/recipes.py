"""The recipes that are measured, one for each method and setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A method with its parameters. `base`: it reads the base; `experts`: how many models besides (None: all there are)."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    base: bool = True
    experts: int | None = None

    def recipe(self, experts: int) -> dict[str, Any]:
        """The recipe over `experts` experts, at most as many as the method takes."""
        models = [f"e{number}" for number in range(1, (self.experts or experts) + 1)]
        data: dict[str, Any] = {"merge_method": self.method, "models": [{"model": model} for model in models]}
        if self.base:
            data["base_model"] = "base"
        if self.method in ("task_arithmetic", "ties", "linear") or self.method.startswith(
            ("dare", "breadcrumbs", "della")
        ):
            for model in data["models"]:
                model["parameters"] = {"weight": 1.0}
        if self.parameters:
            data["parameters"] = self.parameters
        return data

    def inputs(self, experts: int) -> list[str]:
        """The model folders that are read."""
        models = [model["model"] for model in self.recipe(experts)["models"]]
        return ["base", *models] if self.base else models


SETTINGS: dict[str, Setting] = {
    "linear": Setting("linear", base=False),
    "task_arithmetic": Setting("task_arithmetic"),
    "dare_linear": Setting("dare_linear", {"density": 0.5}),
    "dare_ties": Setting("dare_ties", {"density": 0.5}),
    "slerp": Setting("slerp", {"t": 0.5}, experts=1),
    "ties, tensor": Setting("ties", {"density": 0.3}),
    "ties, global": Setting("ties", {"density": 0.3, "scope": "global"}),
    "nearswap": Setting("nearswap", {"t": 0.0002}, experts=1),
    "passthrough": Setting("passthrough", base=False, experts=1),
    "nuslerp": Setting("nuslerp", experts=2),
    "multislerp": Setting("multislerp", base=False),
    "karcher": Setting("karcher", base=False),
    "model_stock": Setting("model_stock"),
    "breadcrumbs": Setting("breadcrumbs", {"density": 0.5, "gamma": 0.01}),
    "breadcrumbs_ties": Setting("breadcrumbs_ties", {"density": 0.5, "gamma": 0.01}),
    "sce": Setting("sce", {"select_topk": 0.5}),
    "della_linear": Setting("della_linear", {"density": 0.5, "epsilon": 0.1}),
    "della": Setting("della", {"density": 0.5, "epsilon": 0.1}),
    "arcee_fusion": Setting("arcee_fusion", experts=1),
}

# The settings whose cost is promised, and how much of the floor's wall time each may take.
TARGETS = {
    "linear": 1.1,
    "task_arithmetic": 1.1,
    "dare_linear": 1.2,
    "slerp": 1.5,
    "ties, tensor": 1.7,
    "ties, global": 2.2,
}
# What mergekit can be compared on.
COMPARED = ("linear", "task_arithmetic", "slerp", "dare_linear")
