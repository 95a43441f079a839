"""The calibration of a recipe: profiles and distances, kept as files, made anew only when what they came from has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import progress
from ..calibration.samples import draw, encode_samples, read_samples
from ..checkpoints.families import group_tensors
from ..checkpoints.formats import to_float32
from ..checkpoints.source import Checkpoint, tokenizer_hashes
from ..distances import DISTANCES
from ..errors import CalibrationDataError, InputFileError
from ..matching import check_same_tensors
from ..records import Alignment, CalibrationSet, Recipe, SensitivityProfile, SensSettings, hash_of
from ..rules import RULES
from ..sens_block import settings_of
from .models import RecipeModels, find_file, source_of

if TYPE_CHECKING:
    from ..calibration.sensitivity import Reduce

# torch and what needs it are imported where something is measured: with valid files nothing here costs more than reading them.

# The keys of `sens:` that decide a profile, and those that decide the distances.
_PROFILE_KEYS = ("samples", "max_length", "seed", "template", "loss", "score", "group", "compute_dtype")
_ALIGNMENT_KEYS = ("distance", "positions", "compute_dtype")


@dataclass(frozen=True)
class Calibration:
    """All that was measured for a recipe, experts in recipe order; no alignment where no rule needs one and no samples exist."""

    profiles: tuple[SensitivityProfile, ...]
    alignment: Alignment | None


def profiles_folder(recipe: Recipe) -> Path:
    """Where a recipe's calibration is kept unless told otherwise: `<recipe>.sens/` beside the recipe."""
    return recipe.path.with_suffix(".sens")


def calibration_set(profile: SensitivityProfile) -> CalibrationSet:
    """The samples that a profile carries. Raises CalibrationDataError if it was made without them."""
    if not profile.token_ids:
        raise CalibrationDataError(
            f"the profile of '{profile.model}' carries no samples",
            where=f"profile {profile.model}",
            why="distances and lambda are measured on every expert's samples",
            fix="make the profile again with its samples, or use `rule: alpha_only`",
        )
    sound = all(
        len(ids) == len(mask) and mask[0] == 0 and any(mask)
        for ids, mask in zip(profile.token_ids, profile.loss_mask, strict=False)
    )
    if not sound or len(profile.token_ids) != len(profile.loss_mask) or len(profile.rows) != len(profile.token_ids):
        raise InputFileError(
            f"the samples in the profile of '{profile.model}' are malformed",
            where=f"profile {profile.model}",
            why="token_ids and loss_mask must have the same lengths, and each mask a loss token, but never at position 0",
            fix="make the profile again",
        )
    return CalibrationSet(
        tuple(profile.rows), tuple(map(tuple, profile.token_ids)), tuple(map(tuple, profile.loss_mask)), profile.loss, 0
    )


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _picked(settings: SensSettings, keys: Sequence[str]) -> dict[str, object]:
    return {key: getattr(settings, key) for key in keys}


def profile_inputs(recipe: Recipe, models: RecipeModels, index: int, data: Path, fingerprint: str) -> str:
    """A hash of all that the profile of expert `index` comes from: a kept one that has it is valid."""
    settings = settings_of(recipe)
    folder = models.experts[index].tokenizer_path
    base = models.base.fingerprint() if settings.score == "task_vector" and models.base is not None else None
    return hash_of(
        "profile 1",
        fingerprint,
        base,
        tokenizer_hashes(folder),
        _file_hash(data),
        dict(source_of(recipe, index).fields),
        _picked(settings, _PROFILE_KEYS),
    )


def _score(name: str, expert: Checkpoint, base: Checkpoint | None) -> Reduce:
    import torch

    from ..calibration.sensitivity import fisher_score, task_vector_score, weight_score

    if name == "fisher":
        return fisher_score
    if name == "weight":
        return weight_score
    assert base is not None

    def read(source: Checkpoint, tensor: str) -> Any:
        spec = source.tensors[tensor]
        return to_float32(source.read(tensor, 0, spec.elements), spec.dtype).reshape(spec.shape)

    def task_vector(tensor: str) -> torch.Tensor:
        # From both files, exactly: a weight rounded to the compute dtype differs from the base by more than δ.
        return torch.from_numpy(read(expert, tensor) - read(base, tensor))

    return task_vector_score(task_vector)


