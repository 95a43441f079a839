"""The math domain: the split is by problem, symmetric, and nothing of the test reaches base, expert or calibration."""

import re

import pytest

from sensmerge.zoo.arithmetic import HELD_OUT, LARGEST, TABLES, TEMPLATES, Arithmetic, all_problems, equation
from sensmerge.zoo.corpus import Corpus
from sensmerge.zoo.documents import seeded

SEEDS = range(8)


def problem_of(equation_text):
    """(operation, unordered operands) of `13 + 12 = 25`."""
    a, op, b = re.fullmatch(r"(\d+) ([+-]) (\d+) = \d+", equation_text).groups()
    return op, frozenset((int(a), int(b)))


def test_the_problems_are_all_unordered_pairs():
    problems = all_problems()
    assert len(problems) == len(set(problems)) == LARGEST * (LARGEST + 1)
    assert all(1 <= b <= a <= LARGEST for _, a, b in problems)


@pytest.mark.parametrize(("op", "a", "b", "text"), [("+", 13, 12, "13 + 12 = 25"), ("-", 7, 7, "7 - 7 = 0")])
def test_equations(op, a, b, text):
    assert equation(op, a, b) == text


@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_and_trained_problems_are_a_partition(seed):
    split = Arithmetic(seed)
    assert sorted(split.held_out + split.trained) == sorted(all_problems())
    beyond_tables = [problem for problem in all_problems() if max(problem[1:]) > TABLES]
    assert set(split.held_out) <= set(beyond_tables)
    assert len(split.held_out) == round(HELD_OUT * len(beyond_tables)) > 20
    assert {op for op, _, _ in split.held_out} == {"+", "-"}


@pytest.mark.parametrize("seed", SEEDS)
def test_no_held_out_pair_is_told_in_any_order(seed):
    corpus = Corpus(seed)
    held_out = {(op, frozenset((a, b))) for op, a, b in corpus.arithmetic.held_out}
    draw = seeded(seed, "test of training streams")
    seen = {problem_of(corpus.arithmetic.equation(draw).response) for _ in range(4000)}
    seen |= {problem_of(corpus.arithmetic.word_problem(draw).response.strip()) for _ in range(4000)}
    seen |= {problem_of(text.response.strip()) for text in corpus.calibration("math", 128)}
    assert not seen & held_out
    # nearly everything that is trained was drawn, so the line above had a chance to fail
    assert len(seen) > 0.95 * len(corpus.arithmetic.trained)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_test_item_is_a_held_out_problem_and_every_such_problem_is_tested(seed):
    split = Arithmetic(seed)
    items = split.test_items(160)
    assert len({item["prompt"] for item in items}) == 160
    held_out = {(op, frozenset((a, b))) for op, a, b in split.held_out}
    assert {problem_of(item["response"].strip()) for item in items} == held_out


def test_a_test_item_says_the_numbers_of_its_answer():
    for item in Arithmetic(0).test_items(160):
        a, op, b, total = re.fullmatch(r" (\d+) ([+-]) (\d+) = (\d+)", item["response"]).groups()
        assert re.findall(r"\d+", item["prompt"]) == [a, b]
        assert int(total) == int(item["answer"]) == (int(a) + int(b) if op == "+" else int(a) - int(b))


def test_sums_are_told_in_both_orders_and_differences_in_one():
    split, draw = Arithmetic(0), seeded(0, "test of orders")
    seen = {split.equation(draw).response.split(" = ")[0] for _ in range(20000)}
    for op, a, b in split.trained:
        if a != b:
            assert f"{a} {op} {b}" in seen
            assert (f"{b} {op} {a}" in seen) == (op == "+")


def test_templates_keep_operations_apart():
    assert not set(TEMPLATES["+"]) & set(TEMPLATES["-"])


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    assert Arithmetic(1).test_items(50) == Arithmetic(1).test_items(50)
    assert set(Arithmetic(1).held_out) != set(Arithmetic(2).held_out)
