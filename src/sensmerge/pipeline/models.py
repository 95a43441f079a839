"""The models of a recipe, found and opened: base and experts with their names, identities and calibration files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..checkpoints.locate import locate
from ..checkpoints.source import ModelFolder
from ..errors import CalibrationDataError, RecipeError
from ..records import Recipe, SensSource


def expert_names(models: Sequence[str]) -> list[str]:
    """The last component of each `model:` string (the adapter's for base+adapter), then -2, -3 where it is taken."""
    names: list[str] = []
    for model in models:
        stem = model.rpartition("+")[2].rstrip("/").rpartition("/")[2].partition("@")[0] or "model"
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


@dataclass(frozen=True)
class RecipeModels:
    """The open models of a recipe, experts in recipe order. Close it, or use it in a `with` block."""

    base: ModelFolder | None
    experts: tuple[ModelFolder, ...]
    names: tuple[str, ...]

    def __enter__(self) -> RecipeModels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for model in self.all:
                stack.callback(model.close)

    @property
    def all(self) -> tuple[ModelFolder, ...]:
        """The base, if there is one, then the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)


def search_folders(recipe: Recipe) -> list[Path]:
    """Where relative paths of a recipe are tried: its own folder, then the current one."""
    return [recipe.path.resolve().parent, Path.cwd()]


def open_models(recipe: Recipe) -> RecipeModels:
    """Find and open every model of `recipe`; reads configs and headers. Raises InputFileError or IncompatibleModelsError."""
    folders = search_folders(recipe)
    base = None
    if recipe.base_model is not None:
        where = f"base_model in {recipe.where()}"
        base = ModelFolder(locate(recipe.base_model, folders, where=where), recipe.base_model)
    experts = tuple(
        ModelFolder(locate(expert.model, folders, where=recipe.where(expert.line)), expert.model)
        for expert in recipe.models
    )
    seen = {} if base is None or recipe.merge_method == "linear" else {base.path: base.label}
    for model, entry in zip(experts, recipe.models, strict=True):
        if model.path in seen:
            raise RecipeError(
                f"'{model.label}' and '{seen[model.path]}' are one folder",
                where=recipe.where(entry.line),
                why="each model counts once, and the base has no task vector",
                fix="remove one of the two",
            )
        seen[model.path] = model.label
    return RecipeModels(base, experts, tuple(expert_names([expert.model for expert in recipe.models])))


def _places(recipe: Recipe, name: str) -> list[Path]:
    return [folder / Path(name).expanduser() for folder in search_folders(recipe)]


def named_files(recipe: Recipe) -> list[Path]:
    """The calibration files and profiles of `recipe` that exist."""
    names = [
        name for expert in recipe.models if expert.sens for name in (expert.sens.data, expert.sens.profile) if name
    ]
    return [path for name in names for path in _places(recipe, name) if path.is_file()]


def find_file(recipe: Recipe, name: str, line: int) -> Path:
    """A calibration file or profile named in `recipe`. Raises CalibrationDataError naming the places that were tried."""
    tried = _places(recipe, name)
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise CalibrationDataError(
            f"there is no file '{name}'",
            where=recipe.where(line),
            why=f"tried {', '.join(dict.fromkeys(str(path) for path in tried))}",
            fix="write the path of an existing file: samples as .jsonl (hub data sets: download them first), a profile as .json",
        )
    return found


def source_of(recipe: Recipe, index: int) -> SensSource:
    """Where expert `index` is calibrated from; raises CalibrationDataError if the recipe does not say."""
    expert = recipe.models[index]
    if expert.sens is None:
        raise CalibrationDataError(
            f"model '{expert.model}' has no calibration data",
            where=recipe.where(expert.line),
            why="the recipe's `sens:` block measures every expert on samples of its own task",
            fix="add `sens: {data: FILE.jsonl}` to this model",
        )
    return expert.sens
