"""Which tensor of a checkpoint is which parameter: no weight is invented, none ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sensmerge.calibration.measure import MeasuredModel
from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.errors import IncompatibleModelsError, InputFileError
from tests.calibration.families import FAMILIES, by_parameter, loop, measured_model, samples, saved, sums_of, tiny


def rewritten(model: Any, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> ModelFolder:
    """The saved model after a change to its tensors."""
    saved(model, folder).close()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelFolder(folder)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_of_a_checkpoint_belongs_to_a_parameter(family: str, tmp_path: Path) -> None:
    checkpoint = saved(tiny(family), tmp_path)
    names = measured_model(checkpoint).names
    assert {each.name for stored in names.values() for each in stored} == set(checkpoint.tensors)


def test_a_gpt2_saved_without_its_prefix(tmp_path: Path) -> None:
    """As on the hub: `h.0.attn…`, not `transformer.h.0.attn…`, with masks that the model computes."""
    model = tiny("gpt2")

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    measured = measured_model(rewritten(model, tmp_path, change))
    assert measured.names["transformer.h.0.attn.c_attn.weight"][0].name == "h.0.attn.c_attn.weight"
    got, expected = sums_of(measured, samples()), loop(model, samples())
    for ours, theirs in zip(got, expected, strict=True):
        assert by_parameter(measured, ours) == pytest.approx(theirs, rel=1e-4)


def test_a_tied_head_that_is_stored_as_well_is_the_embedding(tmp_path: Path) -> None:
    """As transformers loads it."""
    model = tiny("llama-tied")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    measured = measured_model(rewritten(model, tmp_path, change))
    got, expected = sums_of(measured, samples()), loop(model, samples())
    assert "lm_head.weight" not in got[0]
    assert got[0]["model.embed_tokens.weight"] == pytest.approx(expected[0]["model.embed_tokens.weight"], rel=1e-4)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "all"])
def test_invented_or_ignored_weights_are_refused(fault: str, memory: str, tmp_path: Path) -> None:
    """transformers would fill in random numbers with a warning. Told by name, before anything is computed."""
    name, shown = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        if fault in ("missing", "all"):
            del tensors[name]
        if fault in ("unknown", "all"):
            tensors["model.layers.1.mlp.extra.weight"] = torch.ones(2)
        if fault == "shape":
            tensors[name] = torch.ones(3, 3)

    shown = "model.layers.1.mlp.extra.weight" if fault == "unknown" else name
    checkpoint = rewritten(tiny("llama"), tmp_path, change)
    kind = IncompatibleModelsError if fault == "all" else InputFileError
    with pytest.raises(kind) as caught:
        measured_model(checkpoint, memory)
    assert str(tmp_path) in caught.value.where
    assert shown in caught.value.why
    if fault == "shape":
        assert "[3, 3]" in caught.value.why
        assert "[24, 16]" in caught.value.why


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for projection in "qkv":
            del tensors[f"model.layers.0.self_attn.{projection}_proj.weight"]

    checkpoint = rewritten(tiny("llama"), tmp_path, change)
    with pytest.raises(InputFileError) as caught:
        measured_model(checkpoint)
    for projection in "qkv":
        assert f"{projection}_proj.weight" in caught.value.why


def test_parameters_under_other_names_are_refused(tmp_path: Path) -> None:
    """Fused or renamed while loading in a way that is not known: both sides are named."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [each for each in tensors if "q_proj" in each]:
            tensors[name.replace("q_proj", "wq")] = tensors.pop(name)

    checkpoint = rewritten(tiny("llama"), tmp_path, change)
    with pytest.raises(IncompatibleModelsError) as caught:
        measured_model(checkpoint)
    assert "q_proj" in caught.value.why
    assert "wq" in caught.value.why
    assert caught.value.exit_code == 4


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    saved(tiny("llama"), tmp_path).close()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "nobody-knows-it"}))
    with pytest.raises(InputFileError) as caught:
        measured_model(ModelFolder(tmp_path))
    assert "nobody-knows-it" in caught.value.why


@pytest.mark.parametrize(("compute", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_are_those_of_the_file_in_the_dtype_asked_for(
    compute: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    """float32 on a CPU unless named, whatever is stored; evaluation mode; nothing is left in memory afterwards."""
    checkpoint = saved(tiny("llama").to(torch.bfloat16), tmp_path)
    measured = MeasuredModel(checkpoint, label="x", device="cpu", memory="resident", compute_dtype=compute)
    with measured.held():
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            assert torch.equal(measured.model.get_parameter(name), tensor.to(dtype))
        assert not measured.model.training
    assert all(parameter.is_meta for parameter in measured.model.parameters())
