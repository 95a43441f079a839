"""What an import costs, and that the built wheel is all a user needs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sensmerge
from tests.conftest import ROOT

MEASURE = """
import sys, time
started = time.perf_counter()
import sensmerge
elapsed = time.perf_counter() - started
assert not {"torch", "transformers", "numpy", "pydantic"} & sys.modules.keys(), sorted(sys.modules)
print(elapsed)
"""


def test_importing_sensmerge_costs_next_to_nothing() -> None:
    """Under 150 ms (the best of three, so that a busy machine does not decide) and neither torch nor transformers."""
    times = [
        float(subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.150, times


COMMANDS = (
    "demo",
    "calibrate",
    "profile",
    "coefficients",
    "init",
    "plan",
    "merge",
    "check",
    "diff",
    "evaluate",
    "extract-lora",
    "list",
)
# All that open models of a recipe, or named on the command line.
OPENING = ("calibrate", "profile", "coefficients", "init", "plan", "merge", "check", "diff", "extract-lora")

HELP = """
import sys
from sensmerge.cli import main
for command in [[], *([name] for name in sys.argv[1:])]:
    sys.argv = ["sensmerge", *command, "--help"]
    print("=====", *command)
    try:
        main()
    except SystemExit as done:
        assert not done.code
    # typer itself imports pydantic for a command that has arguments.
    heavy = {"torch", "transformers", "numpy", "yaml", "huggingface_hub"} & sys.modules.keys()
    assert not heavy, heavy
    assert command or "pydantic" not in sys.modules
"""


def test_help_imports_nothing_heavy_and_names_every_command() -> None:
    command = [sys.executable, "-c", HELP, *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.split("=====")[1:]
    listed = re.findall(r"(?m)^  ([a-z][a-z-]*)  ", first.partition("Commands:")[2])
    assert set(listed) == set(COMMANDS)
    told = dict(zip(COMMANDS, others, strict=True))
    assert {name for name, text in told.items() if "--allow-pickle" in text} == set(OPENING)
    assert {name for name, text in told.items() if "--json" not in text} <= {"demo"}


def test_every_public_name_exists() -> None:
    for name in sensmerge.__all__:
        assert getattr(sensmerge, name) is not None
    assert set(sensmerge.__all__) <= set(dir(sensmerge))
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        _ = sensmerge.merg


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built with what is installed: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        str(folder),
    ]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("sensmerge-*.whl"))


def test_the_wheel_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Installed from the wheel alone; the dependencies are lent by path, the project's own source is not."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    lent = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    place = subprocess.run(
        [python, "-c", "import sensmerge; print(sensmerge.__file__)"],
        env=lent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in place.stdout
    for arguments in (["--version"], ["list", "rules"], ["list", "tasks", "--json"], ["merge", "--help"]):
        subprocess.run([tmp_path / "env" / "bin" / "sensmerge", *arguments], env=lent, capture_output=True, check=True)


def test_the_wheel_declares_what_it_imports(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        requires = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
        sources = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")]
    declared = {
        line.split(">")[0].split("<")[0].split("=")[0].strip().lower() for line in requires if "extra ==" not in line
    }
    imported = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {"sensmerge"}
    assert {"yaml": "pyyaml"}.get("yaml") in declared
    assert {name for name in foreign if {"yaml": "pyyaml"}.get(name, name.replace("_", "-")) not in declared} == set()


def test_the_wheel_holds_the_data_files(wheel: Path) -> None:
    """Names of tensors and keys of configs are data beside the code."""
    source = Path(sensmerge.__file__).parent
    data = {path.relative_to(source.parent).as_posix() for path in source.rglob("*.json")}
    assert {"sensmerge/checkpoints/families.json", "sensmerge/checkpoints/configs.json"} <= data
    with zipfile.ZipFile(wheel) as archive:
        assert data <= set(archive.namelist())
