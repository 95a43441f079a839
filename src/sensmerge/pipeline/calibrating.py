"""The calibration of a recipe: profiles and distances, kept as files, made anew only when what they came from has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import progress
from ..calibration.samples import draw, encode_samples
from ..checkpoints.families import group_tensors
from ..checkpoints.source import tokenizer_hashes
from ..errors import CalibrationDataError, Faults, InputFileError
from ..matching import check_same_tensors
from ..records import Alignment, CalibrationSet, PairDistances, Recipe, SensitivityProfile, SensSettings, hash_of
from ..rules import RULES
from ..sens_block import settings_of
from .data import CalibrationData
from .measuring import SampleSums, Work, measure
from .models import RecipeModels, find_file, source_of
from .published import published_profile

# torch and what needs it are imported where something is measured: with valid files nothing here costs more than reading them.

# The keys of `sens:` that decide a profile, and those that decide the distances.
_PROFILE_KEYS = (
    "samples",
    "max_length",
    "seed",
    "template",
    "loss",
    "score",
    "group",
    "compute_dtype",
    "attn_implementation",
)
_SAMPLE_KEYS = tuple(key for key in _PROFILE_KEYS if key not in ("samples", "seed", "group"))
_ALIGNMENT_KEYS = ("distance", "positions", "compute_dtype", "attn_implementation")


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
            fix="make the profile again with its samples, or use `rule: alpha_only` with a number as lambda",
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


def _picked(settings: SensSettings, keys: Sequence[str]) -> dict[str, object]:
    return {key: getattr(settings, key) for key in keys}


def profile_inputs(
    recipe: Recipe,
    models: RecipeModels,
    index: int,
    data: CalibrationData,
    fingerprint: str,
    keys: Sequence[str] = _PROFILE_KEYS,
) -> str:
    """A hash of all that the profile of expert `index` comes from: a kept one that has it is valid."""
    settings = settings_of(recipe)
    folder = models.experts[index].tokenizer_path
    base = models.base.fingerprint() if settings.score == "task_vector" and models.base is not None else None
    return hash_of(
        "profile 1",
        fingerprint,
        base,
        tokenizer_hashes(folder),
        data.hash(index),
        dict(source_of(recipe, index).fields),
        _picked(settings, keys),
    )


def inputs_of_samples(recipe: Recipe, models: RecipeModels, data: CalibrationData) -> str:
    """The hash of all that decides what samples can be drawn and what is measured on each, but for how many are."""
    parts: list[str] = []
    for index, expert in enumerate(models.experts):
        source = source_of(recipe, index)
        if source.profile is None:
            keys = (*_SAMPLE_KEYS, "seed")
            parts.append(profile_inputs(recipe, models, index, data, expert.fingerprint(), keys))
        else:
            path = find_file(recipe, source.profile, recipe.models[index].line)
            parts.append(SensitivityProfile.load(path).inputs)
    return hash_of("until 1", parts)


def _profile_of(
    models: RecipeModels, pending: _Pending, settings: SensSettings, found: SampleSums
) -> SensitivityProfile:
    """The profile that the sums of all samples make."""
    expert, samples = models.experts[pending.index], pending.samples
    per_sample = [found.by_row[row] for row in samples.rows]
    names = sorted({name for sums in per_sample for name in sums})
    grouping = group_tensors(names, settings.group)
    members = {layer: [t for t in names if grouping.group_of[t] == layer] for layer in grouping.layers}
    sums = np.array(
        [[math.fsum(sample.get(t, 0.0) for t in members[layer]) for layer in grouping.layers] for sample in per_sample]
    )
    return SensitivityProfile(
        schema=SensitivityProfile.SCHEMA,
        model=expert.label,
        fingerprint=pending.fingerprint,
        samples=len(samples.rows),
        tokens=samples.loss_tokens,
        loss=settings.loss,
        score=settings.score,
        layers=list(grouping.layers),
        sensitivity=sums.sum(axis=0).tolist(),
        per_sample=sums.tolist(),
        tensors={t: math.fsum(sample.get(t, 0.0) for sample in per_sample) for t in names},
        rows=list(samples.rows),
        token_ids=[list(ids) for ids in samples.token_ids],
        loss_mask=[list(mask) for mask in samples.loss_mask],
        inputs=pending.inputs,
        paths=dict(found.paths),
        truncated=samples.truncated,
        dropped=samples.dropped,
    )


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
    samples_inputs: str


def _profile_or_samples(
    recipe: Recipe, models: RecipeModels, data: CalibrationData, index: int, folder: Path
) -> SensitivityProfile | _Pending:
    """The expert's published or kept profile, else its encoded samples. Raises CalibrationDataError, InputFileError."""
    source, settings = source_of(recipe, index), settings_of(recipe)
    if source.profile is not None:
        return published_profile(recipe, models, index, source.profile)
    expert, name = models.experts[index], models.names[index]
    fingerprint = expert.fingerprint()
    inputs = profile_inputs(recipe, models, index, data, fingerprint)
    kept = kept_record(folder, f"profiles/{name}.json", inputs, SensitivityProfile.load)
    # Another base may have other names for the same tensors, and a profile speaks of layers by name.
    if kept is not None and kept.tensors.keys() <= expert.tensors.keys():
        return kept  # type: ignore[no-any-return]
    from ..calibration.models import load_tokenizer

    rows = data.samples(index)
    drawn = draw(rows, settings.samples, settings.seed)
    samples = encode_samples(load_tokenizer(expert.tokenizer_path), drawn, settings, name, len(rows))
    if samples.truncated:
        cut = f"{samples.truncated} of {len(samples.rows)} samples were cut to {settings.max_length} tokens"
        progress.message(f"{name}: {cut}")
    # What one sample's sums come from: neither how many others there are, nor how tensors are grouped afterwards, but what the
    # tensors are called in this recipe.
    each = profile_inputs(recipe, models, index, data, fingerprint, _SAMPLE_KEYS)
    return _Pending(index, samples, fingerprint, inputs, hash_of("rows 1", each, sorted(expert.tensors)))


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


