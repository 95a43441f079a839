"""`plan`: every fault at once before anything is read, and figures that a real merge keeps to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

import sensmerge as sm
from sensmerge.checkpoints.source import Wrapped
from sensmerge.errors import (
    CalibrationDataError,
    IncompatibleModelsError,
    InputFileError,
    OutputError,
    RecipeError,
    ResourceError,
    SeveralErrors,
)
from sensmerge.execution.engine import run_plan
from sensmerge.execution.estimate import cost_of
from sensmerge.execution.timing import Nowhere
from sensmerge.pipeline import dry_run, outlook
from sensmerge.pipeline.models import open_models
from sensmerge.pipeline.planning import planned
from sensmerge.plan import SHARD_BYTES
from sensmerge.records import Recipe
from tests.builders import write_checkpoint
from tests.conftest import QUIET, Run
from tests.oracle.families import FamilyFiles, write_recipe

PEAK = """
import sys, sensmerge
from pathlib import Path
sensmerge.merge(sensmerge.load_recipe(sys.argv[1]), sys.argv[2], jobs=2)
print(next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two models of 36 MiB, with a matrix that no buffer holds, in bf16."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"model.embed.weight": (1000, 64), "model.layers.0.up": (6000, 3000), "model.layers.0.norm": (3000,)}
        tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
        write_checkpoint(folder / name, tensors)
    return folder


def recipe_for(folder: Path, method: str, **parameters: object) -> Recipe:
    content = {
        "merge_method": method,
        "allow": ["unrelated"],
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
    }
    path = folder / f"{method}-{len(parameters)}.yml"
    path.write_text(yaml.safe_dump({**content, "parameters": parameters}))
    return sm.load_recipe(path)


class Counting(Wrapped):
    """Counts the bytes that are read."""

    done = 0

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        self.done += out.nbytes
        super().read_into(name, start, out)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.5, "scope": "global"}),
        ("model_stock", {}),
        ("dare_linear", {"density": 0.5, "rescale": "l1"}),
    ],
)
def test_as_many_bytes_are_read_as_the_plan_says(large: Path, method: str, parameters: dict[str, object]) -> None:
    recipe = recipe_for(large, method, **parameters)
    with open_models(recipe) as models:
        plan = planned(recipe, models, SHARD_BYTES)
        cost = cost_of(plan, models.readers, 2)
        readers = {name: Counting(reader) for name, reader in models.readers.items()}
        run_plan(plan, readers, Nowhere(), jobs=2)
    read = sum(reader.done for reader in readers.values())
    assert read == pytest.approx(plan.bytes_read + cost.bytes_again, rel=0.1)
    assert (cost.bytes_again == 0) is (method == "linear")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("method", ["linear", "ties", "karcher"])
def test_the_peak_of_a_real_merge_is_below_the_plan_and_not_far(large: Path, tmp_path: Path, method: str) -> None:
    recipe = recipe_for(large, method)
    expected = outlook(recipe, tmp_path / "out", jobs=2, timed=False).cost.peak_bytes
    done = subprocess.run(
        [sys.executable, "-c", PEAK, recipe.path, tmp_path / "out"],
        capture_output=True, text=True, check=True, env={**os.environ, **QUIET},
    )  # fmt: skip
    measured = int(done.stdout) * 1024
    assert measured <= expected <= 3 * measured + 300 * 2**20


def test_the_figures_are_those_of_the_files(large: Path, tmp_path: Path) -> None:
    recipe = recipe_for(large, "ties", density=0.5)
    found = outlook(recipe, tmp_path / "out", shard_bytes=10_000_000)
    result = sm.merge(recipe, tmp_path / "out", shard_bytes=10_000_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file for file, _ in found.plan.shards] == [file.name for file in files] == sorted(result.hashes)
    assert found.plan.bytes_written == sum(file.stat().st_size for file in files)
    parameters = 1000 * 64 + 6000 * 3000 + 3000
    assert found.plan.bytes_read == 3 * 2 * parameters
    assert {model.model: (model.folders, model.dtype, model.parameters) for model in found.models} == {
        name: ((str(large / name),), "BF16", parameters) for name in ("base", "a", "b")
    }
    assert found.settings["density"] == 0.5
    assert found.settings["lambda"] == 1.0
    assert found.seconds is not None
    assert found.seconds > 0


