"""The evaluation itself: load the model once, score every task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .. import progress
from ..checkpoints.folder import ModelFolder
from ..checkpoints.source import tokenizer_hashes
from ..errors import EvaluationError
from ..records import Scores, TaskScore, hash_of
from .tasks import TASKS, Item, Task


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    data_dir: str | Path | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> Scores:
    """The scores of the model in folder `model` on the named tasks, on their first `limit` items (None: all).

    `data_dir` holds the tasks' test files; None means the folder `test` beside the model. Raises RecipeError for an unknown
    task, EvaluationError for missing data and InputFileError for a folder without a model, all before a model is loaded.
    """
    model = Path(model)
    chosen = [TASKS.get(name, where="the tasks to evaluate") for name in dict.fromkeys(tasks)]
    fingerprint = _fingerprint(model)
    items = _all_items(chosen, _data_folder(model, data_dir), limit)
    from .language_model import LanguageModel

    results: dict[str, TaskScore] = {}
    with progress.task(f"evaluating {model.name}", len(chosen)) as advance:
        language_model = LanguageModel.load(model, device=device)
        for task in chosen:
            scored = task.score(language_model, items[task.name])
            results[task.name] = TaskScore.of(task.metric, [float(score) for score in scored])
            advance(1)
    return Scores(
        schema=Scores.SCHEMA,
        model=model.name,
        fingerprint=fingerprint,
        tasks=results,
        average=math.fsum(score.value for score in results.values()) / len(results),
        inputs=hash_of("evaluation", fingerprint, tokenizer_hashes(model), items),
    )


def _data_folder(model: Path, data_dir: str | Path | None) -> Path:
    """The folder of the test files, which must exist."""
    folder = model.resolve().parent / "test" if data_dir is None else Path(data_dir)
    if not folder.is_dir():
        raise EvaluationError(
            "there is no folder with test data",
            where=str(folder),
            why="no data folder was given, and there is none beside the model"
            if data_dir is None
            else "no such folder",
            fix="pass the folder that holds the test files: --data-dir DIR",
        )
    return folder


def _all_items(tasks: Sequence[Task], folder: Path, limit: int | None) -> dict[str, list[Item]]:
    """Every task's items; EvaluationError if there is no task, or `limit` leaves none."""
    if not tasks:
        raise EvaluationError(
            "there is nothing to evaluate",
            where="the tasks to evaluate",
            why="no task was named",
            fix=f"name one or more of: {', '.join(TASKS.names())}",
        )
    if limit is not None and limit < 1:
        raise EvaluationError(
            "there is nothing to evaluate",
            where=f"limit {limit}",
            why="a limit below 1 leaves no items",
            fix="use a limit of 1 or more, or none",
        )
    return {task.name: task.load(folder)[:limit] for task in tasks}


def _fingerprint(model: Path) -> str:
    """The model's identity; see ModelFolder.fingerprint."""
    with ModelFolder(model) as source:
        return source.fingerprint()