def _make_profile(
    models: RecipeModels,
    index: int,
    samples: CalibrationSet,
    settings: SensSettings,
    fingerprint: str,
    inputs: str,
    model: Any,
) -> SensitivityProfile:
    from ..calibration.sensitivity import checkpoint_names, sensitivities

    expert, name = models.experts[index], models.names[index]
    names = checkpoint_names(model, list(expert.tensors))
    per_sample = sensitivities(model, samples, names, _score(settings.score, expert, models.base), label=name)
    grouping = group_tensors(list(names.values()), settings.group)
    members = {layer: [t for t in names.values() if grouping.group_of[t] == layer] for layer in grouping.layers}
    sums = np.array(
        [[np.sum([sample[t] for t in members[layer]]) for layer in grouping.layers] for sample in per_sample]
    )
    return SensitivityProfile(
        schema=SensitivityProfile.SCHEMA,
        model=expert.label,
        fingerprint=fingerprint,
        samples=len(samples.rows),
        tokens=samples.loss_tokens,
        loss=settings.loss,
        score=settings.score,
        layers=list(grouping.layers),
        sensitivity=sums.sum(axis=0).tolist(),
        per_sample=sums.tolist(),
        tensors={t: float(np.sum([sample[t] for sample in per_sample])) for t in sorted(names.values())},
        rows=list(samples.rows),
        token_ids=[list(ids) for ids in samples.token_ids],
        loss_mask=[list(mask) for mask in samples.loss_mask],
        inputs=inputs,
    )


def _published_profile(recipe: Recipe, models: RecipeModels, index: int, name: str) -> SensitivityProfile:
    """A profile named in the recipe, refused unless it was made from this very model with these settings."""
    path = find_file(recipe, name, recipe.models[index].line)
    profile = SensitivityProfile.load(path)
    settings, expert = settings_of(recipe), models.experts[index]
    groups = list(group_tensors([*profile.tensors], settings.group).layers)
    wrong = [
        fault
        for fault, bad in (
            (f"it was made from another model than {expert.label}", profile.fingerprint != expert.fingerprint()),
            (f"it has loss: {profile.loss}, the recipe {settings.loss}", profile.loss != settings.loss),
            (f"it has score: {profile.score}, the recipe {settings.score}", profile.score != settings.score),
            (f"its layers are not the groups of group: {settings.group}", profile.layers != groups),
            (
                f"its tensors bear other names than those of {models.donor.label}",
                not profile.tensors.keys() <= expert.tensors.keys(),
            ),
        )
        if bad
    ]
    if wrong:
        raise InputFileError(
            f"this profile does not belong to '{expert.label}' in this recipe",
            where=str(path),
            why="; ".join(wrong),
            fix="use `sens: {data: FILE.jsonl}` to measure the model again",
        )
    return profile


def kept_record(folder: Path, file: str, inputs: str, load: Callable[[Path], Any]) -> Any | None:
    """The record in `folder/file` if it came from `inputs`; None if it is absent, damaged or stale."""
    path = folder / file
    if not path.is_file():
        return None
    try:
        record = load(path)
    except InputFileError:
        progress.message(f"{path} cannot be read and is made again")
        return None
    return record if record.inputs == inputs else None


@dataclass(frozen=True)
class _Pending:
    """A profile that must still be measured: its samples are read and encoded, its model is not loaded."""

    index: int
    samples: CalibrationSet
    fingerprint: str
    inputs: str


def _profile_or_samples(
    recipe: Recipe, models: RecipeModels, index: int, folder: Path
) -> SensitivityProfile | _Pending:
    """The expert's published or kept profile, else its encoded samples. Raises CalibrationDataError, InputFileError."""
    source, settings = source_of(recipe, index), settings_of(recipe)
    if source.profile is not None:
        return _published_profile(recipe, models, index, source.profile)
    assert source.data is not None
    expert, name = models.experts[index], models.names[index]
    data = find_file(recipe, source.data, recipe.models[index].line)
    fingerprint = expert.fingerprint()
    inputs = profile_inputs(recipe, models, index, data, fingerprint)
    kept = kept_record(folder, f"profiles/{name}.json", inputs, SensitivityProfile.load)
    # Another base may have other names for the same tensors, and a profile speaks of layers by name.
    if kept is not None and kept.tensors.keys() <= expert.tensors.keys():
        return kept  # type: ignore[no-any-return]
    from ..calibration.models import load_tokenizer

    drawn = draw(read_samples(data, source.fields), settings.samples, settings.seed)
    samples = encode_samples(load_tokenizer(expert.tokenizer_path), drawn, settings, data)
    if samples.truncated:
        cut = f"{samples.truncated} of {len(samples.rows)} samples were cut to {settings.max_length} tokens"
        progress.message(f"{name}: {cut}")
    return _Pending(index, samples, fingerprint, inputs)


