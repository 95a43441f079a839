"""What a task is, and the registry that finds one by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EvaluationError
from ..registry import Registry

if TYPE_CHECKING:
    from .language_model import LanguageModel

Item = Mapping[str, Any]
"""One test item: whatever the task's `load` made and its `score` understands."""


@dataclass(frozen=True)
class Task:
    """A test: `load(data_dir)` gives its items, `score(model, items)` a number of 0..1 for each, in the same order."""

    name: str
    metric: str
    load: Callable[[Path], list[Item]]
    score: Callable[[LanguageModel, list[Item]], list[float]]


TASKS: Registry[Task] = Registry(
    "task",
    {name: f"sensmerge.zoo.tasks:{name.upper()}" for name in ("chat", "math", "code")},
    "sensmerge.tasks",
)


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL file, one object a line; EvaluationError if there is no such file or a line is not an object."""
    if not path.is_file():
        raise EvaluationError(
            f"there is no test file {path.name}",
            where=str(path),
            why="the task reads its items from this file in the data folder",
            fix="pass the folder that holds it: --data-dir DIR",
        )
    items: list[Item] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise _bad_line(path, number, str(error)) from error
        if not isinstance(item, dict):
            raise _bad_line(path, number, "it is not a JSON object")
        items.append(item)
    if not items:
        raise _bad_line(path, 1, "the file is empty")
    return items


def _bad_line(path: Path, number: int, why: str) -> EvaluationError:
    return EvaluationError(
        "a test file cannot be read",
        where=f"{path}, line {number}",
        why=why,
        fix="the file must hold one JSON object a line; make it again, or correct the line",
    )
