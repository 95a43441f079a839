"""The pipeline (floor 6), the only orchestrator: calibrate -> coefficients -> tune -> plan -> merge -> describe -> commit.

Each public function takes a Recipe from `load_recipe`, and keeps what it measures as files that the next call finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..records import Alignment, Coefficients, Recipe, SensitivityProfile, SensSettings
from ..registry import unknown_name
from ..rules.compute import compute
from ..rules.presets import preset
from ..sens_block import checked_setting, settings_of
from .calibrating import Calibration, profiles_folder
from .enough import GROWTH, calibrated
from .merging import MergeResult, merge, versions
from .models import expert_names, open_models
from .outlook import Outlook, outlook
from .planning import check_before, dry_run
from .weighing import coefficients_of, measurements, needs_calibration, sized

# The keys of `sens:` that turn measurements into coefficients; the others decide what is measured.
ARITHMETIC = ("preset", "rule", "temperature", "total", "axis", "direction", "other")


def calibrate(
    recipe: Recipe,
    *,
    profiles_dir: str | Path | None = None,
    device: str = "auto",
    memory: str = "auto",
    growth: float = GROWTH,
    allow_pickle: bool = False,
) -> tuple[list[SensitivityProfile], Alignment | None]:
    """Measure every expert of `recipe` (eq. 1-4), or read what was measured before from `profiles_dir` (`<recipe>.sens/`).

    `memory` is how models are held: auto, resident or streamed. Returns the profiles in recipe order and the distances between the
    experts. Where the recipe says `until`, each round draws `growth` times as many samples. Raises RecipeError without a `sens:`
    block, CalibrationDataError before any model is loaded, NonFiniteError.
    """
    settings_of(recipe)
    folder = profiles_folder(recipe) if profiles_dir is None else Path(profiles_dir)
    with open_models(recipe, allow_pickle=allow_pickle) as models:
        calibration = calibrated(recipe, models, folder, device, memory, growth=growth)
    return list(calibration.profiles), calibration.alignment


def coefficients(
    profiles: Sequence[SensitivityProfile],
    alignment: Alignment | None,
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = 1.0,
    **settings: Any,
) -> Coefficients:
    """Coefficients from measurements (eq. 5-7), pure and instant; `settings` are those keys of `sens:` that are arithmetic.

    These are preset, rule, temperature, total, axis, direction and other; what is not named is as in `preset: paper`.

    `weights` are the recipe's w_i (1 if not given), `scale` its λ. Raises RecipeError for an unknown key or value.
    """
    for key in settings:
        if key not in ARITHMETIC:
            raise unknown_name("setting", key, ARITHMETIC, where="coefficients(…)")
    name = str(settings.pop("preset", "paper"))
    bundle: dict[str, Any] = dict(preset(name, where="coefficients(…)").settings)
    bundle |= {key: checked_setting(key, value, f"coefficients(…, {key}=…)") for key, value in settings.items()}
    names = alignment.models if alignment is not None else expert_names([profile.model for profile in profiles])
    return compute(
        measurements(profiles, alignment, names),
        SensSettings(preset=name, **bundle),
        weights=[1.0] * len(profiles) if weights is None else weights,
        scale=scale,
    )


def weigh(
    recipe: Recipe,
    *,
    profiles_dir: str | Path | None = None,
    device: str = "auto",
    memory: str = "auto",
    allow_pickle: bool = False,
) -> Coefficients:
    """The coefficients of a recipe, kept as `coefficients.json` in `profiles_dir`; calibrates first where it must.

    With valid profiles no model is loaded. λ is null while it is `auto`.
    """
    folder = profiles_folder(recipe) if profiles_dir is None else Path(profiles_dir)
    with open_models(recipe, allow_pickle=allow_pickle) as models:
        recipe = sized(recipe, models)
        calibration: Calibration | None = None
        if needs_calibration(recipe):
            calibration = calibrated(recipe, models, folder, device, memory, sweeping=True)
        result = coefficients_of(recipe, models, calibration)
    result.save(folder / "coefficients.json")
    return result


__all__ = [
    "MergeResult",
    "Outlook",
    "calibrate",
    "check_before",
    "coefficients",
    "dry_run",
    "merge",
    "outlook",
    "versions",
    "weigh",
]
