"""Portable profiles: made of one model, used by another recipe in place of data, refused where they do not belong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import sensmerge as sm
from sensmerge.errors import CalibrationDataError, InputFileError, OutputError, RecipeError
from sensmerge.pipeline import weigh
from sensmerge.pipeline.profiling import profile
from sensmerge.pipeline.published import regrouped
from sensmerge.records import SensitivityProfile, SensSettings, SensSource
from tests.conftest import Run
from tests.oracle.families import FamilyFiles, write_recipe


def made(family: FamilyFiles, at: int, out: Path, **settings: Any) -> SensitivityProfile:
    with_samples = settings.pop("with_samples", True)
    return profile(
        str(family.experts[at]),
        SensSource(str(family.data[at])),
        out,
        base=str(family.base),
        settings=SensSettings(**settings),
        with_samples=with_samples,
    )


def with_profile(family: FamilyFiles, path: Path, at: int, file: Path, **sens: Any) -> Path:
    """A recipe whose model `at` has a profile instead of data."""
    recipe = yaml.safe_load(write_recipe(family, path, sens=sens).read_text())
    for place, entry in enumerate(recipe["models"]):
        entry["model"] = str(family.experts[place])
        entry["sens"] = {"profile": str(file)} if place == at else {"data": str(family.data[place])}
    recipe["base_model"] = str(family.base)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def test_a_profile_replaces_the_data(untrained: FamilyFiles, kept: Path, tmp_path: Path) -> None:
    """The same coefficients to the last digit of the sums; distances are measured on the samples that it carries."""
    out = tmp_path / "x" / "b.json"
    assert made(untrained, 1, out).samples == 4
    assert [path.name for path in out.parent.iterdir()] == ["b.json"], "nothing else is left"
    sens = {"temperature": 0.05}
    plain = weigh(
        sm.load_recipe(write_recipe(untrained, untrained.folder / "with-data.yml", sens=sens)), profiles_dir=kept
    )
    recipe = sm.load_recipe(with_profile(untrained, tmp_path / "r.yml", 1, out, **sens))
    found = weigh(recipe, profiles_dir=tmp_path / "kept")
    assert found.sigma == [pytest.approx(row, rel=1e-6) for row in plain.sigma]
    assert found.intervals is not None
    stamp = out.stat().st_mtime_ns
    assert made(untrained, 1, out) == SensitivityProfile.load(out)
    assert out.stat().st_mtime_ns == stamp, "what is up to date is left as it is"


def test_without_samples_only_some_rules_are_allowed(untrained: FamilyFiles, tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    whole = made(untrained, 1, tmp_path / "whole.json")
    bare = made(untrained, 1, out, with_samples=False)
    assert bare == replace(whole, rows=[], token_ids=[], loss_mask=[])
    assert SensitivityProfile.load(out) == bare
    with pytest.raises(CalibrationDataError) as caught:
        weigh(sm.load_recipe(with_profile(untrained, tmp_path / "no.yml", 1, out)), profiles_dir=tmp_path / "k")
    assert "carries no samples" in caught.value.what
    assert "`rule: alpha_only`" in caught.value.fix
    allowed = sm.load_recipe(with_profile(untrained, tmp_path / "yes.yml", 1, out, rule="alpha_only"))
    found = weigh(allowed, profiles_dir=tmp_path / "k")
    assert found.intervals is not None
    assert found.tau == [pytest.approx(1 / 3)] * 3


@pytest.mark.parametrize(
    ("made_with", "recipe_with", "words"),
    [
        ({"score": "fisher"}, {}, "it has score: fisher, the recipe weight"),
        ({"loss": "all"}, {}, "it has loss: all, the recipe response"),
        ({"group": "block"}, {"group": "module"}, "not the groups of group: module"),
    ],
)
def test_what_does_not_belong_is_refused(
    untrained: FamilyFiles, tmp_path: Path, made_with: dict[str, Any], recipe_with: dict[str, Any], words: str
) -> None:
    made(untrained, 1, tmp_path / "b.json", **made_with)
    recipe = sm.load_recipe(with_profile(untrained, tmp_path / "r.yml", 1, tmp_path / "b.json", **recipe_with))
    with pytest.raises(InputFileError) as caught:
        weigh(recipe, profiles_dir=tmp_path / "k")
    assert words in caught.value.why


def test_another_model_s_profile_is_refused(untrained: FamilyFiles, tmp_path: Path) -> None:
    made(untrained, 0, tmp_path / "a.json")
    recipe = sm.load_recipe(with_profile(untrained, tmp_path / "r.yml", 1, tmp_path / "a.json"))
    with pytest.raises(InputFileError, match="another model"):
        weigh(recipe, profiles_dir=tmp_path / "k")


@pytest.mark.parametrize("fine", ["tensor", "module"])
def test_finer_groups_serve_coarser_recipes(untrained: FamilyFiles, tmp_path: Path, fine: str) -> None:
    """Summed up, a sample at a time: what a profile of the coarser groups holds."""
    detailed = made(untrained, 1, tmp_path / "fine.json", group=fine)
    coarse = made(untrained, 1, tmp_path / "coarse.json")
    found = regrouped(detailed, "block")
    assert found is not None
    assert found.layers == coarse.layers
    assert found.sensitivity == pytest.approx(coarse.sensitivity, rel=1e-12)
    for one, other in zip(found.per_sample, coarse.per_sample, strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    assert regrouped(coarse, fine) is None
    assert regrouped(coarse, "block") is coarse
    recipe = sm.load_recipe(with_profile(untrained, tmp_path / "r.yml", 1, tmp_path / "fine.json", rule="alpha_only"))
    assert weigh(recipe, profiles_dir=tmp_path / "k").layers == coarse.layers


def test_task_vectors_need_the_base(untrained: FamilyFiles, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        profile(
            str(untrained.experts[0]), SensSource(str(untrained.data[0])), tmp_path / "x.json",
            settings=SensSettings(score="task_vector"),
        )  # fmt: skip
    assert "--base" in caught.value.fix
    assert made(untrained, 0, tmp_path / "x.json", score="task_vector").score == "task_vector"


def test_a_file_that_is_no_profile_is_not_overwritten(untrained: FamilyFiles, tmp_path: Path) -> None:
    precious = tmp_path / "precious.json"
    precious.write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="not overwritten"):
        made(untrained, 0, precious)
    assert precious.read_text() == '{"mine": 1}'


def test_the_command_maps_fields_and_counts(sensmerge: Run, untrained: FamilyFiles, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in untrained.data[0].read_text().splitlines()]
    (tmp_path / "d.json").write_text(json.dumps([{"q": row["prompt"], "a": row["response"]} for row in rows]))
    shutil.copytree(untrained.experts[0], tmp_path / "model")
    command = ["profile", "model", "--data", "d.json", "--max-length", 8, "--samples", 3, "--field", "prompt=q"]
    done = sensmerge(*command, "--field", "response=a", "--without-samples", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = SensitivityProfile.load(tmp_path / "model.json")
    assert (found.samples, found.truncated, found.dropped, found.token_ids) == (3, 3, len(rows) - 3, [])
    assert "sens: {profile: model.json}" in done.stdout
    wrong = sensmerge(*command, "--field", "answer=a", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "--field prompt=question" in wrong.stderr
