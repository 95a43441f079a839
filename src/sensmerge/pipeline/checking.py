"""What is checked before anything is merged: the output, the models side by side, the vocabularies."""

from __future__ import annotations

from pathlib import Path

from .. import progress
from ..checkpoints.vocabulary import check_same_chat_template, check_same_vocabulary
from ..errors import OutputError
from ..plan import unmatched_filters
from ..records import MergePlan, Recipe
from .companions import tokenizer_donor
from .models import RecipeModels, named_files


def _refuse_output(what: str, out: Path, why: str, fix: str = "choose another output folder") -> OutputError:
    return OutputError(what, where=str(out), why=why, fix=fix)


def check_output(recipe: Recipe, models: RecipeModels, out: Path, kept: Path, overwrite: bool) -> None:
    """Raise OutputError unless `out` is absent, empty, or may be overwritten; never if it holds anything this merge reads.

    `kept` is where the calibration is kept.
    """
    check_place(recipe, models, out, kept)
    if not overwrite:
        check_empty(recipe, out)


def check_empty(recipe: Recipe, out: Path) -> None:
    """Raise OutputError unless `out` is absent or empty."""
    if out.is_dir() and any(out.iterdir()):
        raise _refuse_output(
            "the output folder is not empty",
            out,
            "nothing that exists is overwritten unless you say so",
            f"choose another folder, or replace all of this one: sensmerge merge {recipe.path} {out} --overwrite",
        )


def check_place(recipe: Recipe, models: RecipeModels, out: Path, kept: Path) -> None:
    """Raise OutputError if `out` cannot be a folder of its own, or holds, is or lies in anything that this merge reads."""
    target = out.resolve()
    for model in models.all:
        for folder in model.folders:
            if target == folder or target in folder.parents or folder in target.parents:
                raise _refuse_output(
                    "the output folder would overwrite a model of the recipe",
                    out,
                    f"it is, holds, or lies in the folder of '{model.label}'",
                )
    if out.exists() and not out.is_dir():
        raise _refuse_output("the output exists and is no folder", out, "a file is in its place", "choose another name")
    if target == Path.cwd() or target.is_mount():
        raise _refuse_output(
            "the output folder cannot be renamed into place",
            out,
            "it is the current folder, or a disk is mounted there",
            f"sensmerge merge {recipe.path} {out / 'merged'}",
        )
    if not out.is_dir() or not any(out.iterdir()):
        return
    for needed in (recipe.path, kept, *named_files(recipe)):
        if target in needed.resolve().parents or target == needed.resolve():
            raise _refuse_output("the output folder holds what this merge needs", out, f"{needed} lies in it")


def check_tokenizers(recipe: Recipe, models: RecipeModels) -> None:
    """All models share one vocabulary, and where the recipe asks for it one template; raises IncompatibleModelsError."""
    check_same_vocabulary(models.all)
    if recipe.chat_template == "auto":
        check_same_chat_template(models.all, tokenizer_donor(recipe, models))


def tell_unmatched_filters(recipe: Recipe, plan: MergePlan) -> None:
    """Warn of filters that no tensor's name contains: what stands beside them changes nothing."""
    for each in unmatched_filters(recipe, plan):
        progress.warning(f"{recipe.where()}: `filter: {each}` is part of no tensor's name, so its value is not used")
