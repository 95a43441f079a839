"""The commands as a user types them: results on standard output, four-line errors, exit codes, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import sensmerge as sm
from tests.conftest import QUIET, Run
from tests.oracle.families import FamilyFiles, write_recipe


@pytest.fixture(scope="module")
def recipe(untrained: FamilyFiles) -> Path:
    """A recipe with a `sens:` block whose coefficients are far from uniform."""
    return write_recipe(untrained, untrained.folder / "cli.yml", sens={"temperature": 0.05})


@pytest.fixture(scope="module")
def calibrated(recipe: Path, kept: Path) -> Path:
    """The folder with the recipe's calibration, made."""
    sm.calibrate(sm.load_recipe(recipe), profiles_dir=kept)
    return kept


def lines_of(error: str) -> list[str]:
    """The four-line message at the end of standard error."""
    return error.rstrip("\n").split("\n")[-4:]


def assert_told(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command failed with `code` and a four-line error that holds every word; standard output is empty."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    what, where, why, fix = lines_of(done.stderr)
    assert what.startswith("error: ")
    assert (where[:9], why[:9], fix[:9]) == ("  where: ", "  why:   ", "  fix:   ")
    for word in words:
        assert word in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_version_and_help(sensmerge: Run) -> None:
    assert sensmerge("--version").stdout == f"sensmerge {sm.__version__}\n"
    commands = (
        "demo", "calibrate", "profile", "coefficients", "init", "plan", "merge", "check", "diff", "extract-lora",
        "evaluate", "list",
    )  # fmt: skip
    for command in commands:
        done = sensmerge(command, "--help")
        assert done.returncode == 0
        assert "--json" in done.stdout


@pytest.mark.parametrize("kind", ["methods", "rules", "presets", "distances", "tasks"])
def test_list(sensmerge: Run, kind: str) -> None:
    shown = sensmerge("list", kind)
    names = json.loads(sensmerge("list", kind, "--json").stdout)
    assert len(names) >= 2
    for name in names:
        assert name in shown.stdout


def test_calibrate_keeps_its_files_beside_the_recipe(sensmerge: Run, untrained: FamilyFiles, tmp_path: Path) -> None:
    shutil.copytree(untrained.folder, tmp_path / "family")
    recipe = write_recipe(untrained, tmp_path / "family" / "mine.yml", sens={"preset": "paper"})
    done = sensmerge("calibrate", recipe, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [profile["samples"] for profile in result["profiles"]] == [5, 4, 6]
    folder = tmp_path / "family" / "mine.sens"
    assert {path.name for path in (folder / "profiles").iterdir()} == {f"expert-{name}.json" for name in "abc"}
    assert (folder / "alignment.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    again = sensmerge("calibrate", recipe)
    assert again.returncode == 0, again.stderr
    assert "Distances" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == stamps, "measured again for nothing"


# Loading a model needs torch: with this on the path, importing it ends the process.
NO_TORCH = "import sys\nsys.modules['torch'] = None\nsys.modules['transformers'] = None\n"


def test_a_temperature_sweep_loads_no_model(sensmerge: Run, recipe: Path, calibrated: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_TORCH)
    blocked = {"PYTHONPATH": str(tmp_path)}
    spreads = []
    for temperature in (1.0, 0.2, 0.05, 0.02):
        done = sensmerge(
            "coefficients", recipe, "--profiles", calibrated, "--temperature", temperature, "--json", env=blocked
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["temperature"] == temperature
        spreads.append(result["spread"])
        if result["spread"] < 0.10:
            assert "preset: calibrated" in done.stderr
            assert result["warnings"]
    assert spreads == sorted(spreads)
    assert spreads[0] < 0.10 < spreads[-1]


def test_other_choices_need_no_model_either(sensmerge: Run, recipe: Path, calibrated: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_TORCH)
    done = sensmerge(
        "coefficients", recipe, "--profiles", calibrated, "--rule", "normalized", "--total", "1", "--axis", "column",
        "--direction", "similarity", "--other", "own_group", env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("rule normalized", "model.layers.0", "(embed)", "tau", "spread max|K*sigma - 1|", "expert-a"):
        assert word in done.stdout
    kept = json.loads((calibrated / "coefficients.json").read_text())
    assert kept["rule"] == "normalized"
    assert kept["total"] == 1.0


def test_merge_and_dry_run(sensmerge: Run, recipe: Path, calibrated: Path, tmp_path: Path) -> None:
    plan = sensmerge("merge", recipe, tmp_path / "out", "--dry-run", "--json")
    assert plan.returncode == 0, plan.stderr
    promised = json.loads(plan.stdout)
    assert not (tmp_path / "out").exists()
    done = sensmerge("merge", recipe, tmp_path / "out", "--profiles", calibrated, "--shard-size", "60kB", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["files"]) > 1
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == result["bytes_written"]
    whole = sensmerge("merge", recipe, tmp_path / "whole", "--profiles", calibrated)
    assert "model.layers.0" in whole.stdout
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size == promised["bytes_written"]


def test_relative_paths_are_found_from_the_recipe_and_from_here(
    sensmerge: Run, untrained: FamilyFiles, tmp_path: Path
) -> None:
    here = tmp_path / "recipes"
    here.mkdir()
    text = "merge_method: linear\nmodels:\n  - model: expert-a\n  - model: expert-b\n"
    (here / "linear.yml").write_text(text)
    done = sensmerge("merge", here / "linear.yml", tmp_path / "out", cwd=untrained.folder)
    assert done.returncode == 0, done.stderr


# Bad input


def test_a_misspelt_key_is_told_with_line_and_suggestion(sensmerge: Run, recipe: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yml"
    bad.write_text(recipe.read_text().replace("merge_method", "merge_metod"))
    assert_told(sensmerge("merge", bad, tmp_path / "out"), 2, "bad.yml:1", "merge_method")
    text = recipe.read_text().replace("temperature", "temprature")
    line = next(number for number, row in enumerate(text.split("\n"), start=1) if "temprature" in row)
    bad.write_text(text)
    assert_told(sensmerge("merge", bad, tmp_path / "out"), 2, f"bad.yml:{line}", "did you mean 'temperature'?")
    assert not (tmp_path / "out").exists()


def test_missing_things(sensmerge: Run, untrained: FamilyFiles, tmp_path: Path) -> None:
    assert_told(sensmerge("merge", tmp_path / "no.yml", tmp_path / "out"), 2, "no.yml")
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {untrained.base}\nmodels:\n  - model: nowhere\n")
    assert_told(sensmerge("merge", recipe, tmp_path / "out"), 3, "there is no model folder 'nowhere'", "r.yml:4")
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {untrained.base}\nmodels:\n  - model: org/name\n")
    assert_told(sensmerge("merge", recipe, tmp_path / "out"), 3, "HF_HUB_OFFLINE forbids to ask the hub")
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no samples"]),
        (b"\n  \n", ["no samples"]),
        (b'{"prompt": "a", "response": "b"}\n{"prompt": "a"\n', ["data.jsonl:2", "line 2", "column"]),
        (b'{"question": "a", "answer": "b"}\n', ["data.jsonl:1", "answer"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
    ],
)
def test_bad_calibration_data_is_found_before_a_model_is_loaded(
    sensmerge: Run, untrained: FamilyFiles, tmp_path: Path, content: bytes, words: list[str]
) -> None:
    recipe = write_recipe(untrained, untrained.folder / "bad-data.yml", sens={})
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    text = yaml.safe_load(recipe.read_text())
    text["models"][1]["sens"]["data"] = str(data)
    recipe.write_text(yaml.safe_dump(text))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(NO_TORCH)
    done = sensmerge("merge", recipe, tmp_path / "out", "--profiles", tmp_path / "p", env={"PYTHONPATH": str(blocked)})
    assert_told(done, 5, *words)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_empty(sensmerge: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("kept")
    assert_told(sensmerge("merge", recipe, tmp_path), 7, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_nan_weight_is_named_in_calibration_too(sensmerge: Run, untrained: FamilyFiles, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    family = tmp_path / "family"
    shutil.copytree(untrained.folder, family)
    file = family / "expert-b" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 7] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = write_recipe(untrained, family / "nan.yml", sens={})
    assert_told(
        sensmerge("merge", recipe, tmp_path / "out"), 8, "expert-b", "model.layers.1.mlp.down_proj.weight", "[0, 7]"
    )
    assert not (tmp_path / "out").exists()


def test_wrong_usage(sensmerge: Run, recipe: Path, tmp_path: Path) -> None:
    assert_told(sensmerge("merge", recipe), 2, "OUT", "--help")
    assert_told(sensmerge("merg"), 2, "merge")
    assert_told(sensmerge("merge", recipe, tmp_path / "out", "--shard-size", "huge"), 2, "--shard-size 5GB")
    assert_told(sensmerge("coefficients", recipe, "--rule", "softmx"), 2, "did you mean 'softmax'?")
    assert_told(sensmerge("merge", recipe, tmp_path / "out", "--device", "tpu"), 2, "auto, cpu, cuda")


def test_a_plain_recipe_has_no_coefficients(sensmerge: Run, untrained: FamilyFiles, tmp_path: Path) -> None:
    recipe = tmp_path / "plain.yml"
    recipe.write_text(f"merge_method: linear\nmodels:\n  - model: {untrained.base}\n")
    assert_told(sensmerge("coefficients", recipe), 2, "no `sens:` block")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_half_done(
    untrained: FamilyFiles, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Stopped while it calibrates; the same command afterwards ends as if nothing had happened."""
    recipe = write_recipe(untrained, untrained.folder / f"stop-{code}.yml", sens={})
    command = [
        sys.executable,
        "-m",
        "sensmerge",
        "merge",
        str(recipe),
        str(tmp_path / "out"),
        "--profiles",
        str(tmp_path / "p"),
    ]
    process = subprocess.Popen(
        command, env={**os.environ, **QUIET}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for _ in range(6000):
        if (tmp_path / "p" / "profiles" / "expert-a.json").exists():
            break
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "the same command" in err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert subprocess.run(command, env={**os.environ, **QUIET}, capture_output=True, check=False).returncode == 0
