"""What a merge would do and cost, from headers, a short trial and what was calibrated before; nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.source import Checkpoint, parameters_of
from ..errors import Faults, SensmergeError
from ..execution.engine import cores
from ..execution.estimate import Cost, cost_of
from ..execution.timing import Speed, measured_speed
from ..methods import METHODS
from ..methods.option import INT8_MASK
from ..plan import SHARD_BYTES
from ..recipe import with_seed
from ..records import Alignment, MergePlan, Recipe, SensitivityProfile
from ..rules import RULES
from ..sens_block import settings_of
from .calibrating import kept_record, profile_inputs, profiles_folder
from .checking import check_empty, check_name
from .data import CalibrationData
from .models import RecipeModels, find_file, open_models, source_of
from .planning import check_before, check_data, free_bytes, output_bytes, raise_once
from .weighing import needs_calibration


@dataclass(frozen=True)
class FoundModel:
    """Where a model of the recipe was found, and what it is."""

    model: str
    folders: tuple[str, ...]
    dtype: str
    parameters: int
    is_base: bool


@dataclass(frozen=True)
class CalibrationStep:
    """One thing that a `sens:` recipe measures: an expert's profile, or the distances between all; `state` is kept, published or
    to measure, `samples` how many samples are run through a model."""

    name: str
    source: str
    samples: int
    state: str


@dataclass(frozen=True)
class Outlook:
    """All that is known of a merge before it begins. Sizes are bytes, `seconds` is a guess (None where it cannot be made).

    `bytes_again` of the inputs are read more than once; `scratch_bytes` lie beside the output until it is complete; `free_bytes` is
    what the disk of `out` has, a folder beside the recipe where `assumed`. `calibration` is empty without `sens:`, and its time is
    not in `seconds`.
    """

    recipe: Path
    out: Path
    assumed: bool
    plan: MergePlan
    settings: Mapping[str, object]
    models: tuple[FoundModel, ...]
    calibration: tuple[CalibrationStep, ...]
    cost: Cost
    jobs: int
    scratch_bytes: int
    free_bytes: int
    speed: Speed | None

    @property
    def seconds(self) -> float | None:
        """Reading as fast as a sample was read, merging as fast as a sample was merged, writing as fast as reading."""
        if self.speed is None:
            return None
        moved = self.plan.bytes_read + self.cost.bytes_again + self.plan.bytes_written
        return moved / self.speed.reading + self.plan.bytes_read / self.speed.merging


def outlook(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    profiles_dir: str | Path | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    jobs: int | None = None,
    seed: int | None = None,
    allow_pickle: bool = False,
    timed: bool = True,
) -> Outlook:
    """What `merge` would do, after every check that comes before it; nothing is written.

    Without `out` it is a folder beside the recipe. Raises every fault at once. Cost: the headers; where `timed`, a merge of at
    most 32 MiB of the inputs, thrown away; with `sens:` also the models' fingerprints.
    """
    recipe = recipe if seed is None else with_seed(recipe, seed)
    assumed = out is None
    out = recipe.path.with_name(f"{recipe.path.stem}-merged") if out is None else Path(out)
    kept = profiles_folder(recipe) if profiles_dir is None else Path(profiles_dir)
    threads = jobs or cores()
    check_name(out)
    opening, opened = Faults(), False
    with opening.gathered(), open_models(recipe, allow_pickle=allow_pickle) as models:
        opened = True
        plan = check_before(recipe, models, out, kept, overwrite=overwrite, shard_bytes=shard_bytes, jobs=threads)
        cost = cost_of(plan, models.readers, threads)
        return Outlook(
            recipe=recipe.path,
            out=out,
            assumed=assumed,
            plan=plan,
            settings=_settings(recipe, plan),
            models=tuple(_found(recipe, label, reader) for label, reader in models.readers.items()),
            calibration=tuple(_calibration(recipe, models, kept)),
            cost=cost,
            jobs=threads,
            scratch_bytes=output_bytes(plan, models),
            free_bytes=free_bytes(out),
            speed=measured_speed(plan, models.readers, threads) if timed else None,
        )
    # Where models cannot be opened, what does not depend on them is told with them.
    if not opened:
        if not overwrite:
            with opening.gathered():
                check_empty(recipe, out)
        check_data(recipe, opening)
    raise_once(opening)
    raise AssertionError("an outlook without a fault was returned above")


def _found(recipe: Recipe, label: str, reader: Checkpoint) -> FoundModel:
    elements: Counter[str] = Counter()
    for name, spec in reader.tensors.items():
        elements[reader.stored_dtype(name)] += spec.elements
    return FoundModel(
        model=label,
        folders=tuple(str(folder) for folder in reader.folders),
        dtype=elements.most_common(1)[0][0] if elements else "none",
        parameters=parameters_of(reader),
        is_base=label == recipe.base_model,
    )


def _settings(recipe: Recipe, plan: MergePlan) -> dict[str, object]:
    """The parameters that mean something, each with its values over all tensors: one, or the least and the largest."""
    floats = [tensor for tensor in plan.tensors if tensor.options or tensor.per_model or tensor.weights]
    found: dict[str, set[object]] = {}
    for tensor in floats:
        for name, value in tensor.options.items():
            if name == INT8_MASK.name:
                continue
            found.setdefault(name, set()).add(value)
        for name, values in tensor.per_model.items():
            found.setdefault(name, set()).update(values)
        found.setdefault("weight", set()).update(tensor.weights)
        found.setdefault("lambda", set()).add(tensor.scale)
    method = METHODS.get(plan.method, where=recipe.where())
    if not method.adds:
        found.pop("lambda", None)
    elif recipe.lambda_ == "auto":
        found["lambda"] = {"auto"}
    if "weight" not in method.by_name:
        found.pop("weight", None)
    return {name: _spread(values) for name, values in found.items()}


def _spread(values: set[object]) -> object:
    if len(values) == 1:
        return next(iter(values))
    ordered = sorted(values, key=lambda value: (str(type(value)), value))
    return f"{ordered[0]} to {ordered[-1]}"


def _calibration(recipe: Recipe, models: RecipeModels, kept: Path) -> Sequence[CalibrationStep]:
    """What a `sens:` recipe has measured, and what it will measure. Distances count as kept where they are of these models."""
    if recipe.sens is None or not needs_calibration(recipe):
        return ()
    settings = settings_of(recipe)
    steps, data = list[CalibrationStep](), CalibrationData(recipe)
    for index, (expert, name) in enumerate(zip(recipe.models, models.names, strict=True)):
        source = source_of(recipe, index)
        if source.profile is not None:
            profile = SensitivityProfile.load(find_file(recipe, source.profile, expert.line))
            steps.append(CalibrationStep(name, source.profile, profile.samples, "published"))
            continue
        assert source.data is not None
        inputs = profile_inputs(recipe, models, index, data, models.experts[index].fingerprint())
        known = kept_record(kept, f"profiles/{name}.json", inputs, SensitivityProfile.load)
        samples = min(settings.samples, len(data.samples(index)))
        steps.append(
            CalibrationStep(
                name, ", ".join(map(str, data.files(index))), samples, "to measure" if known is None else "kept"
            )
        )
    if RULES.get(settings.rule, where="sens.rule").needs_distances:
        samples = sum(step.samples for step in steps) * len(steps)
        state = "to measure"
        if all(step.state != "to measure" for step in steps) and (kept / "alignment.json").is_file():
            with suppress(SensmergeError):
                state = "kept" if Alignment.load(kept / "alignment.json").models == list(models.names) else state
        steps.append(CalibrationStep("distances", str(kept / "alignment.json"), samples, state))
    if recipe.lambda_ == "auto":
        steps.append(CalibrationStep("lambda", str(kept / "scales"), 0, "to measure, unless it is kept"))
    return steps
