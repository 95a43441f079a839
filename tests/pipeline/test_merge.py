"""What a merge promises: the plain bits where σ is uniform, the same bytes in any order, a folder that loads, and no half work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sensmerge as sm
from sensmerge.errors import (
    IncompatibleModelsError,
    InputFileError,
    NonFiniteError,
    OutputError,
    RecipeError,
    SeveralErrors,
)
from sensmerge.pipeline import dry_run
from sensmerge.records import Alignment, Coefficients, Recipe, SensitivityProfile
from tests.oracle.families import FamilyFiles, FamilySpec, build_family, write_recipe


def recipe_of(family: FamilyFiles, path: Path, **changes: Any) -> Recipe:
    """A recipe beside the family's folders, loaded."""
    sens = changes.pop("sens", None)
    written = write_recipe(family, family.folder / path.name, sens=sens or {}, **changes)
    if sens is None:
        content = yaml.safe_load(written.read_text())
        del content["sens"]
        for entry in content["models"]:
            del entry["sens"]
        written.write_text(yaml.safe_dump(content))
    return sm.load_recipe(written)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_uniform_coefficients_give_the_plain_merge_bit_for_bit(
    untrained: FamilyFiles, kept: Path, tmp_path: Path, method: str, dtype: str
) -> None:
    parameters = {"lambda": 0.7} if method == "task_arithmetic" else None
    common = {"method": method, "dtype": dtype, "weights": (0.5, 1.0, 2.0), "parameters": parameters}
    plain = recipe_of(untrained, tmp_path / f"plain-{method}-{dtype}.yml", **common)
    sens = recipe_of(untrained, tmp_path / f"uniform-{method}-{dtype}.yml", sens={"rule": "uniform"}, **common)
    sm.merge(plain, tmp_path / "plain")
    sm.merge(sens, tmp_path / "sens", profiles_dir=kept)
    assert_same_bits(weights(tmp_path / "plain"), weights(tmp_path / "sens"))


def test_another_rule_does_not(untrained: FamilyFiles, kept: Path, tmp_path: Path) -> None:
    sm.merge(recipe_of(untrained, tmp_path / "plain.yml"), tmp_path / "plain")
    sharp = recipe_of(untrained, tmp_path / "sharp.yml", sens={"temperature": 0.05})
    result = sm.merge(sharp, tmp_path / "sens", profiles_dir=kept)
    assert result.coefficients is not None
    assert result.coefficients.spread > 0.3
    plain, sens = weights(tmp_path / "plain"), weights(tmp_path / "sens")
    assert all(not torch.equal(plain[name], sens[name]) for name in plain)


def permuted(recipe: Recipe, order: tuple[int, ...], path: Path) -> Recipe:
    """The same recipe with its experts in another order."""
    content = yaml.safe_load(recipe.text)
    content["models"] = [content["models"][at] for at in order]
    path.write_text(yaml.safe_dump(content))
    return sm.load_recipe(path)


