"""Gram matrices and mean magnitudes of what linear layers get, against float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sensmerge.checkpoints.folder import ModelFolder
from tests.calibration.families import measured_model, samples, saved, tiny
from tests.calibration.test_measure import a_device_with_room_for

LINEAR = ("Linear", "Conv1D")


def expected64(model: Any, data: Any) -> dict[str, torch.Tensor]:
    """Every linear layer's inputs, seen by a hook in a float64 copy, a sample at a time; the tied head under its own name."""
    wide = copy.deepcopy(model).double()
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in wide.named_modules():
        if type(module).__name__ in LINEAR:
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: found.setdefault(name, []).append(
                    inputs[0].detach().reshape(-1, inputs[0].shape[-1])
                )
            )
    with torch.no_grad():
        for ids in data.token_ids:
            wide(input_ids=torch.tensor([ids]))
    rows = {name: torch.cat(each) for name, each in found.items()}
    return {f"gram/{name}.weight": each.t() @ each for name, each in rows.items()} | {
        f"mean_abs/{name}.weight": each.abs().mean(0) for name, each in rows.items()
    }


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2", "opt", "opt-projected"])
def test_statistics_are_those_of_float64(family: str, memory: str, tmp_path: Path) -> None:
    """By the tensor's name; padding has no part in it; OPT projects its embeddings, too."""
    model, data = tiny(family), samples((7, 19, 12))
    checkpoint: ModelFolder = saved(model, tmp_path)
    measured = measured_model(checkpoint, memory)
    with measured.held():
        measured.statistics(data, tmp_path / "statistics")
    got = load_file(tmp_path / "statistics")
    tied = {} if "lm_head.weight" in checkpoint.tensors else {"lm_head.weight": tied_name(measured)}
    expected = {}
    for key, value in expected64(model, data).items():
        kind, _, name = key.partition("/")
        expected[f"{kind}/{tied.get(name, name)}"] = value
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert got[key].dtype == torch.float32
        torch.testing.assert_close(got[key].double(), value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=key)
    with safe_open(tmp_path / "statistics", framework="pt") as file:
        assert int(file.metadata()["tokens"]) == 38


def tied_name(measured: Any) -> str:
    return str(measured.weights.stored_of(measured.model.get_output_embeddings())["weight"][0].name)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_batch_that_did_not_fit_is_not_counted_twice(memory: str, tmp_path: Path) -> None:
    measured, data = measured_model(saved(tiny("llama"), tmp_path), memory), samples((7, 19, 12))
    with measured.held():
        measured.statistics(data, tmp_path / "whole")
        with a_device_with_room_for(measured, 20):
            measured.statistics(data, tmp_path / "halved")
    whole, halved = load_file(tmp_path / "whole"), load_file(tmp_path / "halved")
    for name, value in whole.items():
        torch.testing.assert_close(halved[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
