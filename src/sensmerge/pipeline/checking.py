"""What is checked before anything is merged: the output, the models side by side, the vocabularies."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

from .. import progress
from ..checkpoints.configs import KEYS, differences, normal_config
from ..checkpoints.conforming import is_untied
from ..checkpoints.related import LIMIT, distances_from
from ..checkpoints.source import Checkpoint
from ..checkpoints.staging import has_entries, lock_file, work_folder
from ..checkpoints.vocabulary.tensors import vocabulary_rows, vocabulary_tensors
from ..errors import Faults, IncompatibleModelsError, OutputError, RecipeError
from ..matching import match_tensors
from ..methods import METHODS
from ..plan import unmatched_filters
from ..records import MergePlan, Recipe
from ..registry import suggestion
from .models import RecipeModels, named_files
from .unlike_vocabularies import check_same_vocabulary

# The checks of sensmerge's own that `allow:` can switch off; beside these it takes keys of config.json.
CHECKS = ("adapter_base", "symlinks", "unrelated")


def _refuse_output(what: str, out: Path, why: str, fix: str = "choose another output folder") -> OutputError:
    return OutputError(what, where=str(out), why=why, fix=fix)


def _command(recipe: Recipe, out: Path) -> str:
    return shlex.join(["sensmerge", "merge", str(recipe.path), str(out)])


def _has_entries(out: Path) -> bool:
    """Is there anything in the output folder? Raises OutputError where that cannot be seen."""
    try:
        return has_entries(out)
    except OSError as error:
        raise _refuse_output("the output folder cannot be looked into", out, str(error)) from error


def check_name(out: Path) -> None:
    """Raise OutputError for a name so long that its lock and its work folder beside it could have none."""
    try:
        longest = os.pathconf(next(folder for folder in out.resolve().parents if folder.is_dir()), "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = 255
    beside = lock_file(out).name
    if len(os.fsencode(beside)) > longest:
        raise _refuse_output(
            "the output folder's name is too long",
            out,
            f"the lock beside it, .NAME.sensmerge.lock, would have {len(os.fsencode(beside))} bytes, {longest} are allowed",
            "choose a shorter name",
        )


def check_empty(recipe: Recipe, out: Path) -> None:
    """Raise OutputError unless `out` is absent or empty."""
    if _has_entries(out):
        raise _refuse_output(
            "the output folder is not empty",
            out,
            "nothing that exists is overwritten unless you say so",
            f"choose another folder, or replace all of this one: {_command(recipe, out)} --overwrite",
        )


def check_place(recipe: Recipe, models: RecipeModels, out: Path, kept: Path) -> None:
    """Raise OutputError if `out` cannot be a folder of its own, or holds, is or lies in anything that this merge reads."""
    target, work = out.resolve(), work_folder(out)
    for model in models.all:
        for folder in model.folders:
            if target == folder or target in folder.parents or folder in target.parents:
                raise _refuse_output(
                    "the output folder would overwrite a model of the recipe",
                    out,
                    f"it is, holds, or lies in the folder of '{model.label}'",
                )
            if work in (folder, *folder.parents):
                raise _refuse_output(
                    "the work on this output would overwrite a model of the recipe",
                    out,
                    f"'{model.label}' lies in {work}, where merges into this output are kept until they are complete",
                    "move that model elsewhere, or choose another output folder",
                )
    if out.exists() and not out.is_dir():
        raise _refuse_output("the output exists and is no folder", out, "a file is in its place", "choose another name")
    if target == Path.cwd() or target.is_mount():
        raise _refuse_output(
            "the output folder cannot be renamed into place",
            out,
            "it is the current folder, or a disk is mounted there",
            _command(recipe, out / "merged"),
        )
    for needed in (recipe.path, kept, *named_files(recipe)):
        place = needed.resolve()
        if work in (place, *place.parents) or (_has_entries(out) and target in (place, *place.parents)):
            raise _refuse_output("the output folder holds what this merge needs", out, f"{needed} lies in it")


def check_tokenizers(recipe: Recipe, models: RecipeModels) -> None:
    """Without a policy for tokens, all models share one vocabulary; raises IncompatibleModelsError with the lines to add."""
    if recipe.tokenizer is None:
        check_same_vocabulary(recipe, models.readers)


def rows_alone_differ(models: RecipeModels) -> bool:
    """Whether the models have unlike numbers of vocabulary rows, and tensors that fit together but for these."""

    def others(model: Checkpoint) -> dict[str, tuple[int, ...]]:
        rows = set(vocabulary_tensors(model))
        return {name: spec.shape for name, spec in model.tensors.items() if name not in rows}

    sizes = {vocabulary_rows(model) for model in models.all}
    return len(sizes) > 1 and all(others(model) == others(models.donor) for model in models.all)


def check_models(recipe: Recipe, models: RecipeModels, *, tensors: bool = True) -> None:
    """All that tensors, configs and distances from the base say of models that do not fit together, told at once.

    Without `tensors` their names and shapes are not compared: what differs there was told by another check.
    """
    method = METHODS.get(recipe.merge_method, where=recipe.where())
    faults = Faults()
    with faults.gathered():
        check_allowed(recipe, models)
    # A misspelt name must not come back in the lines that the other checks ask for.
    recipe = replace(recipe, allow=recipe.allow & _known_checks(models))
    before = len(faults.found)
    if tensors:
        with faults.gathered():
            match_tensors(recipe, method, models.readers, with_base=recipe.sens is not None)
    with faults.gathered():
        check_configs(recipe, models, tensors_fit=len(faults.found) == before)
    with faults.gathered():
        check_related(recipe, models)
    with faults.gathered():
        _check_tuned_head(recipe, models)
    faults.raise_all()


def _check_tuned_head(recipe: Recipe, models: RecipeModels) -> None:
    """`lambda: auto` runs the base with the merged weights in it, which must have a place for each; raises RecipeError."""
    if recipe.lambda_ == "auto" and models.base is not None and is_untied(models.base):
        raise RecipeError(
            "`lambda: auto` is not supported where the base ties its head and another model does not",
            where=recipe.where(),
            why=f"λ is chosen by running {models.base.label}, which has one matrix where the merged model has two",
            fix="write a number as `lambda`",
        )


def check_allowed(recipe: Recipe, models: RecipeModels) -> None:
    """Every name in `allow:` is a check or a key of some model's config.json; raises RecipeError naming those that are not."""
    known = _known_checks(models)
    unknown = sorted(recipe.allow - known)
    if unknown:
        near = [suggestion(name, known) for name in unknown]
        rest = sorted(recipe.allow & known | {name for name in near if name is not None})
        meant = "; ".join(
            f"'{name}': did you mean '{other}'?" if other else f"'{name}' is like no known name"
            for name, other in zip(unknown, near, strict=True)
        )
        raise RecipeError(
            f"`allow:` names {len(unknown)} check(s) that do not exist",
            where=recipe.where(),
            why=f"{meant} Known are {', '.join(CHECKS)} and the keys of config.json",
            fix=f"write `allow: [{', '.join(rest)}]`" if rest else "remove `allow:`",
        )


