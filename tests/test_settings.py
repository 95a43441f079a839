"""What a parameter is for a tensor: gradients by hand, filters in their order, the four levels, and mergekit's rule in full."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from sensmerge.errors import RecipeError
from sensmerge.methods import METHODS
from sensmerge.methods.option import REQUIRED, Option
from sensmerge.records import Conditional
from sensmerge.settings import as_written, read_parameters, resolve, without_filters
from sensmerge.yamlfile import read_yaml

NUMBER = Option("weight", "number", 1.0, "a number", per_model=True)
NEEDED = Option("t", "number", REQUIRED, "a number without default")
WHOLE = Option("seed", "whole", 0.0, "a whole number", low=0)
TRUTH = Option("normalize", "truth", True, "true or false")
CHOICE = Option("scope", "choice", "tensor", "a choice", choices={"tensor": "tensor", "global": "global"})

Q, UP, NORM = "model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"


def value(setting: object, option: Option = NUMBER, tensor: str = Q, t: float = 0.0) -> object:
    """The option's value where one level names it."""
    return resolve([{option.name: setting}], option, tensor, t, where="recipe.yml")


# Gradients


@pytest.mark.parametrize(
    ("gradient", "t", "expected"),
    [
        ((0.0, 1.0), 0.0, 0.0), ((0.0, 1.0), 0.25, 0.25), ((0.0, 1.0), 1.0, 1.0), ((7.0,), 0.0, 7.0), ((7.0,), 1.0, 7.0),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.0, 0.0), ((0.0, 0.5, 0.3, 0.7, 1.0), 0.125, 0.25),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.25, 0.5), ((0.0, 0.5, 0.3, 0.7, 1.0), 0.375, 0.4),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.5, 0.3), ((0.0, 0.5, 0.3, 0.7, 1.0), 0.625, 0.5),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.75, 0.7), ((0.0, 0.5, 0.3, 0.7, 1.0), 0.875, 0.85),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 1.0, 1.0), ((1.0, 0.0), 1 / 3, 2 / 3), ((-1.0, 1.0, -1.0), 0.5, 1.0),
    ],
)  # fmt: skip
def test_a_gradient_runs_from_the_first_layer_to_the_last(
    gradient: tuple[float, ...], t: float, expected: float
) -> None:
    assert value(gradient, t=t) == pytest.approx(expected, rel=1e-15)


def test_a_gradient_over_four_layers() -> None:
    """Two values over blocks 0 to 3: thirds between them, by hand."""
    found = [value((0.0, 0.9), t=block / 3) for block in range(4)]
    assert found == pytest.approx([0.0, 0.3, 0.6, 0.9], rel=1e-15)


@pytest.mark.parametrize(
    ("t", "truth", "scope"),
    [
        (0.0, True, "tensor"),
        (0.49, True, "tensor"),
        (0.5, False, "global"),
        (0.99, False, "global"),
        (1.0, True, "tensor"),
    ],
)
def test_what_is_no_number_is_chosen_not_mixed(t: float, truth: bool, scope: str) -> None:
    assert value((True, False, True), TRUTH, t=t) is truth
    assert value(("tensor", "global", "tensor"), CHOICE, t=t) == scope


def test_whole_numbers_between_the_ends_of_a_gradient() -> None:
    assert value((0.0, 10.0), WHOLE, t=0.5) == 5
    with pytest.raises(RecipeError, match="must be a whole number") as caught:
        value((0.0, 5.0), WHOLE, t=0.5)
    assert Q in caught.value.what
    assert caught.value.where == "recipe.yml"


# Filters


def test_the_first_filter_that_matches_wins() -> None:
    setting = (
        Conditional("self_attn", 0.1),
        Conditional("q_proj", 0.2),
        Conditional("mlp", (0.0, 1.0)),
        Conditional(None, 9.0),
    )
    assert [value(setting, tensor=tensor, t=0.5) for tensor in (Q, UP, NORM)] == [0.1, 0.5, 9.0]


@pytest.mark.parametrize("everything", [None, "*"])
def test_a_filter_for_all_hides_what_follows(everything: str | None) -> None:
    assert value((Conditional(everything, 0.3), Conditional("self_attn", 0.1))) == 0.3


def test_where_no_filter_matches_the_next_level_is_asked() -> None:
    inner, outer = {"weight": (Conditional("mlp", 0.2),)}, {"weight": (Conditional("self_attn", 0.7),)}
    found = [resolve([inner, outer], NUMBER, tensor, 0.0, where="") for tensor in (Q, UP, NORM)]
    assert found == [0.7, 0.2, 1.0]


def test_a_zero_or_false_is_a_value() -> None:
    assert resolve([{"weight": 0.0}, {"weight": 5.0}], NUMBER, Q, 0.0, where="") == 0.0
    assert resolve([{"normalize": False}, {"normalize": True}], TRUTH, Q, 0.0, where="") is False


@pytest.mark.parametrize("named", [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1), (0, 1, 2)])
def test_the_most_specific_level_wins(named: tuple[int, ...]) -> None:
    """Source or model, slice, top level, default."""
    levels = [{"weight": float(10 + place)} if place in named else {} for place in range(3)]
    assert resolve(levels, NUMBER, Q, 0.0, where="") == (10 + min(named) if named else 1.0)


