"""The models of a recipe, found and opened: base and experts with their names, identities and calibration files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from .. import progress
from ..checkpoints.conforming import conformed
from ..checkpoints.opening import Opening
from ..checkpoints.source import Checkpoint
from ..errors import CalibrationDataError, Faults, RecipeError
from ..matching import donor_of
from ..methods import METHODS
from ..records import Recipe, SensSource, TokenizerPolicy
from .vocabularies import TokenizerPlan, aligned


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
    """The open models of a recipe: experts in recipe order, and every model by its string. Close it, or use it in a `with` block.

    `base` is the recipe's base_model; `donor` is where the config comes from: the base, else the first model. `tokenizer` says
    which tokens the merged model has; the readers show their rows. `commits` has the commit of each
    model that came from the hub.
    """

    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    readers: Mapping[str, Checkpoint]
    donor: Checkpoint
    tokenizer: TokenizerPlan
    commits: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> RecipeModels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for model in self.all:
                stack.callback(model.close)

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        """Every model once: the base, if there is one, then the experts, then bases of slices."""
        return tuple(self.readers.values())


def search_folders(recipe: Recipe) -> list[Path]:
    """Where relative paths of a recipe are tried: folders it was given, its own folder, then the current one."""
    return [*recipe.folders, recipe.path.resolve().parent, Path.cwd()]


def open_models(recipe: Recipe, *, allow_pickle: bool = False) -> RecipeModels:
    """Find and open every model of `recipe`, all under the donor's names; tells the faults of all models at once.

    Reads configs and headers; more only of a model that stores a tied head (`conformed`).

    Raises InputFileError or IncompatibleModelsError, RecipeError where two names lead to one model.
    """
    opening = Opening(search_folders(recipe), recipe.allow, allow_pickle)
    readers: dict[str, Checkpoint] = {}
    places = _places_of_models(recipe)
    faults = Faults()
    with ExitStack() as opened:
        for model, where in places.items():
            with faults.gathered():
                readers[model] = opening.open(model, where=where)
                opened.callback(readers[model].close)
        faults.raise_all()
        _check_one_name_each(recipe, readers, places)
        readers = conformed(readers, recipe.base_model or recipe.models[0].model)
        readers, tokenizer = aligned(recipe, readers)
        opened.pop_all()
    return RecipeModels(
        base=None if recipe.base_model is None else readers[recipe.base_model],
        experts=tuple(readers[expert.model] for expert in recipe.models),
        names=tuple(expert_names([expert.model for expert in recipe.models])),
        readers=readers,
        donor=donor_of(recipe, readers),
        tokenizer=tokenizer,
        commits=opening.commits,
    )


def realigned(recipe: Recipe, models: RecipeModels) -> RecipeModels:
    """`models` with the rows of the base's tokens (the first model's, without a base), as `tokenizer: {source: base}` asks for.

    For what else is to be told of models whose vocabularies differ. Raises what `aligned` raises.
    """
    policy = TokenizerPolicy("base", None, (), None, 1)
    with progress.listening(None):
        readers, tokenizer = aligned(replace(recipe, tokenizer=policy, sens=None), models.readers)
    return replace(
        models,
        base=None if recipe.base_model is None else readers[recipe.base_model],
        experts=tuple(readers[expert.model] for expert in recipe.models),
        readers=readers,
        donor=donor_of(recipe, readers),
        tokenizer=tokenizer,
    )


def _places_of_models(recipe: Recipe) -> dict[str, str]:
    """Every model of the recipe once, with the place that names it: the base, the experts, bases of slices."""
    places = {} if recipe.base_model is None else {recipe.base_model: f"base_model in {recipe.where()}"}
    for expert in recipe.models:
        places.setdefault(expert.model, recipe.where(expert.line))
    for part in recipe.slices:
        if part.base_model is not None:
            places.setdefault(part.base_model, recipe.where(part.line))
    return places


def _check_one_name_each(recipe: Recipe, readers: Mapping[str, Checkpoint], places: Mapping[str, str]) -> None:
    """No model is merged twice under two names, nor is a base that task vectors are taken from merged under another."""
    member = METHODS.get(recipe.merge_method, where=recipe.where()).base == "member"
    merged = {expert.model for expert in recipe.models}
    seen: dict[tuple[Path, ...], str] = {}
    for model, reader in readers.items():
        if member and model not in merged:
            continue
        if reader.folders in seen:
            raise RecipeError(
                f"'{model}' and '{seen[reader.folders]}' are one model",
                where=places[model],
                why="each model counts once, and the base has no task vector",
                fix="remove one of the two",
            )
        seen[reader.folders] = model


def local_places(recipe: Recipe, name: str) -> list[Path]:
    """Where a path of `recipe` may lie, in the order in which it is tried."""
    return [folder / Path(name).expanduser() for folder in search_folders(recipe)]


def named_files(recipe: Recipe) -> list[Path]:
    """The calibration files and profiles of `recipe` that exist."""
    names = [
        name for expert in recipe.models if expert.sens for name in (expert.sens.data, expert.sens.profile) if name
    ]
    return [path for name in names for path in local_places(recipe, name) if path.is_file()]


def find_file(recipe: Recipe, name: str, line: int) -> Path:
    """A calibration file or profile named in `recipe`. Raises CalibrationDataError naming the places that were tried."""
    tried = local_places(recipe, name)
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise CalibrationDataError(
            f"there is no file '{name}'",
            where=recipe.where(line),
            why=f"tried {', '.join(dict.fromkeys(str(path) for path in tried))}",
            fix="write the path of a file of samples (.jsonl, .json, .parquet) or of a profile (.json), or a data set of the hub",
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
