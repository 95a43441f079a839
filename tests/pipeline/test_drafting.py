"""`init`: the recipe that it writes works as it is, and says why where it is not the usual one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import sensmerge as sm
from sensmerge.errors import IncompatibleModelsError, OutputError, RecipeError
from sensmerge.methods import METHODS
from sensmerge.pipeline import outlook
from sensmerge.pipeline.drafting import Draft, allow, draft
from tests.builders import write_checkpoint
from tests.conftest import Run
from tests.oracle.families import FamilyFiles


@pytest.fixture
def here(untrained: FamilyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds the family."""
    shutil.copytree(untrained.folder, tmp_path / "family")
    monkeypatch.chdir(tmp_path / "family")
    return tmp_path / "family"


def test_the_recipe_is_merged_as_it_is(here: Path, sensmerge: Run) -> None:
    done = sensmerge("init", "base", "expert-a", "./expert-b", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "task_arithmetic of expert-a, expert-b on base" in done.stdout
    command = done.stdout.rstrip().split("\n")[-1].removeprefix("next: sensmerge ").replace("OUT", "out").split()
    assert command == ["merge", "recipe.yml", "out"]
    merged = sensmerge(*command, cwd=here)
    assert merged.returncode == 0, merged.stderr


def test_a_file_that_exists_is_not_overwritten(here: Path) -> None:
    Path("recipe.yml").write_text("mine")
    with pytest.raises(OutputError, match="there is a file of this name already") as caught:
        draft("base", ["expert-a"])
    assert Path("recipe.yml").read_text() == "mine"
    assert draft("base", ["expert-a"], caught.value.fix.split("-o ")[1]).recipe.models


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method(here: Path, name: str) -> None:
    """With as many models as it takes, and all its parameters named, in comments or not."""
    method = METHODS.get(name, where="here")
    most = method.experts[1]
    models = ["expert-a", "expert-b", "expert-c"][: most or 3]
    if name == "passthrough":
        with pytest.raises(RecipeError):
            draft("base", [*models, "expert-b"], "r.yml", method=name)
        assert not Path("r.yml").exists()
        return
    written = draft("base", models, "r.yml", method=name)
    sm.merge(written.recipe, "out")
    for option in method.options:
        assert option.name in written.recipe.text or option.name == "int8_mask", option.name


def test_what_is_a_comment_can_be_uncommented(here: Path) -> None:
    written = draft("base", ["expert-a", "expert-b"], "r.yml", method="della")
    lines = [
        line.replace("# ", "", 1) if line.lstrip().startswith(("# parameters", "#   ")) else line
        for line in written.recipe.text.split("\n")
    ]
    Path("again.yml").write_text("\n".join(lines))
    recipe = sm.load_recipe("again.yml")
    assert {"lambda", "seed"} <= recipe.parameters.keys()
    assert {"weight", "density"} <= recipe.models[0].parameters.keys()


def test_sens_says_which_lines_to_fill_in(here: Path, sensmerge: Run) -> None:
    done = sensmerge("init", "base", "expert-a", "expert-b", "--sens", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    lines = (here / "recipe.yml").read_text().split("\n")
    for model, number in enumerate(found["to_fill_in"]):
        assert "FILL-IN" in lines[number - 1]
        head, _, tail = lines[number - 1].partition("FILL-IN")
        lines[number - 1] = f"{head}calibration-{model}.jsonl}}"
        assert ".jsonl}" in tail
    assert len(found["to_fill_in"]) == 2
    assert found["next"] == "sensmerge plan recipe.yml"
    with pytest.raises(sm.SensmergeError, match=r"FILL-IN-2\.jsonl"):
        outlook(sm.load_recipe("recipe.yml"), timed=False)
    Path("recipe.yml").write_text("\n".join(lines))
    assert outlook(sm.load_recipe("recipe.yml"), timed=False).calibration
    with pytest.raises(RecipeError, match="does not work with `sens:`"):
        draft("base", ["expert-a"], "slerp.yml", method="slerp", sens=True)
    assert not Path("slerp.yml").exists()


def test_paths_lead_from_the_recipe(here: Path) -> None:
    (here / "deep").mkdir()
    os.chdir(here / "deep")
    written = draft("../base", [str(here / "expert-a"), "../expert-b"], here / "recipes" / "r.yml")
    assert written.recipe.base_model == "../base"
    assert [expert.model for expert in written.recipe.models] == [str(here / "expert-a"), "../expert-b"]
    os.chdir("/")
    assert sm.merge(written.recipe, here / "out").plan.bytes_read


def test_a_name_that_yaml_would_misread(here: Path) -> None:
    shutil.copytree("expert-a", "12: no")
    shutil.copytree("expert-b", "1e3")
    written = draft("base", ["12: no", "1e3"], "r.yml")
    assert [expert.model for expert in written.recipe.models] == ["12: no", "1e3"]


def test_unlike_tokenizers_bring_their_policy(here: Path) -> None:
    tokenizer = json.loads(Path("expert-b/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = tokenizer["model"]["vocab"].pop("!")
    Path("expert-b/tokenizer.json").write_text(json.dumps(tokenizer))
    text = draft("base", ["expert-a", "expert-b"], "r.yml").recipe.text
    assert "\ntokenizer: {source: union}\n" in text
    assert "the tokenizers of these models differ" in text
    assert "tokenizer:" not in draft("base", ["expert-a"], "other.yml").recipe.text
    config = json.loads(Path("expert-a/config.json").read_text())
    Path("expert-a/config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}))
    assert "unlike numbers of rows" in draft("base", ["expert-a"], "rows.yml").recipe.text


def test_the_dtype_is_that_of_most_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a"):
        write_checkpoint(
            tmp_path / name, {"model.layers.0.w": torch.ones(9, 9).bfloat16(), "model.norm.weight": torch.ones(9)}
        )
    assert draft("base", ["a"], "r.yml").recipe.dtype == "bfloat16"


def test_a_check_that_refuses_is_switched_off_with_its_reason(here: Path) -> None:
    written = draft("base", ["expert-a"], "r.yml")
    error = IncompatibleModelsError(
        "the models differ in rope_theta", where="config.json", why="10000 and 5000",
        fix="use models that agree, or add `allow: [rope_theta]` to the recipe",
    )  # fmt: skip
    again = allow(written, error)
    assert isinstance(again, Draft)
    assert again.recipe.allow == {"rope_theta"}
    assert "#   rope_theta: the models differ in rope_theta: 10000 and 5000" in again.recipe.text
    assert allow(again, error) is None
    assert allow(written, OutputError("x", where="", why="", fix="another folder")) is None


def test_a_bare_adapter_is_written_on_its_base(here: Path) -> None:
    """Whether or not it can be opened: the name that is tried is base+adapter."""
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(sm.SensmergeError) as caught:
        draft("base", ["adapter"], "r.yml")
    assert "base+adapter" in str(caught.value)
    assert not Path("r.yml").exists()


def test_models_that_are_not_there_leave_nothing(here: Path, sensmerge: Run) -> None:
    done = sensmerge("init", "base", "nowhere", "no", cwd=here)
    assert done.returncode == 3
    assert "2 faults were found" in done.stderr
    assert not (here / "recipe.yml").exists()