def test_a_needed_option_without_a_value() -> None:
    with pytest.raises(RecipeError, match="'t' has no value for tensor") as caught:
        resolve([{"t": (Conditional("mlp", 0.5),)}, {}], NEEDED, Q, 0.0, where="recipe.yml")
    assert Q in caught.value.what
    assert caught.value.where == "recipe.yml"
    assert "- value: 0.5" in caught.value.fix
    assert resolve([{"t": (Conditional("mlp", 0.5),)}, {}], NEEDED, UP, 0.0, where="") == 0.5


# mergekit's rule, written anew from its documentation

FILTERS = ("self_attn", "mlp", "q_proj", "*", None, "layers.3", "norm", "nothing")


def any_levels(rng: random.Random) -> list[dict[str, Any]]:
    """Up to three levels, each with or without a setting of any form."""

    def number() -> float:
        return round(rng.uniform(-4, 4), 3)

    def unfiltered() -> Any:
        return number() if rng.random() < 0.4 else tuple(number() for _ in range(rng.randint(1, 6)))

    def setting() -> Any:
        if rng.random() < 0.4:
            return unfiltered()
        return tuple(Conditional(rng.choice(FILTERS), unfiltered()) for _ in range(rng.randint(1, 4)))

    return [{"weight": setting()} if rng.random() < 0.8 else {} for _ in range(rng.randint(0, 3))]


def by_the_book(levels: Sequence[dict[str, Any]], tensor: str, t: float) -> Fraction:
    """The first level that yields a value, in exact arithmetic."""

    def evaluated(setting: Any) -> Fraction | None:
        if not isinstance(setting, tuple):
            return Fraction(setting)
        if isinstance(setting[0], Conditional):
            for each in setting:
                if each.filter is None or each.filter == "*" or each.filter in tensor:
                    return evaluated(each.setting)
            return None
        knots = [Fraction(number) for number in setting]
        if len(knots) == 1:
            return knots[0]
        # A broken line through the values at 0, 1/(n-1), … 1.
        step = Fraction(1, len(knots) - 1)
        segment = min(int(Fraction(t) / step), len(knots) - 2)
        along = (Fraction(t) - segment * step) / step
        return knots[segment] + along * (knots[segment + 1] - knots[segment])

    for level in levels:
        if "weight" in level and (found := evaluated(level["weight"])) is not None:
            return found
    return Fraction(1)


@pytest.mark.parametrize("seed", range(400))
def test_every_setting_means_what_mergekit_says(seed: int) -> None:
    rng = random.Random(seed)
    levels, layers = any_levels(rng), rng.randint(2, 12)
    for layer in range(layers):
        t = layer / (layers - 1)
        for tensor in (Q, UP, NORM):
            found = resolve(levels, NUMBER, tensor, t, where="")
            assert isinstance(found, float)
            assert found == pytest.approx(float(by_the_book(levels, tensor, t)), rel=1e-12, abs=1e-12)


# What tables show, and what records keep


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([], 1.0),
        ([{"weight": 0.5}, {"weight": 2.0}], 0.5),
        ([{"weight": (0.0, 1.0, 0.5)}], 0.5),
        ([{"weight": (Conditional("mlp", 0.2), Conditional(None, 0.4))}], 0.4),
        ([{"weight": (Conditional("mlp", 0.2), Conditional("*", (0.0, 0.5)))}], 0.25),
        ([{"weight": (Conditional("mlp", 0.2),)}, {"weight": 3.0}], 3.0),
        ([{"weight": (Conditional("mlp", 0.2),)}], 1.0),
    ],
)
def test_the_number_that_tables_show(levels: list[dict[str, Any]], expected: float) -> None:
    assert without_filters(levels, NUMBER) == expected


TEXTS = (
    "{lambda: 0.5}", "{lambda: [0.1, 0.9], normalize: true}", "{density: {filter: mlp, value: [0.5, 1.0]}}",
    "{weight: [{filter: self_attn, value: [0.0, 0.5]}, {value: 0.25}], int8_mask: true, scope: global}", "{rescale: l1}",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_read_can_be_written_and_read_again(tmp_path: Path, text: str) -> None:
    ties = METHODS.get("ties", where="")

    def read(parameters: str) -> dict[str, object]:
        path = tmp_path / "recipe.yml"
        path.write_text(f"parameters: {parameters}\n")
        return read_parameters(read_yaml(path)[1], ties, "recipe")

    first = read(text)
    again = as_written(first)
    assert read(yaml.safe_dump(again, default_flow_style=True)) == first


def test_every_option_of_every_method_can_be_named(tmp_path: Path) -> None:
    """Its default is a value that it takes, on the recipe's level and, where each model has its own, on a model's."""
    path = tmp_path / "recipe.yml"
    for name in METHODS.names():
        method = METHODS.get(name, where="")
        for option in method.options:
            default = 0.5 if option.default is None else option.default
            path.write_text(yaml.safe_dump({"parameters": {option.name: default}}))
            holder = read_yaml(path)[1]
            assert read_parameters(holder, method, "recipe") == {option.name: option.check(default)}
            if option.per_model:
                assert read_parameters(holder, method, "model") == {option.name: option.check(default)}
            else:
                with pytest.raises(RecipeError, match="not a parameter of one model"):
                    read_parameters(holder, method, "model")
