"""Every attack in attacks/ is refused by `sensmerge merge --dry-run`: in four lines, in little time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from attacks.make import ATTACKS, write_all

from tests.conftest import QUIET, ROOT

LARGEST_MEMORY = 700 << 20
CPU_SECONDS = 20

# The command, once for each attack, in a fork of one process that has imported what the command needs: a second saved each time.
RUNNER = """
import contextlib, io, json, os, resource, sys
from sensmerge.cli import main
attacks, seconds = json.loads(sys.argv[1]), int(sys.argv[2])
with open("first.yml", "w") as recipe:
    recipe.write("merge_method: linear\\nmodels: [{model: base, parameters: {weight: 1}}]\\n")
sys.argv = ["sensmerge", "merge", "first.yml", "out", "--dry-run"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
for name, options in attacks.items():
    with open(f"{name}.yml", "w") as recipe:
        recipe.write(f"merge_method: task_arithmetic\\nbase_model: base\\nmodels: [{{model: {name}}}]\\n")
    child = os.fork()
    if not child:
        errors = os.open(f"{name}.err", os.O_CREAT | os.O_WRONLY)
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        sys.argv = ["sensmerge", "merge", f"{name}.yml", "out", "--dry-run", *options]
        main()
    _, status, used = os.wait4(child, 0)
    print(json.dumps([name, os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024, used.ru_utime + used.ru_stime]), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    memory: int
    message: str


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacks")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(attacked: Path) -> dict[str, Outcome]:
    options = {"base-itself": [], **{name: list(attack.options) for name, attack in ATTACKS.items()}}
    (attacked / "base-itself").mkdir()
    for file in (attacked / "base").iterdir():
        (attacked / "base-itself" / file.name).write_bytes(file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(options), str(CPU_SECONDS)],
        cwd=attacked, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {name: (code, memory) for name, code, memory, _ in map(json.loads, done.stdout.splitlines())}
    return {name: Outcome(*found[name], (attacked / f"{name}.err").read_text()) for name in options}


def test_the_model_that_is_spoilt_is_sound(outcomes: dict[str, Outcome]) -> None:
    """An attack is refused for what it does, and for nothing else."""
    assert outcomes["base-itself"].code == 0, outcomes["base-itself"].message


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(outcomes: dict[str, Outcome], name: str) -> None:
    attack, outcome = ATTACKS[name], outcomes[name]
    assert outcome.code == attack.exit_code, outcome.message
    assert attack.says in outcome.message, outcome.message
    lines = outcome.message.rstrip("\n").split("\n")
    kinds = [line.partition(":")[0] for line in lines if line.startswith(("error", "  where", "  why", "  fix"))]
    assert kinds == ["error", "  where", "  why", "  fix"], outcome.message
    assert all(character.isprintable() or character == "\n" for character in outcome.message)
    assert len(outcome.message) < 30_000
    # A pickle is read in a process that imports torch.
    assert outcome.memory < LARGEST_MEMORY or attack.options


def test_nothing_of_an_attack_ran_or_was_written(outcomes: dict[str, Outcome], attacked: Path) -> None:
    assert outcomes
    assert not list(attacked.rglob("ran"))
    assert not (attacked / "out").exists()


def test_the_readme_names_every_attack() -> None:
    page = (ROOT / "attacks" / "README.md").read_text(encoding="utf-8")
    assert [name for name in ATTACKS if f"`{name}`" not in page] == []
