"""The code domain: one-line functions of two steps, written from a description and an example.

A specification is a pair of different steps; 15 % of them are held out of all training data. A solution is judged by hidden
unit tests whose expected values come from `reference`, a composition of plain callables that shares no text with the solutions.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .documents import Document, question, seeded, statement

HELD_OUT = {"x": 0.15, "xs": 0.15}
TESTS = 5
LIST_SHARE = 0.4
"""The part of the training programs that works on lists: they are fewer, but harder."""

TEST_LIST_SHARE = 0.15


@dataclass(frozen=True)
class Step:
    """One operation: its description, its source with `{}` for the operand, and its meaning."""

    text: str
    source: str
    apply: Callable[[Any], Any]


def _number_step(text: str, symbol: str, operation: Callable[[int, int], int], operand: int) -> Step:
    """One step on integers with a fixed right operand."""
    return Step(f"{text} {operand}", f"({{}} {symbol} {operand})", lambda x: operation(x, operand))


def _number_steps() -> tuple[Step, ...]:
    """The 35 steps on integers."""
    steps = [_number_step("add", "+", operator.add, k) for k in range(1, 10)]
    steps += [_number_step("subtract", "-", operator.sub, k) for k in range(1, 10)]
    steps += [_number_step("multiply by", "*", operator.mul, k) for k in range(2, 9)]
    steps += [_number_step("divide by", "//", operator.floordiv, k) for k in range(2, 6)]
    steps += [_number_step("take the remainder by", "%", operator.mod, k) for k in (3, 5, 7, 9)]
    steps += [Step("square", "({} ** 2)", lambda x: x * x), Step("cube", "({} ** 3)", lambda x: x * x * x)]
    return tuple(steps)


NUMBER_STEPS = _number_steps()

LIST_STEPS: tuple[Step, ...] = (
    Step("sort the list", "sorted({})", lambda xs: sorted(xs)),
    Step("reverse the list", "{}[::-1]", lambda xs: list(reversed(xs))),
    Step("drop the first item", "{}[1:]", lambda xs: xs[1:]),
    Step("drop the last item", "{}[:-1]", lambda xs: xs[: len(xs) - 1]),
    Step("keep the first three items", "{}[:3]", lambda xs: [xs[i] for i in range(min(3, len(xs)))]),
    Step("remove duplicates", "sorted(set({}))", lambda xs: sorted(set(xs))),
    Step("keep the even items", "[v for v in {} if v % 2 == 0]", lambda xs: list(filter(lambda v: v % 2 == 0, xs))),
    Step("keep the odd items", "[v for v in {} if v % 2 == 1]", lambda xs: list(filter(lambda v: v % 2 == 1, xs))),
    Step("keep the positive items", "[v for v in {} if v > 0]", lambda xs: list(filter(lambda v: v > 0, xs))),
    Step("double every item", "[v * 2 for v in {}]", lambda xs: [v + v for v in xs]),
    Step("square every item", "[v ** 2 for v in {}]", lambda xs: [v * v for v in xs]),
    Step("negate every item", "[-v for v in {}]", lambda xs: [0 - v for v in xs]),
)

REDUCTIONS: tuple[Step, ...] = (
    Step("return the sum", "sum({})", sum),
    Step("return the largest item", "max({})", max),
    Step("return the smallest item", "min({})", min),
    Step("return the length", "len({})", len),
    Step("return the first item", "{}[0]", lambda xs: xs[0]),
    Step("return the last item", "{}[-1]", lambda xs: xs[len(xs) - 1]),
)


@dataclass(frozen=True)
class Specification:
    """What a function must do: two steps in order. `argument` is x (an int) or xs (a list of ints)."""

    argument: str
    first: Step
    second: Step

    @property
    def text(self) -> str:
        """The description: what identifies a specification."""
        return f"{self.first.text}, then {self.second.text}"

    @property
    def source(self) -> str:
        """The expression of the solution the models are taught."""
        return self.second.source.format(self.first.source.format(self.argument))

    def reference(self, value: Any) -> Any:
        """What the function must return for `value`; may raise for an empty list."""
        return self.second.apply(self.first.apply(value))


def all_specifications() -> list[Specification]:
    """The 1394 specifications: ordered pairs of different steps."""
    numbers = [Specification("x", a, b) for a in NUMBER_STEPS for b in NUMBER_STEPS if a is not b]
    lists = [Specification("xs", a, b) for a in LIST_STEPS for b in (*LIST_STEPS, *REDUCTIONS) if a is not b]
    return numbers + lists


def draw_input(argument: str, draw: random.Random) -> Any:
    """A random input: an int of -9..20, or a list of 4 to 6 ints of -9..9."""
    if argument == "x":
        return draw.randint(-9, 20)
    return [draw.randint(-9, 9) for _ in range(draw.randint(4, 6))]


def hidden_tests(spec: Specification, draw: random.Random, shown: Any) -> list[list[Any]]:
    """TESTS pairs [input, expected output], all different, and none of them with the input that the description shows."""
    tests: list[list[Any]] = []
    while len(tests) < TESTS:
        value = draw_input(spec.argument, draw)
        try:
            test = [value, spec.reference(value)]
        except (IndexError, ValueError):  # the first step left an empty list: max and [0] have no answer
            continue
        if test not in tests and value != shown:
            tests.append(test)
    return tests


class Programs:
    """The specifications of one seed: `trained` ones, which base and expert may see, and `held_out` ones, for the test."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.trained: dict[str, tuple[Specification, ...]] = {}
        self.held_out: dict[str, tuple[Specification, ...]] = {}
        for argument, share in HELD_OUT.items():
            specs = [spec for spec in all_specifications() if spec.argument == argument]
            seeded(seed, "code", "split", argument).shuffle(specs)
            count = round(share * len(specs))
            self.held_out[argument] = tuple(specs[:count])
            self.trained[argument] = tuple(specs[count:])

    def _trained(self, draw: random.Random) -> Specification:
        return draw.choice(self.trained["xs" if draw.random() < LIST_SHARE else "x"])

    def definition(self, draw: random.Random) -> Document:
        """A bare function definition for the base model: no description."""
        spec = self._trained(draw)
        return statement(f"def f({spec.argument}):\n    return {spec.source}")

    def task(self, draw: random.Random) -> Document:
        """A description with its solution from the training distribution."""
        spec = self._trained(draw)
        return _asked(spec, _example_input(spec, draw))

    def test_items(self, count: int) -> list[dict[str, object]]:
        """`count` held-out items, 15 % on lists: {prompt, argument, tests: [[input, expected]], reference (a solution)}."""
        draw = seeded(self.seed, "code", "test")
        lists = round(TEST_LIST_SHARE * count)
        items: list[dict[str, object]] = []
        for spec in [*self.held_out["x"][: count - lists], *self.held_out["xs"][:lists]]:
            shown = _example_input(spec, draw)
            asked = _asked(spec, shown)
            tests = hidden_tests(spec, draw, shown)
            items.append(
                {"prompt": asked.prompt, "argument": spec.argument, "tests": tests, "reference": asked.response}
            )
        return items


def _example_input(spec: Specification, draw: random.Random) -> Any:
    """A small input for which the function has a value."""
    while True:
        value = draw.randint(2, 9) if spec.argument == "x" else [draw.randint(1, 9) for _ in range(3)]
        try:
            spec.reference(value)
        except (IndexError, ValueError):  # the first step left an empty list
            continue
        return value


def _asked(spec: Specification, shown: Any) -> Document:
    """`Write f(x): add 3, then square. f(4) = 49` with its solution; `shown` is the example's input."""
    text = f"Write f({spec.argument}): {spec.text}. f({shown}) = {spec.reference(shown)}"
    return question(text, f"return {spec.source}")