@pytest.mark.parametrize(
    ("name", "sens", "parameters"),
    [
        ("sharp", {"temperature": 0.05}, None),
        ("normalized", {"rule": "normalized"}, {"lambda": 0.6}),
        ("additive", {"rule": "additive", "temperature": 0.1, "other": "own_group"}, None),
        ("auto", {"preset": "calibrated"}, None),
    ],
)
def test_the_order_of_the_experts_changes_no_byte(
    untrained: FamilyFiles, tmp_path: Path, name: str, sens: dict[str, Any], parameters: dict[str, Any] | None
) -> None:
    """The coefficients are permuted with the experts, measured anew for each order, and the model is the same file."""
    first = recipe_of(
        untrained, tmp_path / f"order-{name}.yml", sens=sens, parameters=parameters, weights=(0.5, 1.0, 2.0)
    )
    order = (2, 0, 1)
    other = permuted(first, order, untrained.folder / f"order-{name}-permuted.yml")
    one = sm.merge(first, tmp_path / "one", profiles_dir=tmp_path / "kept-one").coefficients
    two = sm.merge(other, tmp_path / "two", profiles_dir=tmp_path / "kept-two").coefficients
    assert one is not None
    assert two is not None
    for key in ("models", "alpha", "tau", "sigma", "w", "weights"):
        assert [getattr(one, key)[at] for at in order] == getattr(two, key), key
    assert one.lambda_ == two.lambda_
    assert {role: [sigma[at] for at in order] for role, sigma in one.other.items()} == two.other
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_shards_hold_the_same_tensors_as_one_file(untrained: FamilyFiles, tmp_path: Path) -> None:
    recipe = recipe_of(untrained, tmp_path / "shards.yml")
    sm.merge(recipe, tmp_path / "one")
    result = sm.merge(recipe, tmp_path / "many", shard_bytes=40_000)
    assert len(result.hashes) > 3
    assert_same_bits(weights(tmp_path / "one"), weights(tmp_path / "many"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert {name: file for file in result.hashes for name in load_file(tmp_path / "many" / file)} == index["weight_map"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_folder_loads_and_generates(tmp_path: Path, dtype: str, tied: bool) -> None:
    spec = FamilySpec("load", seed=4, kinds=("pair", "instruction"), sizes=(0.1, 0.2), layers=2, tied=tied, rows=(3, 3))
    family = build_family(spec, tmp_path / "family")
    recipe = recipe_of(family, tmp_path / "load.yml", sens={"temperature": 0.1}, dtype=dtype)
    sm.merge(recipe, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == getattr(torch, dtype)
    assert model.config.tie_word_embeddings is tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Q: Ada has", return_tensors="pt")
    text = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert text.shape[1] > ids["input_ids"].shape[1]
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md",
        "sensmerge.yml", "sensmerge/coefficients.json", "sensmerge/alignment.json", "sensmerge/merge.json",
        "sensmerge/profiles/expert-a.json", "sensmerge/profiles/expert-b.json",
    } <= names  # fmt: skip
    assert ("lm_head.weight" in weights(tmp_path / "out")) is not tied


def test_the_records_have_the_promised_keys(untrained: FamilyFiles, kept: Path, tmp_path: Path) -> None:
    recipe = recipe_of(untrained, tmp_path / "records.yml", sens={"preset": "calibrated"})
    result = sm.merge(recipe, tmp_path / "out", profiles_dir=kept)
    folder = tmp_path / "out" / "sensmerge"
    assert json.loads((folder / "coefficients.json").read_text()).keys() == {
        "schema", "preset", "rule", "temperature", "total", "lambda", "models", "layers", "alpha", "tau", "sigma", "w",
        "weights", "other", "spread", "warnings", "inputs", "intervals",
    }  # fmt: skip
    assert json.loads((folder / "alignment.json").read_text()).keys() == {
        "schema", "models", "distances", "per_sample", "inputs",
    }  # fmt: skip
    assert json.loads((folder / "profiles" / "expert-a.json").read_text()).keys() == {
        "schema", "model", "fingerprint", "samples", "tokens", "loss", "score", "layers", "sensitivity", "per_sample",
        "tensors", "rows", "token_ids", "loss_mask", "inputs", "paths", "truncated", "dropped",
    }  # fmt: skip
    coefficients = Coefficients.load(folder / "coefficients.json")
    profile = SensitivityProfile.load(folder / "profiles" / "expert-b.json")
    alignment = Alignment.load(folder / "alignment.json")
    scale = json.loads((folder / "scale.json").read_text())
    assert scale["lambda"] == coefficients.lambda_ == result.scale
    assert len(scale["tried"]) == 17
    assert scale["lambda"] == min(scale["tried"], key=lambda row: (row[1], row[0]))[0]
    np.testing.assert_allclose(profile.sensitivity, np.sum(profile.per_sample, axis=0), rtol=1e-12)
    assert profile.tokens == sum(map(sum, profile.loss_mask))
    inside = sum(total for name, total in profile.tensors.items() if name.startswith("model.layers."))
    assert sum(profile.sensitivity) == pytest.approx(inside, rel=1e-12)
    np.testing.assert_allclose(alignment.distances[0][1], np.mean(alignment.per_sample[0][1]), rtol=1e-12)
    assert (tmp_path / "out" / "sensmerge.yml").read_text() == recipe.text
    merge = json.loads((folder / "merge.json").read_text())
    digest = xxhash.xxh3_128((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert merge["outputs"] == {"model.safetensors": digest}
    assert merge["inputs"].keys() == {"./base", "./expert-a", "./expert-b", "./expert-c"}
    assert (merge["method"], merge["parameters"], merge["random_seed"]) == ("task_arithmetic", {}, None)
    assert merge["lambda"] == result.scale


def test_the_model_card_is_one(untrained: FamilyFiles, kept: Path, tmp_path: Path) -> None:
    sm.merge(
        recipe_of(untrained, tmp_path / "card.yml", sens={"temperature": 0.05}), tmp_path / "out", profiles_dir=kept
    )
    _, head, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["library_name"] == "transformers"
    assert front["base_model_relation"] == "merge"
    assert {"merge", "sensmerge"} <= set(front["tags"])
    assert "base_model" not in front, "local paths are no hub ids"
    assert "merge_method: task_arithmetic" in body
    assert "model.layers.3" in body


def test_the_python_interface_of_the_readme(untrained: FamilyFiles, kept: Path, tmp_path: Path) -> None:
    """Coefficients computed by hand go into the merge with the recipe's own weights and λ."""
    recipe = recipe_of(untrained, tmp_path / "api.yml", sens={}, weights=(0.5, 1.0, 2.0), parameters={"lambda": 0.4})
    profiles, alignment = sm.calibrate(recipe, profiles_dir=kept)
    given = sm.coefficients(profiles, alignment, temperature=0.05)
    result = sm.merge(recipe, tmp_path / "given", coefficients=given, profiles_dir=kept)
    same = recipe_of(
        untrained,
        tmp_path / "file.yml",
        sens={"temperature": 0.05},
        weights=(0.5, 1.0, 2.0),
        parameters={"lambda": 0.4},
    )
    expected = sm.merge(same, tmp_path / "file", profiles_dir=kept)
    assert_same_bits(weights(tmp_path / "given"), weights(tmp_path / "file"))
    assert result.coefficients is not None
    assert expected.coefficients is not None
    assert result.coefficients.weights == expected.coefficients.weights
    other = permuted(recipe, (1, 0, 2), untrained.folder / "api-permuted.yml")
    with pytest.raises(RecipeError, match="belong to other models"):
        sm.merge(other, tmp_path / "no", coefficients=given, profiles_dir=kept)


def test_a_base_among_the_models_counts_for_nothing(untrained: FamilyFiles, tmp_path: Path) -> None:
    recipe = recipe_of(untrained, tmp_path / "without.yml")
    content = yaml.safe_load(recipe.text)
    content["models"].append({"model": content["base_model"]})
    path = untrained.folder / "with-base.yml"
    path.write_text(yaml.safe_dump(content))
    sm.merge(recipe, tmp_path / "without")
    sm.merge(sm.load_recipe(path), tmp_path / "with")
    assert_same_bits(weights(tmp_path / "without"), weights(tmp_path / "with"))


def test_linear_without_a_base_is_the_mean(untrained: FamilyFiles, tmp_path: Path) -> None:
    path = untrained.folder / "mean.yml"
    path.write_text(
        "merge_method: linear\nmodels:\n" + "".join(f"  - model: {expert}\n" for expert in untrained.experts)
    )
    sm.merge(sm.load_recipe(path), tmp_path / "out")
    experts = [weights(expert) for expert in untrained.experts]
    for name, tensor in weights(tmp_path / "out").items():
        exact = sum(expert[name].double() for expert in experts) / 3
        torch.testing.assert_close(tensor.double(), exact, rtol=2e-7, atol=2e-7)


# Nothing is lost


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def damaged_copy(family: FamilyFiles, tmp_path: Path, change: Any) -> Path:
    """A recipe (without sens) on copies of the family's models, with `change(tensors)` applied to the second expert."""
    for folder in (family.base, *family.experts):
        shutil.copytree(folder, tmp_path / folder.name)
    file = tmp_path / family.experts[1].name / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    path = tmp_path / "recipe.yml"
    models = "".join(f"  - model: {expert.name}\n" for expert in family.experts)
    path.write_text(f"merge_method: task_arithmetic\nbase_model: base\nmodels:\n{models}")
    return path


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")


def cut_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (put_nan, NonFiniteError, ["expert-b", "model.layers.2.mlp.up_proj.weight", "[3, 5]"]),
        (cut_rows, IncompatibleModelsError, ["expert-b", "lm_head.weight"]),
        (drop_one, IncompatibleModelsError, ["expert-b", "model.norm.weight", "missing"]),
        (add_one, IncompatibleModelsError, ["expert-b", "q_proj.bias"]),
    ],
)
def test_a_bad_model_is_named_and_nothing_is_lost(
    untrained: FamilyFiles, tmp_path: Path, change: Any, error: type[Exception], words: list[str]
) -> None:
    recipe = sm.load_recipe(damaged_copy(untrained, tmp_path / "models", change))
    with pytest.raises(error) as caught:
        sm.merge(recipe, tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()
    old = tmp_path / "old"
    old.mkdir()
    (old / "precious.txt").write_text("kept")
    with pytest.raises(error):
        sm.merge(recipe, old, overwrite=True)
    assert tree(old) == {"precious.txt": b"kept"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "old"], "no partial folder may stay"


def test_every_difference_is_listed_at_once(untrained: FamilyFiles, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        cut_rows(tensors)
        drop_one(tensors)
        add_one(tensors)

    with pytest.raises(IncompatibleModelsError, match="3 tensor"):
        sm.merge(sm.load_recipe(damaged_copy(untrained, tmp_path / "models", change)), tmp_path / "out")


def test_overflow_on_writing_is_an_error(untrained: FamilyFiles, tmp_path: Path) -> None:
    recipe = recipe_of(untrained, tmp_path / "overflow.yml", dtype="float16", parameters={"lambda": 1e6})
    with pytest.raises(NonFiniteError, match="out_dtype"):
        sm.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_empty_is_refused(untrained: FamilyFiles, tmp_path: Path) -> None:
    recipe = recipe_of(untrained, tmp_path / "busy.yml")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("kept")
    with pytest.raises(OutputError, match="--overwrite") as caught:
        sm.merge(recipe, tmp_path / "out")
    assert caught.value.exit_code == 7
    assert tree(tmp_path / "out") == {"precious.txt": b"kept"}
    sm.merge(recipe, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious.txt").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_input_is_never_overwritten(untrained: FamilyFiles, tmp_path: Path) -> None:
    recipe = recipe_of(untrained, tmp_path / "input.yml")
    link = tmp_path / "link"
    link.symlink_to(untrained.experts[0])
    before = tree(untrained.experts[0])
    for out in (untrained.experts[0], untrained.experts[0] / "inside", untrained.folder, link):
        with pytest.raises(OutputError, match="overwrite a model"):
            sm.merge(recipe, out, overwrite=True)
    assert tree(untrained.experts[0]) == before


def test_an_empty_output_folder_is_fine(untrained: FamilyFiles, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    sm.merge(recipe_of(untrained, tmp_path / "empty.yml"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_published_profile_replaces_data_and_must_fit(untrained: FamilyFiles, kept: Path, tmp_path: Path) -> None:
    measured = recipe_of(untrained, tmp_path / "measured.yml", sens={"temperature": 0.05})
    sm.merge(measured, tmp_path / "measured", profiles_dir=kept)
    content = yaml.safe_load(measured.text)
    for entry, expert in zip(content["models"], untrained.experts, strict=True):
        entry["sens"] = {"profile": str(kept / "profiles" / f"{expert.name}.json")}
    path = untrained.folder / "published.yml"
    path.write_text(yaml.safe_dump(content))
    sm.merge(sm.load_recipe(path), tmp_path / "published", profiles_dir=tmp_path / "other")
    assert_same_bits(weights(tmp_path / "measured"), weights(tmp_path / "published"))
    content["models"][0]["sens"], content["models"][1]["sens"] = (
        content["models"][1]["sens"],
        content["models"][0]["sens"],
    )
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SeveralErrors, match="another model") as caught:
        sm.merge(sm.load_recipe(path), tmp_path / "swapped", profiles_dir=tmp_path / "other")
    assert [type(error) for error in caught.value.errors] == [InputFileError] * 2, "both are told at once"


def test_a_head_tied_by_default_and_stored_all_the_same(tmp_path: Path) -> None:
    """GPT-2 ties its head although config.json does not say so; a checkpoint that stores the head stays consistent."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.oracle.families import train_tokenizer

    tokenizer = train_tokenizer(["one two three four"], adds_bos=False)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32)
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        model = GPT2LMHeadModel(config)
        tokenizer.save_pretrained(tmp_path / name)
        config.save_pretrained(tmp_path / name)
        stored = json.loads((tmp_path / name / "config.json").read_text())
        stored.pop("tie_word_embeddings", None)
        (tmp_path / name / "config.json").write_text(json.dumps(stored | {"architectures": ["GPT2LMHeadModel"]}))
        tensors = {key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "data.jsonl").write_text('{"text": "one two three"}\n')
    models = "".join(f"  - model: {name}\n    sens: {{data: data.jsonl}}\n" for name in "ab")
    (tmp_path / "r.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: base\nsens: {{temperature: 0.05}}\nmodels:\n{models}"
        "allow: [unrelated]\n"
    )
    sm.merge(sm.load_recipe(tmp_path / "r.yml"), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in weights(tmp_path / "out"), (
        "one matrix is stored once, so that no draw can make it two"
    )
    for group in ("module", "tensor"):
        text = (tmp_path / "r.yml").read_text().replace("0.05}", f"0.05, group: {group}}}")
        (tmp_path / f"{group}.yml").write_text(text)
        result = sm.merge(sm.load_recipe(tmp_path / f"{group}.yml"), tmp_path / f"out-{group}")
        assert result.coefficients is not None
        assert len(result.coefficients.layers) == {"module": 4, "tensor": 24}[group]


@pytest.mark.parametrize("group", ["block", "module", "tensor"])
def test_buffers_of_old_checkpoints_are_carried_along(untrained: FamilyFiles, tmp_path: Path, group: str) -> None:
    """Old Llama checkpoints store rotary_emb.inv_freq, which is no parameter: it comes out as it went in."""
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for folder in (untrained.base, *untrained.experts):
        shutil.copytree(folder, tmp_path / folder.name)
        file = tmp_path / folder.name / "model.safetensors"
        save_file({**load_file(file), name: frequencies}, file, metadata={"format": "pt"})
    for file in untrained.data:
        shutil.copyfile(file, tmp_path / file.name)
    recipe = write_recipe(untrained, tmp_path / "buffers.yml", sens={"temperature": 0.05, "group": group})
    sm.merge(sm.load_recipe(recipe), tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")[name], frequencies)


def test_overwriting_never_takes_what_the_merge_needs(untrained: FamilyFiles, kept: Path, tmp_path: Path) -> None:
    """OUT may not hold the recipe, its data or its calibration, however plainly the user said --overwrite."""
    for name in ("project", "data"):
        (tmp_path / name).mkdir()
    data = tmp_path / "data" / "samples.jsonl"
    data.write_text('{"text": "one two three"}\n')
    models = "".join(f"  - model: {expert}\n    sens: {{data: {data}}}\n" for expert in untrained.experts)
    recipe = tmp_path / "project" / "r.yml"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {untrained.base}\nsens: {{}}\nmodels:\n{models}")
    recipe.write_text(recipe.read_text().replace("sens: {}\nmodels", "sens: {preset: paper}\nmodels"))
    before = tree(tmp_path)
    for out in (tmp_path / "project", tmp_path / "data", tmp_path):
        with pytest.raises(OutputError):
            sm.merge(sm.load_recipe(recipe), out, overwrite=True, profiles_dir=kept)
    assert tree(tmp_path) == before


def test_an_output_behind_a_link_or_here(
    untrained: FamilyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(untrained, tmp_path / "link.yml")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    sm.merge(recipe, tmp_path / "out")
    assert (tmp_path / "disk" / "model.safetensors").exists()
    sm.merge(recipe, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="renamed into place"):
        sm.merge(recipe, ".")


def test_coefficients_of_another_granularity_are_refused(untrained: FamilyFiles, kept: Path, tmp_path: Path) -> None:
    fine = recipe_of(untrained, tmp_path / "fine.yml", sens={"group": "module"})
    profiles, alignment = sm.calibrate(fine, profiles_dir=tmp_path / "fine")
    coarse = recipe_of(untrained, tmp_path / "coarse.yml", sens={})
    with pytest.raises(RecipeError, match="do not fit"):
        sm.merge(coarse, tmp_path / "out", coefficients=sm.coefficients(profiles, alignment), profiles_dir=kept)


def test_one_folder_under_two_names_is_refused(untrained: FamilyFiles, tmp_path: Path) -> None:
    for names in (["expert-a", "./expert-a"], ["expert-a", "base/"]):
        models = "".join(f"  - model: {untrained.folder}/{name}\n" for name in names)
        path = tmp_path / "twice.yml"
        path.write_text(f"merge_method: task_arithmetic\nbase_model: {untrained.base}\nmodels:\n{models}")
        with pytest.raises(RecipeError, match="one model"):
            sm.merge(sm.load_recipe(path), tmp_path / "out")


def test_experts_that_do_not_fit_are_refused_before_they_are_measured(untrained: FamilyFiles, tmp_path: Path) -> None:
    shutil.copytree(untrained.folder, tmp_path / "family")
    file = tmp_path / "family" / "expert-b" / "model.safetensors"
    tensors = load_file(file)
    cut_rows(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = sm.load_recipe(write_recipe(untrained, tmp_path / "family" / "r.yml", sens={}))
    with pytest.raises(IncompatibleModelsError, match=r"lm_head\.weight"):
        sm.calibrate(recipe, profiles_dir=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_task_vectors_are_exact_in_bfloat16_too(untrained: FamilyFiles, tmp_path: Path) -> None:
    """|δ·g| with small δ: rounding the weights to the compute dtype first would add noise of the size of δ itself."""
    shutil.copytree(untrained.folder, tmp_path / "family")
    base = load_file(untrained.base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for expert in untrained.experts:
        near = {name: t + 1e-3 * t * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        save_file(near, tmp_path / "family" / expert.name / "model.safetensors", metadata={"format": "pt"})
    sums = {}
    for dtype in ("float32", "bfloat16"):
        sens = {"score": "task_vector", "compute_dtype": dtype}
        recipe = sm.load_recipe(write_recipe(untrained, tmp_path / "family" / f"{dtype}.yml", sens=sens))
        sums[dtype] = np.array([profile.sensitivity for profile in sm.calibrate(recipe)[0]])
    np.testing.assert_allclose(sums["bfloat16"], sums["float32"], rtol=0.15)


@pytest.mark.parametrize(
    ("key", "value"), [("temprature", 0.1), ("score", "fisher"), ("rule", "softmx"), ("preset", "papr")]
)
def test_unknown_settings_of_coefficients_are_recipe_errors(
    untrained: FamilyFiles, kept: Path, tmp_path: Path, key: str, value: object
) -> None:
    profiles, alignment = sm.calibrate(recipe_of(untrained, tmp_path / "known.yml", sens={}), profiles_dir=kept)
    assert sm.coefficients(profiles, alignment, preset="paper-tables").total == 1.0
    with pytest.raises(RecipeError):
        sm.coefficients(profiles, alignment, **{key: value})


# mergekit's recipes


def written(family: FamilyFiles, path: Path, text: str) -> Recipe:
    """The recipe `text` beside the family's folders, loaded."""
    file = family.folder / path.name
    file.write_text(text)
    return sm.load_recipe(file)


def test_layers_stacked_from_two_models_load_and_run(untrained: FamilyFiles, tmp_path: Path) -> None:
    recipe = written(
        untrained,
        tmp_path / "franken.yml",
        """\
merge_method: passthrough
slices:
  - sources: [{model: expert-a, layer_range: [0, 3]}]
  - sources: [{model: expert-b, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}}]
""",
    )
    sm.merge(recipe, tmp_path / "out")
    merged, a, b = weights(tmp_path / "out"), weights(untrained.experts[0]), weights(untrained.experts[1])
    for block, (source, number) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for inner in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
            expected = source[f"model.layers.{number}.{inner}.weight"]
            assert torch.equal(merged[f"model.layers.{block}.{inner}.weight"], expected)
    assert not merged["model.layers.4.self_attn.o_proj.weight"].any()
    assert torch.equal(merged["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], b["model.norm.weight"])
    assert torch.equal(merged["lm_head.weight"], b["lm_head.weight"])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 6
    assert torch.isfinite(model(torch.tensor([[0, 5, 7]])).logits).all()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "layers 0 to 2 of the result: `expert-a` layers 0 to 2" in card
    assert "layers 3 to 5 of the result: `expert-b` layers 1 to 3" in card
    assert "weight 1" not in card
    assert "λ" not in card


SLICED = """\
merge_method: ties
base_model: base
parameters: {density: [0.4, 0.9], lambda: [0.5, 1]}
"""
WHOLE = "models: [{model: expert-a, parameters: {weight: [0, 1]}}, {model: expert-b}]\n"
SLICES = """\
slices:
  - sources:
      - {model: expert-b, layer_range: [0, 4]}
      - {model: base, layer_range: [0, 4]}
      - {model: expert-a, layer_range: [0, 4], parameters: {weight: [0, 1]}}
"""


def test_one_slice_of_all_layers_is_a_merge_of_whole_models(untrained: FamilyFiles, tmp_path: Path) -> None:
    sm.merge(written(untrained, tmp_path / "whole.yml", SLICED + WHOLE), tmp_path / "whole")
    sm.merge(written(untrained, tmp_path / "slices.yml", SLICED + SLICES), tmp_path / "slices")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "slices" / file).read_bytes(), file


def test_sens_with_slices(untrained: FamilyFiles, kept: Path, tmp_path: Path) -> None:
    """Uniform coefficients are a plain merge of slices; others are those of the layers that the blocks come from."""
    text = """\
merge_method: task_arithmetic
base_model: ./base
sens: {SENS}
slices:
  - sources:
      - {model: ./expert-a, layer_range: [0, 3], sens: {data: calibration-0.jsonl}}
      - {model: ./expert-b, layer_range: [0, 3], sens: {data: calibration-1.jsonl}}
  - sources:
      - {model: ./expert-b, layer_range: [2, 4]}
      - {model: ./expert-a, layer_range: [2, 4]}
"""
    plain = text.replace("sens: {SENS}\n", "").replace(", sens: {data: calibration-0.jsonl}", "")
    plain = plain.replace(", sens: {data: calibration-1.jsonl}", "")
    sm.merge(written(untrained, tmp_path / "plain.yml", plain), tmp_path / "plain")
    uniform = text.replace("SENS", "rule: uniform")
    sm.merge(
        written(untrained, tmp_path / "uniform.yml", uniform), tmp_path / "uniform", profiles_dir=tmp_path / "kept"
    )
    assert_same_bits(weights(tmp_path / "plain"), weights(tmp_path / "uniform"))
    sharp = written(untrained, tmp_path / "sharp.yml", text.replace("SENS", "temperature: 0.05"))
    result = sm.merge(sharp, tmp_path / "sharp", profiles_dir=tmp_path / "kept")
    assert result.coefficients is not None
    base, a, b = (weights(folder) for folder in (untrained.base, *untrained.experts[:2]))
    merged = weights(tmp_path / "sharp")
    for block, layer in enumerate([0, 1, 2, 2, 3]):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        wa, wb = (row[layer] for row in result.coefficients.weights)
        expected = base[name] + wa * (a[name] - base[name]) + wb * (b[name] - base[name])
        torch.testing.assert_close(merged[f"model.layers.{block}.mlp.up_proj.weight"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_number_of_threads_changes_no_byte(untrained: FamilyFiles, tmp_path: Path, jobs: int) -> None:
    recipe = written(untrained, tmp_path / f"jobs-{jobs}.yml", SLICED + WHOLE)
    one = sm.merge(recipe, tmp_path / "one").hashes
    assert sm.merge(recipe, tmp_path / "other", jobs=jobs).hashes == one


def test_another_seed_draws_otherwise(untrained: FamilyFiles, tmp_path: Path) -> None:
    text = "merge_method: dare_linear\nbase_model: base\nmodels: [{model: expert-a}]\nparameters: {density: 0.5, seed: 3}\n"
    recipe = written(untrained, tmp_path / "seed.yml", text)
    hashes = [sm.merge(recipe, tmp_path / str(seed), seed=seed).hashes["model.safetensors"] for seed in (None, 3, 4)]
    assert hashes[0] == hashes[1] != hashes[2]
    records = [json.loads((tmp_path / name / "sensmerge" / "merge.json").read_text()) for name in ("None", "4")]
    assert [record["random_seed"] for record in records] == [3, 4]
    assert records[0]["parameters"] == {"density": 0.5, "seed": 3}
    with pytest.raises(RecipeError, match="takes no random seed"):
        sm.merge(written(untrained, tmp_path / "none.yml", SLICED + WHOLE), tmp_path / "none", seed=1)


def test_other_tokens_are_refused_before_anything_is_read(untrained: FamilyFiles, tmp_path: Path) -> None:
    path = damaged_copy(untrained, tmp_path / "models", put_nan)
    file = tmp_path / "models" / "expert-b" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    token = next(token for token, place in tokenizer["model"]["vocab"].items() if place == 7)
    tokenizer["model"]["vocab"]["new"] = tokenizer["model"]["vocab"].pop(token)
    file.write_text(json.dumps(tokenizer))
    for action in (sm.merge, dry_run):
        with pytest.raises(IncompatibleModelsError, match="tokenizers of these models differ") as caught:
            action(sm.load_recipe(path), tmp_path / "out")
        assert "'new'" in caught.value.why
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_that_the_recipe_names(untrained: FamilyFiles, tmp_path: Path) -> None:
    """The tokens are the same; the template and settings beside them are that model's."""
    path = damaged_copy(untrained, tmp_path / "models", lambda tensors: None)
    (tmp_path / "models" / "expert-b" / "chat_template.jinja").write_text("{{ messages }}")
    for added, found in (("", False), ("tokenizer_source: base\n", False), ("tokenizer: {source: expert-b}\n", True)):
        again = path.with_name("again.yml")
        again.write_text(path.read_text() + added)
        sm.merge(sm.load_recipe(again), tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "chat_template.jinja").exists() is found
    again.write_text(path.read_text() + "chat_template: auto\n")
    sm.merge(sm.load_recipe(again), tmp_path / "auto")
    assert (tmp_path / "auto" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_card_says_what_the_method_has(untrained: FamilyFiles, tmp_path: Path) -> None:
    slerp = "merge_method: slerp\nbase_model: base\nmodels: [{model: expert-a}]\nparameters: {t: [0, 1]}\n"
    sm.merge(written(untrained, tmp_path / "slerp.yml", slerp), tmp_path / "slerp")
    card = (tmp_path / "slerp" / "README.md").read_text()
    assert "Method `slerp` on the base `base`. Models:" in card
    assert "- `expert-a`\n" in card
    assert json.loads((tmp_path / "slerp" / "sensmerge" / "merge.json").read_text())["lambda"] is None
    sm.merge(written(untrained, tmp_path / "ties.yml", SLICED + WHOLE), tmp_path / "ties")
    card = (tmp_path / "ties" / "README.md").read_text()
    assert "λ = 0.75, differs between tensors. Models:" in card
    assert "- `expert-a` (weight 0.5, differs between tensors)\n- `expert-b` (weight 1)\n" in card


def test_coefficients_that_mean_nothing_to_a_recipe_are_refused(
    untrained: FamilyFiles, kept: Path, tmp_path: Path
) -> None:
    """Handed over in Python, they pass by the checks of a recipe's own `sens:`."""
    profiles, alignment = sm.calibrate(recipe_of(untrained, tmp_path / "known.yml", sens={}), profiles_dir=kept)
    given = sm.coefficients(profiles, alignment)
    models = "models: [{model: ./expert-a}, {model: ./expert-b}, {model: ./expert-c}]\n"
    for text, words in (
        ("merge_method: model_stock\nbase_model: ./base\n" + models, "does not work with `sens:`"),
        ("merge_method: linear\n" + models, "needs a base model"),
        (
            "merge_method: linear\nbase_model: ./base\nslices:\n- sources: [{model: ./expert-a, layer_range: [0, 2]},"
            " {model: ./expert-b, layer_range: [0, 2]}, {model: ./expert-c, layer_range: [1, 3]}]\n",
            "slices of unlike ranges",
        ),
    ):
        with pytest.raises(RecipeError) as caught:
            sm.merge(written(untrained, tmp_path / "given.yml", text), tmp_path / "out", coefficients=given)
        assert words in caught.value.what