@dataclass(frozen=True)
class _Wanted:
    """The distance of one model from one expert: what it comes from, its samples by their hashes, and the numbers known of them."""

    inputs: str
    samples: Sequence[str]
    known: Mapping[str, float]

    @property
    def unknown(self) -> list[int]:
        """The places of the samples that must still be compared."""
        return [place for place, key in enumerate(self.samples) if key not in self.known]


def _pairs(
    models: RecipeModels,
    found: Sequence[SensitivityProfile | _Pending],
    tasks: Sequence[CalibrationSet],
    settings: SensSettings,
    folder: Path,
) -> dict[tuple[int, int], _Wanted]:
    """Every pair (model, expert on its own task), with what was kept of it: more experts or samples measure only what is new."""
    keys = [[hash_of(ids, mask)[:32] for ids, mask in zip(t.token_ids, t.loss_mask, strict=True)] for t in tasks]
    wanted: dict[tuple[int, int], _Wanted] = {}
    for model in range(len(found)):
        for task in range(len(found)):
            if model != task:
                inputs = hash_of(
                    "distances 2",
                    [found[model].fingerprint, found[task].fingerprint],
                    _picked(settings, _ALIGNMENT_KEYS),
                )
                kept = kept_record(folder, _pair_file(inputs), inputs, PairDistances.load)
                wanted[model, task] = _Wanted(inputs, keys[task], {} if kept is None else kept.samples)
    return wanted


def _pair_file(inputs: str) -> str:
    return f"distances/{inputs[:16]}.json"


def _alignment(models: RecipeModels, pairs: Mapping[tuple[int, int], _Wanted], work: Work, folder: Path) -> Alignment:
    """The record of all pairs; those that were measured now are kept on their own, too."""
    experts = len(models.names)
    per_sample = [[[0.0] * len(work.tasks[task].rows) for task in range(experts)] for _ in range(experts)]
    for (model, task), wanted in pairs.items():
        known = dict(wanted.known)
        if wanted.unknown:
            known |= zip((wanted.samples[at] for at in wanted.unknown), work.distances[model, task], strict=True)
            record = PairDistances(PairDistances.SCHEMA, models.names[model], models.names[task], known, wanted.inputs)
            record.save(folder / _pair_file(wanted.inputs))
        per_sample[model][task] = [known[key] for key in wanted.samples]
    alignment = Alignment(
        schema=Alignment.SCHEMA,
        models=list(models.names),
        distances=[[float(np.mean(samples)) for samples in row] for row in per_sample],
        per_sample=per_sample,
        inputs=hash_of("alignment 3", list(models.names), [[w.inputs, w.samples] for _, w in sorted(pairs.items())]),
    )
    if kept_record(folder, "alignment.json", alignment.inputs, Alignment.load) is None:
        alignment.save(folder / "alignment.json")
    return alignment


def _samples_of(found: SensitivityProfile | _Pending, needed: bool) -> CalibrationSet:
    """The samples of a task; none for a profile without them where they are not needed."""
    if isinstance(found, _Pending):
        return found.samples
    return calibration_set(found) if needed else CalibrationSet((), (), (), found.loss, 0)


def calibrate_models(
    recipe: Recipe, models: RecipeModels, data: CalibrationData, folder: Path, device: str, memory: str = "auto"
) -> Calibration:
    """Profiles (eq. 1-3) and distances (eq. 4) of a recipe, from `folder` where they are still valid, else measured and kept.

    Each model is loaded once, or streamed (`memory`: auto, resident, streamed). Raises CalibrationDataError before a model is
    loaded if the data cannot be used; NonFiniteError, InputFileError, ResourceError. Cost: K forward and backward passes over a
    task's samples, K(K-1) forward passes over a task's samples, and output heads for every pair.
    """
    settings = settings_of(recipe)
    check_same_tensors(models.donor, [expert for expert in models.experts if expert is not models.donor])
    found: list[SensitivityProfile | _Pending] = []
    faults = Faults()
    for index in range(len(models.experts)):
        with faults.gathered():
            found.append(_profile_or_samples(recipe, models, data, index, folder))
    faults.raise_all()
    _check_vocabularies(models, found)
    compared = RULES.get(settings.rule, where="sens.rule").needs_distances or all(
        isinstance(each, _Pending) or each.token_ids for each in found
    )
    tasks = [_samples_of(each, compared) for each in found]
    pairs = _pairs(models, found, tasks, settings, folder) if compared else {}
    sums = {
        at: SampleSums(folder / "samples" / f"{models.names[at]}.jsonl", each.samples_inputs)
        for at, each in enumerate(found)
        if isinstance(each, _Pending)
    }
    unmeasured = {at: each for at, each in sums.items() if any(row not in each.by_row for row in tasks[at].rows)}
    work = Work(tasks, unmeasured, {pair: wanted.unknown for pair, wanted in pairs.items() if wanted.unknown})
    if work.sums or work.pairs:
        measure(models, settings, work, device=device, memory=memory, scratch=folder)
    profiles: list[SensitivityProfile] = []
    for at, each in enumerate(found):
        profile = _profile_of(models, each, settings, sums[at]) if isinstance(each, _Pending) else each
        if isinstance(each, _Pending):
            profile.save(folder / "profiles" / f"{models.names[at]}.json")
        profiles.append(profile)
    return Calibration(tuple(profiles), _alignment(models, pairs, work, folder) if compared else None)
