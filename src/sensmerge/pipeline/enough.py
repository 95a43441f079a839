"""Is the calibration enough? With `until` in the recipe, samples are drawn until the widest interval of a coefficient is small."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from .. import progress
from ..records import DrawnSamples, Recipe
from ..sens_block import settings_of
from .calibrating import Calibration, calibrate_models, inputs_of_samples, kept_record
from .data import CalibrationData
from .models import RecipeModels, source_of
from .weighing import coefficients_of, sized

GROWTH = 1.5
FILE = "until.json"


def calibrated(
    recipe: Recipe,
    models: RecipeModels,
    folder: Path,
    device: str,
    memory: str = "auto",
    *,
    growth: float = GROWTH,
    sweeping: bool = False,
) -> Calibration:
    """The calibration of a recipe, with its `samples`, or with as many as its `until` asks for.

    `samples` rows are then drawn at first and `growth` times as many in each round, until half of the widest 95 % interval of K·σ
    is at most `until`, or no file has more. Rows that were measured are not measured again; how many it took is kept, and used by
    the next call (`sweeping`: as it is, whatever the rule and temperature). Raises what `calibrate_models` raises. Cost: that of
    the last round, and a load of every model for each round before.
    """
    settings, data = settings_of(recipe), CalibrationData(recipe)
    if settings.until is None:
        return calibrate_models(recipe, models, data, folder, device, memory)
    inputs = inputs_of_samples(recipe, models, data)
    kept = kept_record(folder, FILE, inputs, DrawnSamples.load)
    most = kept.rows if kept is not None else _most(recipe, data)
    count = min(settings.samples if kept is None else kept.samples, most)
    rounds = [] if kept is None else list(kept.rounds)
    while True:
        drawn = replace(recipe, sens=replace(settings, samples=count))
        calibration = calibrate_models(drawn, models, data, folder, device, memory)
        found = coefficients_of(sized(recipe, models), models, calibration).intervals
        half = None if found is None else found.widest()[2]
        if kept is None or count != kept.samples:
            rounds.append((count, half))
            told = "not known" if half is None else f"+/- {half:.4f}"
            progress.message(f"{count} samples of each task: the widest 95 % interval of K*sigma is {told}")
            DrawnSamples(DrawnSamples.SCHEMA, count, most, rounds, inputs).save(folder / FILE)
        enough = half is not None and half <= settings.until
        if enough or count >= most or (sweeping and kept is not None):
            break
        count = min(most, max(count + 1, math.ceil(count * growth)))
    _tell(settings.until, count, most, half)
    return calibration


def _most(recipe: Recipe, data: CalibrationData) -> int:
    """The rows of the largest file; 1 where every expert has a profile, whose samples are what they are."""
    indices = [at for at in range(len(recipe.models)) if source_of(recipe, at).profile is None]
    return max((len(data.samples(at)) for at in indices), default=1)


def _tell(until: float, count: int, most: int, half: float | None) -> None:
    if half is not None and half <= until:
        progress.message(f"until: {until:g} is reached with {count} samples of each task (+/- {half:.4f})")
        return
    wide = "is not known" if half is None else f"is +/- {half:.4f}"
    if count >= most:
        progress.warning(
            f"until: {until:g} is not reached: no task has more than {most} samples, and the widest 95 % interval of K*sigma {wide}"
        )
    else:
        progress.warning(
            f"until: {until:g} is not reached with {count} samples: the widest 95 % interval of K*sigma {wide};"
            " `sensmerge calibrate` draws more"
        )


def drawn_samples(recipe: Recipe, folder: Path) -> DrawnSamples | None:
    """What the calibration in `folder` that has just been made took; None for a recipe without `until`."""
    return None if settings_of(recipe).until is None else DrawnSamples.load(folder / FILE)
