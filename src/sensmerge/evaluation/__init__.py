"""Evaluation: a model folder and a list of tasks in, `Scores` out. Importing it loads neither torch nor transformers."""

from __future__ import annotations

from ..records import Scores, TaskScore
from .run import evaluate
from .tasks import TASKS, Item, Task, read_items

__all__ = ["TASKS", "Item", "Scores", "Task", "TaskScore", "evaluate", "read_items"]
