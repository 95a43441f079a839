"""Runs generated one-line programs against hidden tests, in a child process, after a check that needs no sandbox.

What is covered: a program must be one expression made of the AST nodes, names and small constants below, so it can reach
neither attributes nor imports nor files, it binds nothing but comprehension variables, and its memory and time are bounded by
its own text (at most three multiplications, two comprehensions, no ranges). Then it runs with no builtins in a child process
with limits on processor seconds and, where the system allows it, memory.

What is not covered: this is no sandbox for arbitrary code, and none is needed for what passes the check.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PREFIX = "return "
FUNCTIONS = ("abs", "len", "max", "min", "set", "sorted", "sum")
LONGEST_TEXT = 200
MOST_NODES = 80
LARGEST_CONSTANT = 100
LARGEST_EXPONENT = 3
MOST_MULTIPLICATIONS = 3
MOST_COMPREHENSIONS = 2

PROGRAM_SECONDS = 1
MEMORY_BYTES = 512 * 1024 * 1024
START_UP_SECONDS = 30

_NODES = (
    ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.UnaryOp, ast.USub,
    ast.Call, ast.Name, ast.Load, ast.Store, ast.Constant, ast.Subscript, ast.Slice, ast.List, ast.ListComp,
    ast.comprehension, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.IfExp,
)  # fmt: skip

_CHILD = """
import json, sys, time
try:
    import resource, signal
except ImportError:  # not a POSIX system: the parent's time limit remains
    resource = None
names = {name: __builtins__.__dict__[name] for name in sys.argv[1].split(",")}
seconds, memory = int(sys.argv[2]), int(sys.argv[3])
if resource:
    for kind, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # macOS and some containers refuse: the check has bounded the memory already
            pass
def same(left, right):
    if type(left) is not type(right):
        return False
    if type(left) is list:
        return len(left) == len(right) and all(map(same, left, right))
    return left == right
def passes(program):
    function = eval("lambda " + program["argument"] + ": " + program["expression"], {"__builtins__": {}, **names})
    return all(same(function(value), expected) for value, expected in program["tests"])
for line in sys.stdin:
    if resource:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, hard))
    try:
        passed = passes(json.loads(line))
    except BaseException:
        passed = False
    print(int(passed), flush=True)
"""


@dataclass(frozen=True)
class Program:
    """An expression in `argument`, and the tests it must pass: pairs of input and expected output (equal in type and value)."""

    argument: str
    expression: str
    tests: Sequence[Sequence[Any]]


def checked_expression(answer: str, argument: str) -> str | None:
    """The expression of an answer `return EXPRESSION`, or None if it is not one that is safe to run."""
    text = answer.strip()
    if not text.startswith(PREFIX) or len(text) > LONGEST_TEXT or "\n" in text:
        return None
    expression = text.removeprefix(PREFIX).strip()
    try:
        with warnings.catch_warnings(action="ignore"):  # Python comments on odd spellings, such as 3if
            tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return expression if _is_harmless(tree, argument) else None


def _is_harmless(tree: ast.Expression, argument: str) -> bool:
    """Every node is known and small, and what multiplies sizes is rare."""
    nodes = list(ast.walk(tree))
    growing = [node for node in nodes if isinstance(node, (ast.Mult, ast.Pow))]
    loops = [node for node in nodes if isinstance(node, ast.comprehension)]
    return (
        len(nodes) <= MOST_NODES
        and len(growing) <= MOST_MULTIPLICATIONS
        and len(loops) <= MOST_COMPREHENSIONS
        and all(isinstance(node, _NODES) and _is_small(node, argument) for node in nodes)
    )


def _is_small(node: ast.AST, argument: str) -> bool:
    """The rule for one node: names, calls, constants, exponents and loops."""
    if isinstance(node, ast.Name):
        known = ("v",) if isinstance(node.ctx, ast.Store) else ("v", argument, *FUNCTIONS)
        return node.id in known
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
    if isinstance(node, ast.Constant):
        return type(node.value) is int and abs(node.value) <= LARGEST_CONSTANT
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        power = node.right
        return isinstance(power, ast.Constant) and type(power.value) is int and 0 <= power.value <= LARGEST_EXPONENT
    if isinstance(node, ast.comprehension):
        return not node.is_async and isinstance(node.target, ast.Name)
    return True


def run_programs(programs: Sequence[Program], seconds: int = PROGRAM_SECONDS) -> list[bool]:
    """Whether each program passes all its tests; `seconds` of processor time for each.

    Programs run one after another in one child; one that kills the child fails, and a new child goes on behind it.
    """
    results: list[bool] = []
    while len(results) < len(programs):
        results += _run_child(programs[len(results) :], seconds)
    return results


def _run_child(programs: Sequence[Program], seconds: int) -> list[bool]:
    """The results of one child: all programs, or those up to and including the one that killed it."""
    lines = "".join(json.dumps(vars(program) | {"tests": list(program.tests)}) + "\n" for program in programs)
    command = [sys.executable, "-I", "-S", "-c", _CHILD, ",".join(FUNCTIONS), str(seconds), str(MEMORY_BYTES)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        output, _ = child.communicate(lines.encode(), timeout=START_UP_SECONDS + seconds * len(programs))
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
    passed = [line == b"1" for line in output.splitlines()]
    return passed if len(passed) == len(programs) else [*passed, False]