def tree(folder: Path) -> dict[str, int]:
    """Everything below a folder, with the time of its last change."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_plan_writes_nothing_and_says_what_was_found(large: Path, sensmerge: Run, tmp_path: Path) -> None:
    recipe = recipe_for(large, "ties", density=0.5)
    before = tree(large)
    shown = sensmerge("plan", recipe.path, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    told = sensmerge("merge", recipe.path, tmp_path / "out", "--dry-run", "--json")
    found = json.loads(sensmerge("plan", recipe.path, tmp_path / "out", "--json").stdout)
    assert tree(large) == before
    assert list(tmp_path.iterdir()) == []
    for words in (str(large / "a"), "18.07 M", "BF16", "density 0.5", "of it once more", "about", "free"):
        assert words in shown.stdout, words
    assert json.loads(told.stdout).keys() == found.keys()
    for key in ("bytes_read", "bytes_read_again", "bytes_written", "peak_memory_bytes", "found", "parameters"):
        assert json.loads(told.stdout)[key] == found[key]


def test_every_fault_is_told_at_once(untrained: FamilyFiles, tmp_path: Path, sensmerge: Run) -> None:
    folder = tmp_path / "family"
    shutil.copytree(untrained.folder, folder)
    path = write_recipe(untrained, folder / "r.yml", sens={})
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    tokenizer = json.loads((folder / "expert-a" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = tokenizer["model"]["vocab"].pop("!")
    (folder / "expert-a" / "tokenizer.json").write_text(json.dumps(tokenizer))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "expert-b" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "expert-b" / "model.safetensors", metadata={"format": "pt"})
    (folder / "calibration-0.jsonl").unlink()
    (folder / "calibration-2.jsonl").write_text("{broken\n")
    for action in (outlook, dry_run):
        with pytest.raises(SeveralErrors) as caught:
            action(sm.load_recipe(path), out)
        kinds = [type(error) for error in caught.value.errors]
        assert kinds[0] is OutputError
        # Unlike tokens in a recipe with `sens:` are one of the recipe.
        assert (kinds.count(RecipeError), kinds.count(IncompatibleModelsError)) == (1, 1)
        assert kinds.count(CalibrationDataError) == 2
        assert len(kinds) == 5
    done = sensmerge("plan", path, out)
    assert done.returncode == 7
    for words in ("5 faults", "'new'", "model.norm.weight", "calibration-0.jsonl", "calibration-2.jsonl"):
        assert words in done.stderr, words
    # Models that cannot be opened come first, and do not hide the rest.
    shutil.rmtree(folder / "expert-c")
    (folder / "base" / "config.json").unlink()
    with pytest.raises(SeveralErrors) as caught:
        outlook(sm.load_recipe(path), out)
    kinds = [type(error) for error in caught.value.errors]
    assert kinds == [InputFileError, InputFileError, OutputError, CalibrationDataError, CalibrationDataError]


def test_an_output_larger_than_the_disk(tmp_path: Path, sensmerge: Run) -> None:
    free = shutil.disk_usage(tmp_path).free
    rows = free // 2048 + 10_000_000
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        header = {"model.layers.0.up": {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}}
        text = json.dumps(header).encode()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            try:
                file.truncate(8 + len(text) + rows * 2048)
            except OSError:
                pytest.skip("this file system has no files with holes of that size")
    (tmp_path / "r.yml").write_text("merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]\n")
    done = sensmerge("plan", tmp_path / "r.yml", tmp_path / "out")
    assert done.returncode == 6, done.stderr
    assert "the output does not fit on the disk" in done.stderr
    assert str(rows * 2048)[:4] in done.stderr
    with pytest.raises(ResourceError, match="does not fit on the disk"):
        dry_run(sm.load_recipe(tmp_path / "r.yml"), tmp_path / "out")


def test_what_will_be_calibrated(untrained: FamilyFiles, tmp_path: Path) -> None:
    path = write_recipe(untrained, untrained.folder / "steps.yml", sens={"samples": 5})
    kept = tmp_path / "kept"
    found = outlook(sm.load_recipe(path), profiles_dir=kept, timed=False)
    assert [(step.name, step.samples, step.state) for step in found.calibration] == [
        ("expert-a", 5, "to measure"), ("expert-b", 4, "to measure"), ("expert-c", 5, "to measure"),
        ("distances", 42, "to measure"),
    ]  # fmt: skip
    sm.calibrate(sm.load_recipe(path), profiles_dir=kept)
    found = outlook(sm.load_recipe(path), profiles_dir=kept, timed=False)
    assert {step.state for step in found.calibration} == {"kept"}
    other = write_recipe(untrained, untrained.folder / "steps2.yml", sens={"samples": 3})
    states = [step.state for step in outlook(sm.load_recipe(other), profiles_dir=kept, timed=False).calibration]
    assert states == ["to measure"] * 4


def test_a_plan_of_a_plain_merge_needs_no_torch(large: Path) -> None:
    recipe = recipe_for(large, "linear")
    code = (
        "import sys, sensmerge as sm; from sensmerge.pipeline import outlook; outlook(sm.load_recipe(sys.argv[1]));"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, recipe.path], check=True, env={**os.environ, **QUIET})