def _known_checks(models: RecipeModels) -> set[str]:
    """Every name that `allow:` may have for these models."""
    keys = {key.rpartition(".")[2] for model in models.all for key in (*normal_config(model.config), *model.config)}
    return {*CHECKS, *keys, *(key for key in KEYS["mathematics"] if "*" not in key)}


def check_configs(recipe: Recipe, models: RecipeModels, *, tensors_fit: bool = True) -> None:
    """The configs agree on what changes the mathematics, but for keys in `allow:`; other differences are told in one note.

    Raises IncompatibleModelsError naming every key with the value that each model has. Unless `tensors_fit`, which no `allow:`
    mends, it offers none.
    """
    found = differences(models.all, stacked=bool(recipe.slices), allowed=recipe.allow)
    # These follow the model that the tokens come from.
    found = [each for each in found if each.key not in models.tokenizer.config_ids]
    wrong = [each for each in found if each.matters and each.name not in recipe.allow]
    others = [each for each in found if each not in wrong]
    if others:
        progress.message(
            f"config.json differs between the models, and the merged model has that of {models.donor.label}: "
            + " | ".join(each.told() for each in others)
        )
    if wrong:
        names = ", ".join(sorted({each.name for each in wrong} | recipe.allow))
        raise IncompatibleModelsError(
            f"the models' config.json differ in {len(wrong)} key(s) that change what a model computes",
            where=", ".join(model.label for model in models.all),
            why=" | ".join(each.told() for each in wrong),
            fix="merge models that agree"
            + (
                f"; or, to take all from {models.donor.label}, add `allow: [{names}]` to the recipe"
                if tensors_fit
                else ""
            ),
        )


def check_related(recipe: Recipe, models: RecipeModels) -> dict[str, float]:
    """‖δ‖/‖θ_0‖ of each expert by its name, empty for methods without task vectors; raises IncompatibleModelsError over 1.

    `allow: [unrelated]` switches the error off. Cost: a few reads a matrix.
    """
    method = METHODS.get(recipe.merge_method, where=recipe.where())
    takes_vectors = method.vectors != "never" or recipe.sens is not None
    if models.base is None or not takes_vectors:
        return {}
    pairs = zip(recipe.models, models.experts, strict=True)
    experts = {each.model: reader for each, reader in pairs if reader is not models.base}
    ratios = distances_from(models.base, experts)
    far = {model: ratio for model, ratio in ratios.items() if ratio > LIMIT}
    if far and "unrelated" not in recipe.allow:
        names = ", ".join(sorted({"unrelated"} | recipe.allow))
        raise IncompatibleModelsError(
            f"{len(far)} model(s) were not fine-tuned from this base",
            where=f"{', '.join(far)}; base {recipe.base_model}",
            why="; ".join(f"‖θ − θ_0‖ / ‖θ_0‖ is {ratio:.2f} for {model}" for model, ratio in far.items())
            + ": a fine-tune stays well below 1, and two models without a common origin stand at about 1.4",
            fix=f"name the base they came from as `base_model`; or, if you know better, add `allow: [{names}]` to the recipe",
        )
    return ratios


def tell_unmatched_filters(recipe: Recipe, plan: MergePlan) -> None:
    """Warn of filters that no tensor's name contains: what stands beside them changes nothing."""
    for each in unmatched_filters(recipe, plan):
        progress.warning(f"{recipe.where()}: `filter: {each}` is part of no tensor's name, so its value is not used")
