"""Running generated programs: what is refused before it runs, and what is stopped when it runs."""

import time

import pytest

from sensmerge.zoo import executing
from sensmerge.zoo.executing import Program, checked_expression, run_programs
from sensmerge.zoo.tasks import grade_programs

ATTACKS = [
    "x.__class__",
    "().__class__.__bases__",
    "__import__('os').system('true')",
    "open('/etc/passwd')",
    "eval('1')",
    "exec('x')",
    "print(x)",
    "(lambda: x)()",
    "(y := x)",
    "[y for y in x]",
    "[v for v in range(10)]",
    "[v for v in [v for v in [v for v in xs]]]",
    "{v for v in xs}",
    "{v: v for v in xs}",
    "(v for v in xs)",
    "9**9**9",
    "x ** x",
    "x ** -1",
    "x ** 4",
    "[0]*10**10",
    "[0] * 1000",
    "xs * 100 * 100 * 100 * 100",
    "'a' * 100",
    "f'{x}'",
    "1 << 100",
    "1e308",
    "True",
    "x if x else 101",
    "sorted(xs, key=abs)",
    "max(*xs)",
    "x; x",
    "yield x",
    "await x",
    "...",
    "",
    "(" * 150,
    "x" + "+x" * 60,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_refused_before_it_runs(attack, monkeypatch):
    monkeypatch.setattr(executing, "_run_child", lambda programs, seconds: pytest.fail("it ran"))
    # the name it uses is allowed, so that it is refused for what it does
    item = {"argument": "xs" if "xs" in attack else "x", "tests": [[1, 1]]}
    assert grade_programs([f" return {attack}"], [item]) == [0.0]


@pytest.mark.parametrize(
    "text", ["x + 1", "print(x)", "return x\nreturn x", "def f(x): return x", "import os", "returnx", "return = 1"]
)
def test_an_answer_must_be_one_return_line(text):
    assert checked_expression(text, "x") is None


def test_the_argument_is_the_only_free_name():
    assert checked_expression("return xs[0]", "xs") == "xs[0]"
    assert checked_expression("return xs[0]", "x") is None


def test_values_must_agree_in_type():
    def passes(expression, expected):
        return run_programs([Program("x", expression, [[2, expected]])])[0]

    assert passes("x", 2)
    assert not passes("x == 2", 1)
    assert passes("x == 2", True)
    assert not passes("[x == 2]", [1])
    assert not passes("x", 2.0)
    assert not passes("{x}", [2])


def test_an_exception_fails_its_program_only():
    programs = [Program("x", "x // 0", [[1, 1]]), Program("x", "x", [[1, 1]]), Program("x", "x +", [[1, 1]])]
    assert run_programs(programs) == [False, True, False]


def test_every_test_must_pass():
    assert run_programs([Program("x", "x", [[1, 1], [2, 3]])]) == [False]


def test_what_slips_through_the_check_is_stopped_by_the_time_limit():
    slow = Program("x", "9 ** 9 ** 9", [[1, 1]])
    fine = Program("x", "x", [[1, 1]])
    start = time.monotonic()
    assert run_programs([fine, slow, fine, slow, fine], seconds=1) == [True, False, True, False, True]
    assert time.monotonic() - start < 20


def test_what_slips_through_the_check_is_stopped_by_the_memory_limit():
    fine = Program("x", "x", [[1, 1]])
    assert run_programs([Program("x", "[0] * 10 ** 10", [[1, 1]]), fine]) == [False, True]


def test_the_child_has_no_builtins():
    attempts = ["open", "print(1)", "__import__('os')", "().__class__"]
    results = run_programs([Program("x", f"[{text}, 1][1]", [[1, 1]]) for text in attempts])
    assert results == [False, False, False, True]  # attributes are the check's business, names are closed here as well


def test_no_programs_need_no_child(monkeypatch):
    monkeypatch.setattr(executing, "_run_child", lambda programs, seconds: pytest.fail("it ran"))
    assert run_programs([]) == []


def test_the_largest_harmless_program_is_small():
    """The bound the docstring promises: the worst the check admits stays within time and memory."""
    worst = "[v * 100 for v in [xs * 100 for v in xs * 100]]"
    assert checked_expression(f"return {worst}", "xs") == worst
    item = {"argument": "xs", "tests": [[[1, 2, 3, 4, 5, 6], []]]}
    start = time.monotonic()
    assert grade_programs([f"return {worst}"], [item]) == [0.0]
    assert time.monotonic() - start < 10
