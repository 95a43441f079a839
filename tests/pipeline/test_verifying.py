"""`check`: what it finds sound is sound, and one flipped byte anywhere is named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

import sensmerge as sm
from sensmerge.errors import InputFileError, RecipeError, SensmergeError, SeveralErrors
from tests.conftest import Run
from tests.oracle.families import FamilyFiles, write_recipe

MODELS = "models: [{model: expert-a}, {model: expert-b, parameters: {weight: 0.5}}]\n"
METHODS = {
    "lambda by filter": "merge_method: task_arithmetic\nbase_model: base\n"
    "parameters: {lambda: [{filter: mlp, value: 0.4}, {value: 0.9}]}\n" + MODELS,
    "global": "merge_method: ties\nbase_model: base\nparameters: {density: 0.4, scope: global}\n" + MODELS,
    "drawn": "merge_method: dare_ties\nbase_model: base\nparameters: {density: 0.5}\ndtype: bfloat16\n" + MODELS,
    "passes": "merge_method: model_stock\nbase_model: base\nout_dtype: float16\n"
    + MODELS.replace(", parameters: {weight: 0.5}", ""),
    "slices": "merge_method: dare_linear\nbase_model: base\nslices:\n"
    "- {sources: [{model: expert-a, layer_range: [0, 2]}], parameters: {density: 0.5, seed: 3}}\n"
    "- {sources: [{model: expert-b, layer_range: [0, 3]}], parameters: {density: 0.5, seed: 4}}\n",
}


def merged(family: FamilyFiles, folder: Path, text: str, **options: Any) -> Path:
    """A merge of links to the family's models, in `folder`/out."""
    folder.mkdir(exist_ok=True)
    for source in (family.base, *family.experts):
        shutil.copytree(source, folder / source.name)
    (folder / "recipe.yml").write_text(text)
    sm.merge(sm.load_recipe(folder / "recipe.yml"), folder / "out", **options)
    return folder / "out"


def flip(path: Path, at: int) -> None:
    """Change one bit of one byte; negative places count from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def place(path: Path, tensor: str, element: int, item: int = 4) -> int:
    """The place of a byte of an element, from the file's own header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start: int = json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    return 8 + length + start + element * item


def faults(action: Callable[[], object]) -> list[SensmergeError]:
    """Everything that an action complains of."""
    with pytest.raises(SensmergeError) as caught:
        action()
    return list(caught.value.errors) if isinstance(caught.value, SeveralErrors) else [caught.value]


