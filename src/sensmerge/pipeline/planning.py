"""Before anything is merged: every fault that headers, configs, tokenizers and files tell, all at once."""

from __future__ import annotations

import os
import shlex
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..checkpoints.source import TOKENIZER_FILES
from ..checkpoints.staging import work_folder
from ..errors import Faults, ResourceError, SensmergeError
from ..execution.engine import cores
from ..execution.estimate import Cost, cost_of
from ..plan import SHARD_BYTES, make_plan
from ..recipe import with_seed
from ..records import Coefficients, MergePlan, Recipe, SensitivityProfile
from ..rules.compute import compute
from ..sens_block import settings_of
from .calibrating import profiles_folder
from .checking import check_models, check_name, check_place, check_tokenizers, rows_alone_differ, tell_unmatched_filters
from .companions import output_model_config
from .data import CalibrationData
from .models import RecipeModels, find_file, open_models, realigned, source_of
from .resuming import check_not_taken
from .weighing import needs_calibration, preset_scale, sized, unmeasured


def planned(recipe: Recipe, models: RecipeModels, shard_bytes: int) -> MergePlan:
    """The plan of a merge whose coefficients and λ may not be measured yet: both count as 1. Reads headers only."""
    recipe = sized(recipe, models)
    stand_in: Coefficients | None = None
    if recipe.sens is not None:
        # With coefficients a method may read the base where it does not without.
        uniform = replace(settings_of(recipe), rule="uniform", total="K", other="block_mean")
        weights = [expert.weight for expert in recipe.models]
        stand_in = compute(unmeasured(models, uniform), uniform, weights=weights, scale=1.0)
    scale = 1.0 if recipe.lambda_ == "auto" else preset_scale(recipe)
    return make_plan(recipe, models.readers, coefficients=stand_in, scale=scale, shard_bytes=shard_bytes)


def check_before(
    recipe: Recipe,
    models: RecipeModels,
    out: Path,
    kept: Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    jobs: int | None = None,
    calibrates: bool = True,
) -> MergePlan:
    """Everything that can be known before a weight is merged; raises all faults at once, SeveralErrors for more than one.

    The output, the tokenizers, the tensors and the method's options, the config, the calibration files (unless `calibrates` is
    False: coefficients were given), the disk and the memory. `kept` is where the calibration is kept.
    """
    check_name(out)
    faults = Faults()
    plan: MergePlan | None = None
    with faults.gathered():
        check_place(recipe, models, out, kept)
    # To overwrite a folder is no advice where it is one that this merge reads.
    if not overwrite and not faults.found:
        with faults.gathered():
            check_not_taken(recipe, out)
    mended, before = False, len(faults.found)
    with faults.gathered():
        check_tokenizers(recipe, models)
    if len(faults.found) > before:
        # What is wrong beside the vocabularies is told of the models as they will be once that is mended.
        with suppress(SensmergeError):
            models = realigned(recipe, models)
        # Where that cannot be: unlike vocabularies have unlike rows, which is one fault.
        mended = rows_alone_differ(models)
    with faults.gathered():
        check_models(recipe, models, tensors=not mended)
    if not mended:
        with faults.gathered():
            plan = planned(recipe, models, shard_bytes)
            tell_unmatched_filters(recipe, plan)
    with faults.gathered():
        output_model_config(recipe, models)
    if calibrates:
        check_data(recipe, faults)
    if plan is not None:
        with faults.gathered():
            _check_disk(plan, models, out, overwrite)
        with faults.gathered():
            _check_memory(cost_of(plan, models.readers, jobs or cores()), jobs or cores(), recipe, out)
    raise_once(faults)
    assert plan is not None
    return plan


def raise_once(faults: Faults) -> None:
    """Raise what was gathered; what two checks found in the same words is told once."""
    told: dict[str, SensmergeError] = {}
    for error in faults.found:
        told.setdefault(str(error), error)
    faults.found = list(told.values())
    faults.raise_all()


def check_data(recipe: Recipe, faults: Faults) -> None:
    """Every calibration file is there and holds samples; published profiles can be read."""
    if recipe.sens is None or not needs_calibration(recipe):
        return
    data = CalibrationData(recipe)
    for index, expert in enumerate(recipe.models):
        with faults.gathered():
            source = source_of(recipe, index)
            if source.profile is not None:
                SensitivityProfile.load(find_file(recipe, source.profile, expert.line))
            elif source.data is not None:
                data.samples(index)


def free_bytes(out: Path) -> int:
    """Bytes that a merge may write to the disk of `out`, which need not exist."""
    here = out.resolve()
    free = shutil.disk_usage(next(folder for folder in (here, *here.parents) if folder.is_dir())).free
    # What an interrupted merge has written there already is gone on with, not written a second time.
    begun = work_folder(out) / "model"
    return free + sum(file.stat().st_blocks * 512 for file in begun.rglob("*") if file.is_file())


def output_bytes(plan: MergePlan, models: RecipeModels) -> int:
    """The weights, and the files of the donor's tokenizer beside them."""
    files = [models.donor.tokenizer_path / name for name in TOKENIZER_FILES]
    return plan.bytes_written + sum(file.stat().st_size for file in files if file.is_file())


def _check_disk(plan: MergePlan, models: RecipeModels, out: Path, overwrite: bool) -> None:
    needed, free = output_bytes(plan, models), free_bytes(out)
    if needed <= free:
        return
    held = " (the old model is kept until the new one is complete)" if overwrite and out.exists() else ""
    raise ResourceError(
        "the output does not fit on the disk",
        where=str(out),
        why=f"it takes {needed} bytes, {free} are free{held}",
        fix=f"free {needed - free} bytes there, choose an output folder on another disk, or a smaller `out_dtype`",
    )


def _check_memory(cost: Cost, jobs: int, recipe: Recipe, out: Path) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if cost.peak_bytes <= total:
        return
    raise ResourceError(
        "the merge needs more memory than this machine has",
        where=f"{jobs} thread(s)",
        why=f"about {cost.peak_bytes} bytes at its peak; the machine has {total}",
        fix=shlex.join(["sensmerge", "merge", str(recipe.path), str(out), "--jobs", "1"])
        if jobs > 1
        else "use a machine with more memory, or a method that is not of whole tensors (`sensmerge list methods`)",
    )


def dry_run(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    seed: int | None = None,
    allow_pickle: bool = False,
) -> MergePlan:
    """The plan of `merge`, after every check that comes before it; coefficients and λ that are not measured yet count as 1.

    Raises what `merge` raises for the recipe, the headers, the tokenizers, the calibration files and the output, all at once.
    """
    recipe = recipe if seed is None else with_seed(recipe, seed)
    with open_models(recipe, allow_pickle=allow_pickle) as models:
        return check_before(
            recipe, models, Path(out), profiles_folder(recipe), overwrite=overwrite, shard_bytes=shard_bytes
        )
