"""Whole models as transformers loads them, for evaluation: no weight is invented, none ignored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensmerge.calibration.models import load_model, non_finite
from sensmerge.errors import InputFileError
from tests.builders import tiny_llama


@pytest.mark.parametrize(
    ("named", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_a_model_is_loaded_whole_in_the_dtype_asked_for(tmp_path: Path, named: str | None, dtype: torch.dtype) -> None:
    """float32 on a CPU unless named, whatever is stored; evaluation mode."""
    tiny_llama(3).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path, "cpu", named)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_checkpoint_with_invented_or_ignored_weights_is_refused(tmp_path: Path, fault: str) -> None:
    """transformers would fill in random numbers with a warning."""
    tiny_llama(3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["model.layers.1.mlp.extra.weight"] = torch.ones(2)
    else:
        tensors[name] = torch.ones(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputFileError) as caught:
        load_model(tmp_path, "cpu", None)
    assert caught.value.exit_code == 3
    assert str(tmp_path) in caught.value.where
    assert "model.layers.1.mlp" in caught.value.why


def test_the_weight_that_is_to_blame_is_named() -> None:
    good, bad = torch.ones(2, 3), torch.ones(2, 3)
    bad[1, 2] = math.inf
    told = non_finite([("good", good), ("bad", bad)], "task x", "the loss")
    assert "task x" in told.where
    assert "'bad'" in told.where
    assert "[1, 2]" in told.where
    assert "task x" in non_finite([("good", good)], "task x", "the loss").where
