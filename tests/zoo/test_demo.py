"""`sensmerge demo`, as a newcomer runs it, on the small family."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import sensmerge as sm
from sensmerge.zoo.demo import VARIANTS, recipe_text
from sensmerge.zoo.family import Family
from tests.conftest import CACHE, Run

HERE = {"XDG_CACHE_HOME": str(CACHE), "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def demo(
    small_family: Family, sensmerge: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished demo: its folder, and the process."""
    assert small_family.folder.is_relative_to(CACHE)
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = sensmerge("demo", folder, "--size", "small", env=HERE)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_it_ends_with_one_table_of_everything(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = demo
    facts = json.loads((folder / "demo.json").read_text())
    assert facts["finished"]
    methods = [(row["method"], row["sens"]) for row in facts["rows"]]
    assert methods == [("base", None), ("chat", None), ("math", None), ("code", None)] + [
        (variant.method, variant.sens) for variant in VARIANTS
    ]
    for row in facts["rows"]:
        scores = [row[domain][0] for domain in ("chat", "math", "code")]
        assert all(0 <= score <= 100 for score in scores)
        assert row["average"][0] == pytest.approx(sum(scores) / 3)
        assert f"{row['average'][0]:.1f}" in done.stdout
    for word in (
        "Averaging",
        "Task Arithmetic, λ = 1",
        "calibrated",
        "average",
        "spread max|K*sigma - 1|",
        "model.layers.3",
    ):
        assert word in done.stdout
    assert (folder / "table.md").read_text().count("\n| ") >= 12


def test_the_table_is_measured_not_copied(
    demo: tuple[Path, subprocess.CompletedProcess[str]], small_family: Family
) -> None:
    """One row, evaluated again by the public interface from the folder that the demo left."""
    folder, _ = demo
    row = next(row for row in json.loads((folder / "demo.json").read_text())["rows"] if row["method"].endswith("= 1"))
    scores = sm.evaluate(folder / "seed0" / "models" / "ta", ["chat", "math", "code"], small_family.test)
    for domain in ("chat", "math", "code"):
        assert scores.tasks[domain].value == pytest.approx(row[domain][0], abs=2.0)


def test_experts_are_best_at_their_own_domain(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    rows = {row["method"]: row for row in json.loads((demo[0] / "demo.json").read_text())["rows"]}
    for domain in ("chat", "math", "code"):
        assert rows[domain][domain][0] > rows["base"][domain][0]


def test_its_recipes_are_ordinary_ones(demo: tuple[Path, subprocess.CompletedProcess[str]], sensmerge: Run) -> None:
    first = demo[0] / "seed0"
    for variant in VARIANTS:
        sm.load_recipe(first / "recipes" / f"{variant.name}.yml")
    done = sensmerge(
        "coefficients", first / "recipes" / "ta-paper.yml", "--profiles", first / "calibration", "--temperature", 0.05
    )
    assert done.returncode == 0, done.stderr
    assert "sensitivity" not in done.stderr, "nothing is measured again"


def test_every_variant_of_the_demo_says_what_it_is(small_family: Family) -> None:
    texts = [recipe_text(variant, small_family) for variant in VARIANTS]
    assert len(set(texts)) == len(VARIANTS)


def test_a_folder_with_other_things_is_refused(sensmerge: Run, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("kept")
    done = sensmerge("demo", tmp_path, "--size", "small", env=HERE)
    assert done.returncode == 7
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
