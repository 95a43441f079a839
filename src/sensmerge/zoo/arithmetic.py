"""The math domain: additions and subtractions of numbers up to 19 as word problems, answered by an equation.

Held out for the test are whole *problems*, not their spellings: an operation with an unordered pair of operands. If 3 + 5 is
held out, so is 5 + 3; if 8 - 5 is, so is every text that asks for it (5 - 8 never occurs: answers are not negative).
"""

from __future__ import annotations

import random

from .documents import Document, question, seeded, statement
from .names import FIRST_NAMES

LARGEST = 19
TABLES = 10
"""Problems of two numbers up to this are the tables, which are always taught: what is asked can be put together from them."""
HELD_OUT = 0.1
"""The part of the other problems that only the test asks."""

Problem = tuple[str, int, int]
"""(operation, larger operand, smaller operand)"""

NOUNS = ("apples", "books", "coins", "cards", "stamps", "pens", "eggs", "shells")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "+": (
        "{name} has {a} {noun} and buys {b} more. How many now?",
        "There are {a} {noun}. {name} adds {b}. How many now?",
        "{name} finds {a} {noun}, then {b} more. How many in total?",
    ),
    "-": (
        "{name} has {a} {noun} and gives away {b}. How many now?",
        "There are {a} {noun}. {name} takes {b}. How many now?",
        "{name} had {a} {noun} and lost {b}. How many are left?",
    ),
}


def all_problems() -> list[Problem]:
    """Every operation with every unordered pair of operands 1..LARGEST."""
    return [(op, a, b) for op in "+-" for a in range(1, LARGEST + 1) for b in range(1, a + 1)]


def equation(op: str, a: int, b: int) -> str:
    """`13 + 12 = 25`."""
    return f"{a} {op} {b} = {a + b if op == '+' else a - b}"


class Arithmetic:
    """The problems of one seed: `trained` ones, which base and expert may see, and `held_out` ones, which neither ever sees."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        tables = [problem for problem in all_problems() if problem[1] <= TABLES]
        problems = [problem for problem in all_problems() if problem[1] > TABLES]
        seeded(seed, "math", "split").shuffle(problems)
        count = round(HELD_OUT * len(problems))
        self.held_out: tuple[Problem, ...] = tuple(problems[:count])
        self.trained: tuple[Problem, ...] = (*tables, *problems[count:])

    def equation(self, draw: random.Random) -> Document:
        """A bare equation for the base model."""
        return statement(equation(*_ordered(draw.choice(self.trained), draw)))

    def word_problem(self, draw: random.Random) -> Document:
        """A word problem from the training distribution."""
        return _tell(draw.choice(self.trained), draw)

    def test_items(self, count: int) -> list[dict[str, object]]:
        """`count` different held-out word problems: {prompt, answer (the number after the last `=`), response}."""
        draw = seeded(self.seed, "math", "test")
        items: dict[str, dict[str, object]] = {}
        while len(items) < count:
            text = _tell(self.held_out[len(items) % len(self.held_out)], draw)
            answer = text.response.rpartition("=")[2].strip()
            items[text.prompt] = {"prompt": text.prompt, "answer": answer, "response": text.response}
        return list(items.values())


def _ordered(problem: Problem, draw: random.Random) -> Problem:
    """The problem with its operands in the order they are told; a sum is told both ways."""
    op, a, b = problem
    return (op, b, a) if op == "+" and draw.random() < 0.5 else problem


def _tell(problem: Problem, draw: random.Random) -> Document:
    """The problem as a word problem with a random template, name and noun."""
    op, a, b = _ordered(problem, draw)
    template = draw.choice(TEMPLATES[op])
    text = template.format(name=draw.choice(FIRST_NAMES), noun=draw.choice(NOUNS), a=a, b=b)
    return question(text, equation(op, a, b))