@pytest.fixture(scope="module")
def sound(untrained: FamilyFiles, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge with measured coefficients, in several files."""
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(untrained.folder, folder / "family")
    write_recipe(untrained, folder / "family" / "r.yml", sens={"preset": "calibrated"}, dtype="float32")
    recipe = sm.load_recipe(folder / "family" / "r.yml")
    sm.merge(recipe, folder / "out", profiles_dir=kept, shard_bytes=60_000)
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """The merge of `sound`, to be damaged."""
    shutil.copytree(sound, tmp_path / "copy")
    return tmp_path / "copy" / "out"


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_merge_is_the_same_again(untrained: FamilyFiles, tmp_path: Path, name: str) -> None:
    out = merged(untrained, tmp_path / "m", METHODS[name], **({"seed": 7} if name == "drawn" else {}))
    result = sm.check(out, full=True)
    assert len(result.tensors) == result.of == len(load_file(out / "model.safetensors"))
    assert result.inputs.keys() == {"base", "expert-a", "expert-b"}
    # The numbers are compared, not only the hashes: another record of the hash does not help a changed number.
    tensors = load_file(out / "model.safetensors")
    tensor = tensors["model.layers.1.mlp.up_proj.weight"]
    tensor[3, 5] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((out / "sensmerge" / "merge.json").read_text())
    record["outputs"]["model.safetensors"] = xxhash.xxh3_128((out / "model.safetensors").read_bytes()).hexdigest()
    (out / "sensmerge" / "merge.json").write_text(json.dumps(record))
    [fault] = faults(lambda: sm.check(out, full=True))
    assert isinstance(fault, InputFileError)
    assert "model.layers.1.mlp.up_proj.weight" in fault.what
    assert "element [3, 5]" in fault.where
    assert f"1 of {tensor.numel()} elements differ" in fault.why


def test_a_measured_merge_is_the_same_again(sound: Path) -> None:
    """Its λ was found by search, its coefficients measured: neither is measured again."""
    result = sm.check(sound / "out", full=True)
    assert len(result.tensors) == result.of > 30
    few = sm.check(sound / "out", sample=0.05, seed=3)
    assert len(few.tensors) == -(-result.of * 5 // 100)
    assert sm.check(sound / "out", sample=0.05, seed=3).tensors == few.tensors
    assert {sm.check(sound / "out").tensors for _ in range(5)} != {few.tensors}


def test_it_is_found_wherever_the_whole_is_moved(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "elsewhere")
    result = sm.check(tmp_path / "elsewhere" / "out")
    assert set(result.inputs.values()) == {
        str((tmp_path / "elsewhere" / "family" / name).resolve())
        for name in ("base", "expert-a", "expert-b", "expert-c")
    }


def test_models_that_are_not_there(sound: Path, tmp_path: Path, sensmerge: Run) -> None:
    shutil.copytree(sound / "out", tmp_path / "deep" / "er" / "out")
    out = tmp_path / "deep" / "er" / "out"
    done = sensmerge("check", out)
    assert done.returncode == 3
    assert "4 faults were found" in done.stderr
    for name in ("./base", "./expert-a", "./expert-b", "./expert-c"):
        assert f"there is no model folder '{name}'" in done.stderr
    assert "--models-in DIR" in done.stderr
    for fix in (("--models-in", sound / "family"), ("--outputs-only",)):
        done = sensmerge("check", out, *fix)
        assert done.returncode == 0, done.stderr
    assert "not checked" in done.stdout


def test_a_flipped_bit_in_the_output_is_found_and_its_tensor_named(copy: Path) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = copy / index["weight_map"][name]
    flip(file, place(file, name, 70))
    first, second = faults(lambda: sm.check(copy))
    assert f"'{file.name}' is not the file that the merge wrote" in first.what
    assert f"{file}, tensor '{name}', element [2, 6]" in second.where


@pytest.mark.parametrize(
    "file",
    ["config.json", "tokenizer.json", "sensmerge.yml", "model.safetensors.index.json", "sensmerge/coefficients.json"],
)
def test_a_flipped_bit_beside_the_weights_is_found(copy: Path, file: str) -> None:
    flip(copy / file, 40)
    told = faults(lambda: sm.check(copy))
    assert f"'{file}' is not the file that the merge wrote" in told[0].what
    assert all(isinstance(fault, InputFileError) for fault in told)


def test_a_flipped_bit_in_an_input_is_found(copy: Path) -> None:
    file = copy.parent / "family" / "expert-b" / "model.safetensors"
    flip(file, place(file, "model.norm.weight", 3))
    [fault] = faults(lambda: sm.check(copy))
    assert "'./expert-b' is not the model that was merged" in fault.what


def test_everything_is_listed_at_once(copy: Path) -> None:
    shards = sorted(copy.glob("model-*.safetensors"))
    shards[0].unlink()
    flip(shards[1], -1)
    shutil.copy(shards[2], copy / "extra.safetensors")
    (copy / "generation_config.json").unlink()
    told = "\n".join(fault.what for fault in faults(lambda: sm.check(copy)))
    for words in (
        f"'{shards[0].name}' is missing",
        f"'{shards[1].name}' is not the file",
        "'extra.safetensors' was added",
        "'generation_config.json' is missing",
    ):
        assert words in told


def test_a_damaged_header_is_no_crash(copy: Path) -> None:
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    flip(shard, 9)
    assert all(isinstance(fault, InputFileError) for fault in faults(lambda: sm.check(copy)))


def test_the_card_may_be_edited(copy: Path) -> None:
    (copy / "README.md").write_text("mine")
    sm.check(copy)


def test_what_is_no_merge(tmp_path: Path, untrained: FamilyFiles, sensmerge: Run) -> None:
    done = sensmerge("check", untrained.base)
    assert done.returncode == 3
    assert "is no model that sensmerge merged" in done.stderr
    with pytest.raises(RecipeError, match="share of the tensors"):
        sm.check(untrained.base, sample=0)


def test_the_command(sound: Path, sensmerge: Run) -> None:
    done = sensmerge("check", sound / "out", "--full", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["recomputed"]) == found["tensors"]
    assert found["seed"] is None
    shown = sensmerge("check", sound / "out", "--seed", "5")
    assert "1 of" in shown.stdout
    assert "--seed 5" in shown.stdout


def test_the_record_names_no_absolute_path(sound: Path) -> None:
    """But for what the recipe itself names."""
    text = (sound / "out" / "sensmerge" / "merge.json").read_text()
    assert str(sound) not in text
    assert json.loads(text)["searched"] == ["../family"]
    assert torch.__version__.split("+")[0] in text
