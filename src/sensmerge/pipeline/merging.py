"""A merge from recipe to folder: calibrate, weigh, tune, plan, write, describe, put in place."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import progress
from ..checkpoints.families import group_tensors
from ..checkpoints.staging import staging
from ..errors import RecipeError
from ..execution.run import execute
from ..methods import METHODS
from ..plan import SHARD_BYTES, make_plan
from ..recipe import with_seed
from ..records import Coefficients, MergePlan, MergeRecord, Recipe, Scale, hash_of
from ..report.model_card import model_card
from ..rules.compute import applied
from ..sens_block import check_coefficients_apply
from ..settings import as_written, without_filters
from .calibrating import Calibration, calibration_set, kept_record, profiles_folder
from .checking import check_empty
from .companions import write_companions
from .enough import calibrated
from .identity import check_unchanged, identity_of, input_states, version_of
from .models import RecipeModels, open_models
from .planning import check_before
from .resuming import check_not_taken, check_resumable, command_of, finished, writing
from .tracing import RECORD, companion_hashes, searched
from .weighing import coefficients_of, needs_calibration, preset_scale, sized

VERSIONED = ("sensmerge", "numpy", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and what it was made with; `written` is False where it was complete already."""

    folder: Path
    plan: MergePlan
    coefficients: Coefficients | None
    scale: float
    hashes: Mapping[str, str]
    seconds: float
    written: bool = True


@dataclass(frozen=True)
class _Prepared:
    """Everything a merge needs before the first weight is written."""

    recipe: Recipe
    calibration: Calibration | None
    coefficients: Coefficients | None
    scale_record: Scale | None
    plan: MergePlan


def seeded(recipe: Recipe, seed: int | None) -> Recipe:
    """`recipe` with another seed of its method's draws, if one is given. Raises RecipeError where nothing is drawn."""
    return recipe if seed is None else with_seed(recipe, seed)


def _tuned_scale(
    recipe: Recipe,
    models: RecipeModels,
    calibration: Calibration,
    coefficients: Coefficients,
    plan: MergePlan,
    folder: Path,
    device: str,
) -> Scale:
    from ..calibration.models import choose_device
    from ..tuning.scale import choose_scale

    assert models.base is not None
    assert recipe.sens is not None
    inputs = hash_of(
        "scale 2",
        coefficients.inputs,
        plan.method,
        [[each.spec.name, each.weights, dict(each.options), dict(each.per_model)] for each in plan.tensors],
        models.base.fingerprint(),
        [profile.inputs for profile in calibration.profiles],
        recipe.sens.compute_dtype,
    )
    # One file for each set of coefficients: recipes that share a folder must not undo each other's work.
    file = f"scales/{inputs[:16]}.json"
    kept = kept_record(folder, file, inputs, Scale.load)
    if kept is not None:
        return kept  # type: ignore[no-any-return]
    scale = choose_scale(
        plan,
        models.readers,
        models.base,
        {name: calibration_set(profile) for name, profile in zip(models.names, calibration.profiles, strict=True)},
        device=choose_device(device),
        compute_dtype=recipe.sens.compute_dtype,
        inputs=inputs,
    )
    scale.save(folder / file)
    return scale


def _check_given(given: Coefficients, recipe: Recipe, models: RecipeModels) -> None:
    """Coefficients handed to `merge` must be of these models, in this order, and mean something; raises RecipeError otherwise."""
    check_coefficients_apply(recipe, METHODS.get(recipe.merge_method, where=recipe.where()))
    if list(given.models) != list(models.names):
        raise RecipeError(
            "these coefficients belong to other models",
            where=recipe.where(),
            why=f"they are for {', '.join(given.models)}; the recipe has {', '.join(models.names)}",
            fix="compute them from this recipe's profiles, in the recipe's order",
        )
    group = "block" if recipe.sens is None else recipe.sens.group
    assert models.base is not None
    if list(group_tensors(models.base.tensors, group).layers) != list(given.layers):
        raise RecipeError(
            "these coefficients do not fit this recipe",
            where=recipe.where(),
            why="they multiply task vectors from a base, one number for each group of the recipe's granularity",
            fix="compute them from this recipe's own profiles (`group:` must be the same)",
        )


def _prepare(
    recipe: Recipe,
    models: RecipeModels,
    given: Coefficients | None,
    folder: Path,
    device: str,
    memory: str,
    shard_bytes: int,
) -> _Prepared:
    recipe = sized(recipe, models)

    def plan_with(coefficients: Coefficients | None, scale: float | None) -> MergePlan:
        return make_plan(recipe, models.readers, coefficients=coefficients, scale=scale, shard_bytes=shard_bytes)

    # Models that do not fit together are refused before anything is measured.
    plain = plan_with(None, preset_scale(recipe))
    calibration, coefficients, record = None, None, None
    scale = 1.0 if recipe.lambda_ is None else recipe.lambda_
    if recipe.sens is not None and needs_calibration(recipe):
        calibration = calibrated(recipe, models, folder, device, memory)
    if given is not None:
        _check_given(given, recipe, models)
        weights = [expert.weight for expert in recipe.models]
        coefficients = applied(given, weights, None if isinstance(scale, str) else scale)
    elif recipe.sens is not None:
        coefficients = coefficients_of(recipe, models, calibration)
    if isinstance(scale, str):
        assert calibration is not None
        assert coefficients is not None
        record = _tuned_scale(recipe, models, calibration, coefficients, plan_with(coefficients, 1.0), folder, device)
        coefficients = applied(coefficients, coefficients.w, record.lambda_)
    whole = preset_scale(recipe) if record is None else record.lambda_
    for warning in [] if coefficients is None else coefficients.warnings:
        progress.warning(warning)
    plan = plain if coefficients is None else plan_with(coefficients, whole)
    return _Prepared(recipe, calibration, coefficients, record, plan)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": sys.version.split()[0], **{name: version_of(name) for name in VERSIONED}}


