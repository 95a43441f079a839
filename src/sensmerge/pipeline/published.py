"""Profiles that another calibration made: `sens: {profile: X.json}`, taken only where they belong to the model and the settings."""

from __future__ import annotations

import math
from dataclasses import replace

from ..checkpoints.families import group_tensors
from ..errors import IncompatibleModelsError, InputFileError
from ..records import Recipe, SensitivityProfile
from ..sens_block import CHOICES, settings_of
from .models import RecipeModels, find_file


def published_profile(recipe: Recipe, models: RecipeModels, index: int, name: str) -> SensitivityProfile:
    """A profile named in the recipe, refused unless it was made from this very model with these settings.

    One of finer groups than the recipe's is summed up to them. Raises InputFileError.
    """
    path = find_file(recipe, name, recipe.models[index].line)
    profile = SensitivityProfile.load(path)
    settings, expert = settings_of(recipe), models.experts[index]
    grouped = regrouped(profile, settings.group)
    wrong = [
        fault
        for fault, bad in (
            (f"it was made from another model than {expert.path}", profile.fingerprint != expert.fingerprint()),
            (f"it has loss: {profile.loss}, the recipe {settings.loss}", profile.loss != settings.loss),
            (f"it has score: {profile.score}, the recipe {settings.score}", profile.score != settings.score),
            (f"its layers are not the groups of group: {settings.group}", grouped is None),
        )
        if bad
    ]
    if wrong or grouped is None:
        raise InputFileError(
            f"this profile does not belong to '{expert.label}' in this recipe",
            where=str(path),
            why="; ".join(wrong),
            fix="use `sens: {data: FILE.jsonl}` to measure the model again",
        )
    return grouped


def regrouped(profile: SensitivityProfile, group: str) -> SensitivityProfile | None:
    """`profile` with the layers of `group`; None where its own are no parts of these, so that its samples cannot be summed up.

    From tensor to module to block: a sum over tensors is not told apart again.
    """
    wanted = group_tensors(profile.tensors, group)
    if list(wanted.layers) == profile.layers:
        return profile
    # From coarse to fine; the groups of `module` cannot be told of every architecture, but then none was measured with them.
    for kind in CHOICES["group"][CHOICES["group"].index(group) + 1 :]:
        try:
            own = group_tensors(profile.tensors, kind)
        except IncompatibleModelsError:
            continue
        if list(own.layers) == profile.layers:
            part_of = {own.group_of[name]: wanted.group_of[name] for name in profile.tensors}
            break
    else:
        return None
    members = [[at for at, layer in enumerate(profile.layers) if part_of[layer] == whole] for whole in wanted.layers]
    sums = [[math.fsum(sample[at] for at in each) for each in members] for sample in profile.per_sample]
    return replace(
        profile,
        layers=list(wanted.layers),
        sensitivity=[math.fsum(profile.sensitivity[at] for at in each) for each in members],
        per_sample=sums,
    )
