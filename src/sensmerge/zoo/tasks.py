"""The family's three tests as ordinary evaluation tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..evaluation.language_model import LanguageModel
from ..evaluation.tasks import Item, Task, read_items
from .executing import Program, checked_expression, run_programs

MATH_TOKENS = 16
CODE_TOKENS = 64


def _reader(name: str) -> Callable[[Path], list[Item]]:
    """Reads `<name>.jsonl` from the data folder."""
    return lambda folder: read_items(folder / f"{name}.jsonl")


def score_chat(model: LanguageModel, items: list[Item]) -> list[float]:
    """1 where the right choice has the largest log-likelihood of all choices after the prompt (the first one, if tied)."""
    pairs = [(item["prompt"], choice) for item in items for choice in item["choices"]]
    values = iter(model.log_likelihoods(pairs))
    scores = []
    for item in items:
        likelihoods = [next(values) for _ in item["choices"]]
        scores.append(float(likelihoods.index(max(likelihoods)) == item["answer"]))
    return scores


def score_math(model: LanguageModel, items: list[Item]) -> list[float]:
    """1 where what was generated after the last `=` is exactly the answer."""
    answers = model.generate([item["prompt"] for item in items], MATH_TOKENS)
    return [float(final_number(text) == item["answer"]) for text, item in zip(answers, items, strict=True)]


def final_number(text: str) -> str | None:
    """What stands behind the last `=`; None if there is none."""
    _, equals, number = text.rpartition("=")
    return number.strip() if equals else None


def score_code(model: LanguageModel, items: list[Item]) -> list[float]:
    """1 where the generated one-line program passes all hidden tests."""
    return grade_programs(model.generate([item["prompt"] for item in items], CODE_TOKENS), items)


def grade_programs(answers: list[str], items: list[Item]) -> list[float]:
    """1 for each answer that is a harmless expression and passes its item's tests; it is not run if it is not harmless."""
    expressions = [checked_expression(text, item["argument"]) for text, item in zip(answers, items, strict=True)]
    programs = [
        Program(argument=item["argument"], expression=expression, tests=item["tests"])
        for expression, item in zip(expressions, items, strict=True)
        if expression is not None
    ]
    passed = iter(run_programs(programs))
    return [0.0 if expression is None else float(next(passed)) for expression in expressions]


CHAT = Task(name="chat", metric="accuracy (log-likelihood)", load=_reader("chat"), score=score_chat)
MATH = Task(name="math", metric="exact match", load=_reader("math"), score=score_math)
CODE = Task(name="code", metric="pass@1 (hidden tests)", load=_reader("code"), score=score_code)