def _measured(
    found: SensitivityProfile | _Pending, models: RecipeModels, settings: SensSettings, folder: Path, device: str
) -> SensitivityProfile:
    """The profile, measured now if it was pending, and kept in `folder`."""
    if isinstance(found, SensitivityProfile):
        return found
    from ..calibration.experts import load_expert
    from ..calibration.models import choose_device

    expert, name = models.experts[found.index], models.names[found.index]
    model = load_expert(expert, choose_device(device), settings.compute_dtype)
    profile = _make_profile(models, found.index, found.samples, settings, found.fingerprint, found.inputs, model)
    profile.save(folder / "profiles" / f"{name}.json")
    return profile


def _check_all_data(recipe: Recipe) -> None:
    """Find every calibration file and read its rows before the first model is loaded: bad data costs no time."""
    for index, expert in enumerate(recipe.models):
        source = source_of(recipe, index)
        if source.data is not None:
            read_samples(find_file(recipe, source.data, expert.line), source.fields)


def _check_vocabularies(models: RecipeModels, found: Sequence[SensitivityProfile | _Pending]) -> None:
    """Every model can read every task's token ids; raises CalibrationDataError otherwise."""
    for name, each in zip(models.names, found, strict=True):
        token_ids = each.token_ids if isinstance(each, SensitivityProfile) else each.samples.token_ids
        largest = max((max(ids) for ids in token_ids if ids), default=0)
        for expert in models.experts:
            size = expert.config.get("vocab_size")
            if isinstance(size, int) and largest >= size:
                raise CalibrationDataError(
                    f"'{expert.label}' cannot read the samples of '{name}'",
                    where=f"token id {largest} in the samples of '{name}'",
                    why=f"{expert.label} has a vocabulary of {size} tokens",
                    fix="use experts that share one tokenizer",
                )


def calibrate_models(recipe: Recipe, models: RecipeModels, folder: Path, device: str) -> Calibration:
    """Profiles (eq. 1-3) and distances (eq. 4) of a recipe, from `folder` where they are still valid, else measured and kept.

    Raises CalibrationDataError before a model is loaded if the data cannot be used; NonFiniteError, InputFileError. Cost: K
    forward and backward passes over a task's samples, K(K-1) forward passes over two tasks' samples.
    """
    settings = settings_of(recipe)
    check_same_tensors(models.donor, [expert for expert in models.experts if expert is not models.donor])
    _check_all_data(recipe)
    found = [_profile_or_samples(recipe, models, index, folder) for index in range(len(models.experts))]
    _check_vocabularies(models, found)
    profiles = tuple(_measured(each, models, settings, folder, device) for each in found)
    needs_distances = RULES.get(settings.rule, where="sens.rule").needs_distances
    if not needs_distances and not all(profile.token_ids for profile in profiles):
        return Calibration(profiles, None)
    inputs = hash_of(
        "alignment 1",
        [profile.fingerprint for profile in profiles],
        [hash_of(profile.token_ids, profile.loss_mask) for profile in profiles],
        list(models.names),
        _picked(settings, _ALIGNMENT_KEYS),
    )
    kept = kept_record(folder, "alignment.json", inputs, Alignment.load)
    if kept is not None:
        return Calibration(profiles, kept)
    from ..calibration.alignment import pairwise_distances
    from ..calibration.experts import load_expert
    from ..calibration.models import choose_device

    tasks = [calibration_set(profile) for profile in profiles]
    chosen = choose_device(device)
    per_sample = pairwise_distances(
        lambda index: load_expert(models.experts[index], chosen, settings.compute_dtype),
        models.names,
        tasks,
        DISTANCES.get(settings.distance, where="sens.distance"),
        settings.positions,
    )
    alignment = Alignment(
        schema=Alignment.SCHEMA,
        models=list(models.names),
        distances=[[float(np.mean(samples)) for samples in row] for row in per_sample],
        per_sample=per_sample,
        inputs=inputs,
    )
    alignment.save(folder / "alignment.json")
    return Calibration(profiles, alignment)
