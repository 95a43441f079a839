"""`until`: samples are drawn until the coefficients are certain enough, none is measured twice, and merges use them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import sensmerge as sm
from sensmerge import progress
from sensmerge.errors import RecipeError
from sensmerge.pipeline import weigh
from sensmerge.pipeline.enough import drawn_samples
from sensmerge.records import Recipe
from tests.builders import write_jsonl
from tests.conftest import Run
from tests.oracle.families import FamilyFiles, write_recipe

ROWS = 20


@pytest.fixture(scope="module")
def family(untrained: FamilyFiles, tmp_path_factory: pytest.TempPathFactory) -> FamilyFiles:
    """The family with twenty rows a task, the last task with fourteen."""
    folder = tmp_path_factory.mktemp("until")
    data = []
    for at, count in enumerate((ROWS, ROWS, 14)):
        rows = [
            {"prompt": f"Q{at}: {n}+{n * n % 7}=", "response": f" {n + n * n % 7} pens" * (1 + n % 3)}
            for n in range(count)
        ]
        data.append(write_jsonl(folder / f"data-{at}.jsonl", rows))
    for model in (untrained.base, *untrained.experts):
        (folder / model.name).symlink_to(model)
    return replace(untrained, folder=folder, data=tuple(data))


def recipe_of(family: FamilyFiles, name: str, **sens: object) -> Path:
    return write_recipe(family, family.folder / f"{name}.yml", sens={"preset": "paper-tables", **sens})


def loaded(path: Path) -> Recipe:
    return sm.load_recipe(path)


def half_width(recipe: Recipe, folder: Path) -> float:
    """From the record that `coefficients` writes: half the widest interval of K·σ."""
    weigh(recipe, profiles_dir=folder)
    sigma = json.loads((folder / "coefficients.json").read_text())["intervals"]["sigma"]
    return max(3 * (high - low) / 2 for row in sigma for low, high in row)


def measured_lines(folder: Path) -> dict[str, int]:
    return {path.name: len(path.read_text().splitlines()) - 1 for path in sorted((folder / "samples").iterdir())}


class Heard(progress.Listener):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.said: list[str] = []

    def task(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        self.tasks.append(f"{label}: {total}")
        return nullcontext(lambda steps: None)

    def message(self, text: str) -> None:
        self.said.append(text)

    def warning(self, text: str) -> None:
        self.said.append(f"warning: {text}")


def test_it_stops_at_the_first_round_that_is_good_enough(family: FamilyFiles, tmp_path: Path) -> None:
    """Rounds of 3, 6, 12 rows, each the earlier ones and others; the profiles are those of a plain calibration of that size."""
    widths = {
        count: half_width(loaded(recipe_of(family, f"plain-{count}", samples=count)), tmp_path / "plain")
        for count in (3, 6, 12)
    }
    until = (widths[6] + widths[12]) / 2
    assert widths[12] < until < min(widths[3], widths[6])
    recipe = loaded(recipe_of(family, "grow", until=until, samples=3))
    heard = Heard()
    with progress.listening(heard):
        profiles, alignment = sm.calibrate(recipe, profiles_dir=tmp_path / "p", growth=2.0)
    assert [profile.samples for profile in profiles] == [12, 12, 12]
    assert [profile.dropped for profile in profiles] == [8, 8, 2]
    drawn = drawn_samples(recipe, tmp_path / "p")
    assert drawn is not None
    assert [(count, pytest.approx(widths[count])) for count in (3, 6, 12)] == drawn.rounds
    assert measured_lines(tmp_path / "p") == {f"expert-{name}.jsonl": 12 for name in "abc"}
    assert any("12 samples" in line and "is reached" in line for line in heard.said)
    # Every sample went through every pass once: 3, then 3 more, then 6 more.
    assert [each for each in heard.tasks if each.startswith("sensitivity of expert-a")] == [
        f"sensitivity of expert-a: {new}" for new in (3, 3, 6)
    ]
    assert [each for each in heard.tasks if each.startswith("expert-a on the samples of expert-b")] == [
        f"expert-a on the samples of expert-b: {new}" for new in (3, 3, 6)
    ]
    plain, distances = sm.calibrate(loaded(recipe_of(family, "same", samples=12)), profiles_dir=tmp_path / "plain")
    assert alignment is not None
    assert distances is not None
    for one, other in zip(profiles, plain, strict=True):
        assert (one.rows, one.token_ids) == (other.rows, other.token_ids)
        assert one.sensitivity == pytest.approx(other.sensitivity, rel=1e-5)
    for row, expected in zip(alignment.distances, distances.distances, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_where_the_data_do_not_suffice_it_says_so(sensmerge: Run, family: FamilyFiles, tmp_path: Path) -> None:
    recipe = recipe_of(family, "never")
    done = sensmerge(
        "calibrate", recipe, "--until", "1e-6", "--start", 8, "--growth", 2, "--profiles", tmp_path, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "warning: until: 1e-06 is not reached: no task has more than 20 samples" in done.stderr
    result = json.loads(done.stdout)
    assert [count for count, _ in result["rounds"]] == [8, 16, 20]
    assert [profile["samples"] for profile in result["profiles"]] == [20, 20, 14]


# Loading a model needs torch: with this on the path, importing it ends the process.
NO_TORCH = "import sys\nsys.modules['torch'] = None\nsys.modules['transformers'] = None\n"


def test_merges_and_sweeps_use_what_was_drawn(sensmerge: Run, family: FamilyFiles, tmp_path: Path) -> None:
    """With `until` in the recipe nothing is measured again, nor with the number of samples that `calibrate` names."""
    recipe = recipe_of(family, "command")
    done = sensmerge("calibrate", recipe, "--until", "0.5", "--start", 4, "--profiles", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    assert "until: 0.5 is reached with 4 samples" in done.stderr
    assert "write `until: 0.5` or `samples: 4`" in done.stderr
    (tmp_path / "sitecustomize.py").write_text(NO_TORCH)
    blocked = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(sm.__file__).parent.parent}"}
    text = yaml.safe_load(recipe.read_text())
    for key, value in (("until", 0.5), ("samples", 4)):
        changed = text | {"sens": text["sens"] | {key: value}}
        recipe.write_text(yaml.safe_dump(changed, sort_keys=False))
        again = sensmerge("coefficients", recipe, "--profiles", tmp_path / "p", "--json", env=blocked)
        assert again.returncode == 0, again.stderr
        out = tmp_path / f"out-{key}"
        heard = Heard()
        with progress.listening(heard):
            sm.merge(loaded(recipe), out, profiles_dir=tmp_path / "p")
        assert not any("sensitivity of" in task for task in heard.tasks)
        assert json.loads((out / "sensmerge/profiles/expert-a.json").read_text())["samples"] == 4
        assert "95 % interval" in (out / "README.md").read_text()
    recipe.write_text(yaml.safe_dump(text | {"sens": {"preset": "paper", "until": 0.001}}, sort_keys=False))
    swept = sensmerge("coefficients", recipe, "--temperature", "0.05", "--profiles", tmp_path / "p", env=blocked)
    assert swept.returncode == 0, swept.stderr
    assert "`sensmerge calibrate` draws more" in swept.stderr
    assert "±" in swept.stdout


@pytest.mark.parametrize("until", [0, -1, "soon", True])
def test_what_until_cannot_be(family: FamilyFiles, until: object) -> None:
    with pytest.raises(RecipeError, match="'until' must be a number above 0"):
        loaded(recipe_of(family, "wrong", until=until))


def test_start_without_until(sensmerge: Run, family: FamilyFiles) -> None:
    done = sensmerge("calibrate", recipe_of(family, "start"), "--start", 4)
    assert done.returncode == 2
    assert "--until" in done.stderr
    assert sensmerge("calibrate", recipe_of(family, "start"), "--memory", "huge").returncode == 2
