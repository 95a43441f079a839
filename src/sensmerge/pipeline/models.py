"""The models of a recipe, found and opened: base and experts with their names, identities and calibration files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..checkpoints.locate import locate
from ..checkpoints.source import ModelFolder
from ..errors import CalibrationDataError
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
    return RecipeModels(base, experts, tuple(expert_names([expert.model for expert in recipe.models])))


def find_file(recipe: Recipe, name: str, line: int) -> Path:
    """A calibration file or profile named in `recipe`. Raises CalibrationDataError naming the places that were tried."""
    tried = [folder / Path(name).expanduser() for folder in search_folders(recipe)]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise CalibrationDataError(
            f"there is no calibration file '{name}'",
            where=recipe.where(line),
            why=f"tried {', '.join(dict.fromkeys(str(path) for path in tried))}",
            fix="write the path of a .jsonl file (hub data sets: download the file first)",
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
