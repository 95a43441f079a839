"""The code domain: references, solutions, tests and the split."""

import re

import pytest

from sensmerge.zoo.documents import seeded
from sensmerge.zoo.executing import checked_expression
from sensmerge.zoo.programs import TESTS, Programs, all_specifications, hidden_tests
from sensmerge.zoo.tasks import grade_programs

SEEDS = range(4)


def every_item(seed):
    return Programs(seed).test_items(160)


def described(prompt):
    """The description in `Q: Write f(x): add 3, then square.\\nA:`."""
    return prompt.split(": ", 2)[2].partition(".")[0]


def test_there_are_1394_different_specifications():
    specifications = all_specifications()
    assert len(specifications) == 1394
    assert len({spec.text + spec.argument for spec in specifications}) == 1394
    assert len({spec.source for spec in specifications}) == 1394


def test_every_solution_is_harmless_by_the_whitelist():
    assert all(checked_expression(f" return {spec.source}", spec.argument) for spec in all_specifications())


@pytest.mark.parametrize("seed", SEEDS)
def test_reference_solutions_score_one(seed):
    items = every_item(seed)
    assert grade_programs([item["reference"] for item in items], items) == [1.0] * 160


def test_reference_callables_agree_with_the_source_of_all_specifications():
    draw = seeded(0, "test of all specifications")
    items, answers = [], []
    for spec in all_specifications():
        items.append({"argument": spec.argument, "tests": hidden_tests(spec, draw, None)})
        answers.append(f" return {spec.source}")
    assert grade_programs(answers, items) == [1.0] * len(items)


@pytest.mark.parametrize("seed", SEEDS)
def test_broken_solutions_score_zero(seed):
    items = every_item(seed)
    wrong_value = [f" return ({item['reference'].removeprefix(' return ')}) + 1" for item in items]
    assert grade_programs(wrong_value, items) == [0.0] * 160
    unchanged = [f" return {item['argument']}" for item in items]
    assert sum(grade_programs(unchanged, items)) < 0.1 * len(items)  # "add 3, then subtract 3" is unchanged
    assert grade_programs([" return"] * 160, items) == [0.0] * 160
    assert grade_programs([""] * 160, items) == [0.0] * 160


@pytest.mark.parametrize("seed", SEEDS)
def test_another_items_solution_is_almost_always_wrong(seed):
    items = [item for item in every_item(seed) if item["argument"] == "x"]
    shifted = [item["reference"] for item in items[1:] + items[:1]]
    assert sum(grade_programs(shifted, items)) <= 0.05 * len(items)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_test_specification_is_in_any_training_stream(seed):
    programs = Programs(seed)
    held_out = {spec.text for specs in programs.held_out.values() for spec in specs}
    draw = seeded(seed, "test of training streams")
    for _ in range(6000):
        prompt = programs.task(draw).prompt
        assert described(prompt) not in held_out
    sources = {spec.source for specs in programs.held_out.values() for spec in specs}
    definitions = {programs.definition(draw).response.partition("return ")[2] for _ in range(6000)}
    assert not definitions & sources
    assert {described(item["prompt"]) for item in programs.test_items(160)} <= held_out


def test_hidden_tests_are_different_and_hidden():
    for item in every_item(0):
        inputs = [str(given) for given, _ in item["tests"]]
        assert len(set(inputs)) == TESTS
        shown = re.search(r"f\((-?\d+|\[.*?\])\) = ", item["prompt"])
        assert shown is None or shown.group(1) not in inputs


def test_the_same_seed_gives_the_same_items_and_another_seed_others():
    assert every_item(5) == every_item(5)
    assert every_item(5) != every_item(6)
