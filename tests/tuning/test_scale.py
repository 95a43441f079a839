"""`lambda: auto` chooses by the loss of the model that a merge with that λ really writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import sensmerge as sm
from sensmerge.records import SensitivityProfile
from sensmerge.zoo.family import Family
from tests.builders import byte_tokenizer, tiny_gpt2, tiny_mixtral, write_jsonl
from tests.conftest import Run


def recipe_text(family: Family, scale: object, sens: str) -> str:
    """A recipe on the trained family."""
    models = "".join(
        f"  - model: {family.experts[domain]}\n    sens: {{data: {family.calibration[domain]}}}\n"
        for domain in family.experts
    )
    head = f"merge_method: task_arithmetic\nbase_model: {family.base}\nparameters: {{lambda: {scale}}}\n"
    return f"{head}sens: {sens}\nmodels:\n{models}"


def loss_of(folder: Path, profiles: list[SensitivityProfile], dtype: torch.dtype = torch.float64) -> float:
    """The mean over tasks of the mean sample loss, one sample at a time: nothing of ours."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tasks = []
    for profile in profiles:
        losses = []
        for ids, mask in zip(profile.token_ids, profile.loss_mask, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            at = [t for t, counts in enumerate(mask) if counts]
            losses.append(float(cross_entropy(logits[[t - 1 for t in at]], torch.tensor([ids[t] for t in at]))))
        tasks.append(math.fsum(losses) / len(losses))
    return math.fsum(tasks) / len(tasks)


@pytest.fixture(scope="module")
def merged(small_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge with λ auto, its recipe beside it."""
    folder = tmp_path_factory.mktemp("auto")
    (folder / "auto.yml").write_text(recipe_text(small_family, "auto", "{rule: uniform, samples: 16}"))
    sm.merge(sm.load_recipe(folder / "auto.yml"), folder / "auto", profiles_dir=folder / "kept")
    return folder


def test_the_loss_told_is_the_loss_of_the_merge(merged: Path, small_family: Family) -> None:
    """Three of the λ that were tried are merged to disk, and their losses measured independently."""
    profiles = [SensitivityProfile.load(path) for path in sorted((merged / "kept" / "profiles").iterdir())]
    told = {row[0]: row[1] for row in json.loads((merged / "auto" / "sensmerge" / "scale.json").read_text())["tried"]}
    for scale in (0.3, 1.0, 1.5):
        path = merged / f"fixed-{scale}.yml"
        path.write_text(recipe_text(small_family, scale, "{rule: uniform, samples: 16}"))
        sm.merge(sm.load_recipe(path), merged / f"fixed-{scale}", profiles_dir=merged / "kept")
        assert loss_of(merged / f"fixed-{scale}", profiles) == pytest.approx(told[scale], rel=1e-4)


def test_the_best_of_grid_and_refinement_is_taken(merged: Path) -> None:
    scale = json.loads((merged / "auto" / "sensmerge" / "scale.json").read_text())
    tried = {row[0]: row[1] for row in scale["tried"]}
    grid = [round(0.1 * step, 2) for step in range(1, 16)]
    best_of_grid = min(grid, key=lambda value: (tried[value], value))
    assert set(tried) == {*grid, round(best_of_grid - 0.05, 2), round(best_of_grid + 0.05, 2)}
    assert scale["lambda"] == min(tried, key=lambda value: (tried[value], value))
    for row in scale["tried"]:
        assert row[1] == pytest.approx(sum(row[2:]) / 3, rel=1e-12)
    assert 0.1 < scale["lambda"] < 1.5, "on a trained family the best λ lies inside the grid"


def test_the_choice_is_kept(merged: Path, sensmerge: Run) -> None:
    """The same recipe again chooses nothing anew: no progress line for it, and the same λ."""
    done = sensmerge("merge", merged / "auto.yml", merged / "again", "--profiles", merged / "kept", "--json")
    assert done.returncode == 0, done.stderr
    assert "choosing lambda" not in done.stderr
    assert json.loads(done.stdout)["lambda"] == json.loads((merged / "auto/sensmerge/scale.json").read_text())["lambda"]


def test_coefficients_show_no_lambda_while_it_is_auto(merged: Path, sensmerge: Run) -> None:
    done = sensmerge("coefficients", merged / "auto.yml", "--profiles", merged / "kept", "--json")
    record = json.loads(done.stdout)
    assert record["lambda"] is None
    assert record["weights"] == [[1.0] * len(record["layers"])] * 3


@pytest.mark.parametrize("kind", ["fused experts", "without a prefix"])
def test_bases_whose_parameters_are_called_otherwise(kind: str, tmp_path: Path) -> None:
    """Mixtral's experts, which transformers fuses while loading, and a GPT-2 as on the hub: the loss told is the merge's."""
    for seed, name in enumerate(("base", "one", "two")):
        model = tiny_mixtral(seed) if kind == "fused experts" else tiny_gpt2(seed)
        model.save_pretrained(tmp_path / name)
        if kind == "without a prefix":
            model.transformer.save_pretrained(tmp_path / name)
            config = {**model.config.to_dict(), "architectures": ["GPT2LMHeadModel"]}
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        byte_tokenizer().save_pretrained(tmp_path / name)
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {row}?", "response": "yes"} for row in range(3)])
    models = "".join(f"  - {{model: {name}, sens: {{data: {name}.jsonl}}}}\n" for name in ("one", "two"))
    for scale in ("auto", 0.7):
        text = "merge_method: task_arithmetic\nbase_model: base\nallow: [unrelated]\n"
        text += f"parameters: {{lambda: {scale}}}\nsens: {{rule: uniform}}\n"
        (tmp_path / f"{scale}.yml").write_text(f"{text}models:\n{models}")
        sm.merge(sm.load_recipe(tmp_path / f"{scale}.yml"), tmp_path / f"out-{scale}", profiles_dir=tmp_path / "kept")
    profiles = [SensitivityProfile.load(tmp_path / "kept" / "profiles" / f"{name}.json") for name in ("one", "two")]
    tried = json.loads((tmp_path / "out-auto" / "sensmerge" / "scale.json").read_text())["tried"]
    told = {row[0]: row[1] for row in tried}
    # transformers has no fused experts in float64.
    assert loss_of(tmp_path / "out-0.7", profiles, torch.float32) == pytest.approx(told[0.7], rel=1e-4)