def _describe(
    prepared: _Prepared, models: RecipeModels, out: Path, staging: Path, hashes: Mapping[str, str], seconds: float
) -> None:
    """The model card, the recipe, and everything under sensmerge/, in `staging`, which becomes `out`."""
    recipe, coefficients = prepared.recipe, prepared.coefficients
    parents = [name.partition("@")[0] for name in models.commits]
    card = model_card(recipe, coefficients, prepared.plan.scale, parents)
    (staging / "README.md").write_text(card, encoding="utf-8")
    (staging / "sensmerge.yml").write_text(recipe.text, encoding="utf-8")
    records = staging / "sensmerge"
    if coefficients is not None:
        coefficients.save(records / "coefficients.json")
    if prepared.calibration is not None:
        for name, profile in zip(models.names, prepared.calibration.profiles, strict=True):
            profile.save(records / "profiles" / f"{name}.json")
        if prepared.calibration.alignment is not None:
            prepared.calibration.alignment.save(records / "alignment.json")
    if prepared.scale_record is not None:
        prepared.scale_record.save(records / "scale.json")
    method = METHODS.get(recipe.merge_method, where=recipe.where())
    levels = [recipe.parameters, *(part.parameters for part in recipe.slices)]
    record = MergeRecord(
        schema=MergeRecord.SCHEMA,
        method=recipe.merge_method,
        parameters=as_written(recipe.parameters),
        lambda_=prepared.plan.scale if method.adds else None,
        random_seed=int(without_filters(levels, method.by_name["seed"]) or 0) if method.draws else None,
        inputs={model.label: model.fingerprint() for model in models.all},
        commits=dict(models.commits),
        searched=searched(recipe, models.readers, out),
        outputs=dict(hashes),
        companions=companion_hashes(staging),
        versions=versions(),
        seed=None if recipe.sens is None else recipe.sens.seed,
        finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(seconds, 3),
        warnings=[] if coefficients is None else list(coefficients.warnings),
    )
    record.save(staging / RECORD)


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    coefficients: Coefficients | None = None,
    profiles_dir: str | Path | None = None,
    device: str = "auto",
    memory: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    shard_bytes: int = SHARD_BYTES,
    jobs: int | None = None,
    seed: int | None = None,
    allow_pickle: bool = False,
) -> MergeResult:
    """Merge the models of `recipe` into the folder `out`: a model that `transformers` loads, with all that explains it.

    Calibrates first where the recipe has a `sens:` block and no valid files exist in `profiles_dir` (default: `<recipe>.sens/`);
    `coefficients` replaces the recipe's own rule, `seed` that of a method that draws at random; `jobs` is the number of threads
    (default: one for each core), which changes no byte; `memory` is how models are held while they
    are measured; `allow_pickle` reads
    `pytorch_model*.bin` where a model has nothing else. `out` is untouched until the merge is complete. A merge that was
    interrupted is gone on with by the same call, and refused to another one unless `restart` throws it away; a complete one is
    not written again. Raises the errors of sensmerge.errors. Cost of the merge itself: one read of every input byte, one write of
    every output byte, constant memory.
    """
    started = time.monotonic()
    out = Path(out)
    folder = profiles_folder(recipe) if profiles_dir is None else Path(profiles_dir)
    command = command_of(
        recipe,
        out,
        profiles=profiles_dir,
        device=device,
        overwrite=overwrite,
        shard_bytes=None if shard_bytes == SHARD_BYTES else shard_bytes,
        seed=seed,
        allow_pickle=allow_pickle,
    )
    recipe = seeded(recipe, seed)
    with open_models(recipe, allow_pickle=allow_pickle) as models:
        states = input_states(models)
        check_before(
            recipe,
            models,
            out,
            folder,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            jobs=jobs,
            calibrates=coefficients is None,
        )
        with staging(out) as stage:
            if not overwrite:
                # Once more: what was broken off between two renames is in its place now.
                check_not_taken(recipe, out)
            prepared = _prepare(recipe, models, coefficients, folder, device, memory, shard_bytes)
            identity = identity_of(recipe, models, prepared.plan, states, device)
            hashes = finished(stage, identity, restart=restart)
            written = hashes is None
            if hashes is None:
                if not overwrite:
                    check_empty(recipe, out)
                check_resumable(stage, identity, command)
                check_unchanged(models, states)
                with writing(stage, identity, command, [file for file, _ in prepared.plan.shards]) as journal:
                    hashes = execute(
                        prepared.plan, models.readers, stage.model, jobs=jobs, device=device, journal=journal
                    )
                    write_companions(recipe, models, stage.model)
                    _describe(prepared, models, out, stage.model, hashes, time.monotonic() - started)
                    check_unchanged(models, states)
                    stage.seal(identity)
                    stage.commit(overwrite=overwrite)
    seconds = time.monotonic() - started
    return MergeResult(out, prepared.plan, prepared.coefficients, prepared.plan.scale, hashes, seconds, written)
