"""From a calibration to coefficients: no model is loaded, so a sweep of temperatures or rules costs milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..checkpoints.families import group_tensors
from ..checkpoints.source import parameters_of
from ..errors import InputFileError
from ..records import Alignment, Coefficients, Recipe, SensitivityProfile, SensSettings, hash_of
from ..rules import RULES
from ..rules.compute import Measurements, compute
from ..rules.intervals import PerSample
from ..rules.presets import PRESETS
from ..sens_block import settings_of
from ..settings import LAMBDA
from .calibrating import Calibration
from .models import RecipeModels


def measurements(
    profiles: Sequence[SensitivityProfile], alignment: Alignment | None, names: Sequence[str]
) -> Measurements:
    """What the rules start from. Without an alignment all distances are zero, and τ is 1/K.

    Raises InputFileError for profiles of different layers, or an alignment of other models.
    """
    first = profiles[0]
    for profile in profiles[1:]:
        if (profile.layers, profile.score, profile.loss) != (first.layers, first.score, first.loss):
            raise InputFileError(
                "these profiles cannot be combined",
                where=f"profiles of '{first.model}' and '{profile.model}'",
                why="they differ in layers, score or loss",
                fix="calibrate all experts with the same settings",
            )
    if alignment is not None and len(alignment.models) != len(profiles):
        raise InputFileError(
            "the alignment does not belong to these profiles",
            where=", ".join(alignment.models),
            why=f"it has {len(alignment.models)} models, there are {len(profiles)} profiles",
            fix="run `sensmerge calibrate` again",
        )
    grouping = group_tensors({tensor for profile in profiles for tensor in profile.tensors})

    def outside(profile: SensitivityProfile, role: str) -> float:
        own = [total for tensor, total in profile.tensors.items() if grouping.group_of[tensor] == role]
        # A tied matrix is measured once, with both its uses, though another expert's head makes it two.
        return outside(profile, "embed") if not own and role == "lm_head" else math.fsum(own)

    zero = [[0.0] * len(profiles) for _ in profiles]
    return Measurements(
        models=tuple(names),
        layers=tuple(first.layers),
        sensitivity=np.array([profile.sensitivity for profile in profiles]),
        outside={role: np.array([outside(profile, role) for profile in profiles]) for role in grouping.roles},
        distances=np.array(zero if alignment is None else alignment.distances),
        per_sample=_per_sample(profiles, alignment),
        inputs=hash_of([profile.inputs for profile in profiles], None if alignment is None else alignment.inputs),
    )


def _per_sample(profiles: Sequence[SensitivityProfile], alignment: Alignment | None) -> PerSample | None:
    """What each sample added; None if a profile or the alignment does not tell it for the same samples."""
    sizes = [len(profile.per_sample) for profile in profiles]
    if alignment is None:
        distances = [[np.zeros(size) for size in sizes] for _ in profiles]
    else:
        distances = [[np.array(samples) for samples in row] for row in alignment.per_sample]
    told = all(len(sums) == len(profile.layers) for profile in profiles for sums in profile.per_sample) and all(
        len(samples) == size for row in distances for samples, size in zip(row, sizes, strict=True)
    )
    if not told or not all(sizes):
        return None
    return PerSample(
        sensitivity=[np.array(profile.per_sample) for profile in profiles],
        distances=distances,
        keys=[profile.inputs for profile in profiles],
    )


def unmeasured(models: RecipeModels, settings: SensSettings) -> Measurements:
    """Measurements for a rule that needs none: every layer alike, every expert alike."""
    grouping = group_tensors(list(models.experts[0].tensors), settings.group)
    experts = len(models.experts)
    return Measurements(
        models=models.names,
        layers=grouping.layers,
        sensitivity=np.zeros((experts, len(grouping.layers))),
        outside={role: np.zeros(experts) for role in grouping.roles},
        distances=np.zeros((experts, experts)),
        inputs=hash_of("unmeasured", [model.fingerprint() for model in models.experts]),
    )


def needs_calibration(recipe: Recipe) -> bool:
    """Whether anything must be measured: not for a rule without data whose λ is a number and whose models name no data."""
    rule = RULES.get(settings_of(recipe).rule, where="sens.rule")
    named = any(expert.sens is not None for expert in recipe.models)
    return rule.needs_sensitivity or rule.needs_distances or named or recipe.lambda_ == "auto"


def sized(recipe: Recipe, models: RecipeModels) -> Recipe:
    """`recipe` with λ and T filled in by model size, where its preset says so and it names none itself."""
    settings = recipe.sens
    if settings is None or not PRESETS[settings.preset].by_size:
        return recipe
    scale, temperature = PRESETS[settings.preset].for_size(parameters_of(models.donor))
    sens = settings if settings.temperature is not None else replace(settings, temperature=temperature)
    return replace(recipe, sens=sens, lambda_=scale if recipe.lambda_ is None else recipe.lambda_)


def preset_scale(recipe: Recipe) -> float | None:
    """The λ that a preset chose for the whole merge; None where the recipe names its own, perhaps by tensor, or none at all."""
    levels = (recipe.parameters, *(part.parameters for part in recipe.slices))
    named = any(LAMBDA.name in level for level in levels)
    return recipe.lambda_ if isinstance(recipe.lambda_, float) and not named else None


def coefficients_of(recipe: Recipe, models: RecipeModels, calibration: Calibration | None) -> Coefficients:
    """The coefficients of a recipe (already `sized`); λ stays null while it is `auto`."""
    settings = settings_of(recipe)
    measured = (
        unmeasured(models, settings)
        if calibration is None
        else measurements(calibration.profiles, calibration.alignment, models.names)
    )
    scale = 1.0 if recipe.lambda_ is None else recipe.lambda_
    return compute(
        measured,
        settings,
        weights=[expert.weight for expert in recipe.models],
        scale=None if isinstance(scale, str) else scale,
    )
