"""One expert's portable profile: measured once, used in any recipe with `sens: {profile: X.json}`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ..errors import InputFileError, OutputError, RecipeError
from ..records import Expert, Recipe, SensitivityProfile, SensSettings, SensSource
from .calibrating import calibrate_models
from .data import CalibrationData
from .models import open_models


def profile(
    model: str,
    source: SensSource,
    out: str | Path,
    *,
    base: str | None = None,
    settings: SensSettings | None = None,
    with_samples: bool = True,
    device: str = "auto",
    memory: str = "auto",
    allow_pickle: bool = False,
) -> SensitivityProfile:
    """Measure one model (eq. 1-3) on samples of its own task and keep it as the file `out`.

    `settings` are those of `sens:` that decide a profile; `score: task_vector` needs the `base`. Without samples the file holds no
    token ids and masks, and serves only rules that compare no models. A file that is up to date is left as it is; an interrupted
    run goes on at the sample it had reached. Raises RecipeError, OutputError where `out` is something else, and what
    `calibrate` raises.
    """
    out, settings = Path(out), settings or SensSettings()
    if settings.score == "task_vector" and base is None:
        raise RecipeError(
            "`score: task_vector` needs the base model",
            where="--score task_vector",
            why="it weighs what fine-tuning changed: the difference from the base",
            fix="--base FOLDER, or --score weight",
        )
    known = _known(out)
    recipe = Recipe(
        path=Path("the command line"),
        text="",
        merge_method="task_arithmetic" if base is not None else "linear",
        base_model=base,
        models=(Expert(model, 1.0, {}, source, 0),),
        slices=(),
        lambda_=None,
        parameters={},
        dtype=None,
        out_dtype=None,
        sens=replace(settings, rule="alpha_only", until=None),
    )
    # What a run leaves that was stopped: the next one goes on there.
    scratch = out.with_name(f".{out.name}.sens")
    with open_models(recipe, allow_pickle=allow_pickle) as models:
        if known is not None and known.token_ids:
            known.save(scratch / "profiles" / f"{models.names[0]}.json")
        calibration = calibrate_models(recipe, models, CalibrationData(recipe), scratch, device, memory)
    found = calibration.profiles[0]
    if not with_samples:
        found = replace(found, rows=[], token_ids=[], loss_mask=[])
    if found != known:
        found.save(out)
    shutil.rmtree(scratch)
    return found


def _known(out: Path) -> SensitivityProfile | None:
    """The profile in `out`, if there is one. Raises OutputError for a file that is none."""
    if not out.exists():
        return None
    try:
        return SensitivityProfile.load(out)
    except InputFileError as error:
        raise OutputError(
            "this file is no profile, and is not overwritten",
            where=str(out),
            why=error.why,
            fix="remove the file, or name another with -o",
        ) from error
