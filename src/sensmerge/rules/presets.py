"""Presets: named bundles of settings. Any single key of a recipe overrides its preset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..registry import unknown_name


@dataclass(frozen=True)
class Preset:
    """Settings of the `sens:` block, and a λ used only where the recipe names none.

    `by_size` lists (parameters of the base, λ, T) for a preset that depends on the size of the model.
    """

    name: str
    summary: str
    settings: Mapping[str, object]
    lambda_: float | str | None = None
    by_size: tuple[tuple[float, float, float], ...] = ()

    def for_size(self, parameters: int) -> tuple[float, float]:
        """λ and T of the listed size nearest to `parameters` (by ratio)."""
        _, scale, temperature = min(self.by_size, key=lambda row: abs(math.log(row[0] / max(parameters, 1))))
        return scale, temperature


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("paper", "the equations as printed: softmax, T = 1, coefficients that sum to K", {}),
        Preset(
            "paper-tables",
            "what the paper's Task Arithmetic rows fit: tau * alpha normalised, coefficients that sum to 1",
            {"rule": "normalized", "total": 1.0},
        ),
        Preset(
            "calibrated",
            "normalised tau * alpha, and the lambda with the least calibration loss",
            {"rule": "normalized"},
            lambda_="auto",
        ),
        Preset(
            "l2s",
            "the authors' follow-up (arXiv 2503.20641): lambda and T by model size",
            {},
            by_size=((1.5e9, 0.4, 3.0), (7e9, 0.7, 2.0), (14e9, 0.8, 6.0)),
        ),
    )
}


def preset(name: str, *, where: str) -> Preset:
    """The preset called `name`; raises RecipeError with a suggestion if there is none."""
    if name in PRESETS:
        return PRESETS[name]
    raise unknown_name("preset", name, PRESETS, where=where)
