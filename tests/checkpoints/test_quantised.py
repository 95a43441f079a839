"""Quantised checkpoints are refused by name: by what config.json says, and by tensors where it says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.errors import IncompatibleModelsError
from tests.builders import write_checkpoint

PLAIN = {"model.embed_tokens.weight": torch.ones(4, 4), "model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}
UP = "model.layers.0.mlp.up_proj"
LLAMA = {"model_type": "llama"}


def refused(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> IncompatibleModelsError:
    with pytest.raises(IncompatibleModelsError) as caught:
        ModelFolder(write_checkpoint(folder, tensors, config))
    assert "unquantised" in caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "awq"}, "awq"), ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"), ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"), ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "something-new"}, "something-new"), ({}, "does not name"), ("yes", "does not name"),
    ],
)  # fmt: skip
def test_what_config_says(tmp_path: Path, written: Any, name: str) -> None:
    error = refused(tmp_path / "m", PLAIN, LLAMA | {"quantization_config": written})
    assert name in error.what
    if name in ("bitsandbytes", "fp8", "mxfp4", "compressed-tensors"):
        assert "dequantize" in error.fix or "run_compressed" in error.fix
    else:
        assert "from_pretrained" not in error.fix, "nothing undoes these"


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({f"{UP}.qweight": torch.ones(4, 4).int(), f"{UP}.qzeros": torch.ones(1, 4).int(), f"{UP}.scales": torch.ones(1, 4).half()},
         "gptq or awq"),
        ({f"{UP}.weight": torch.ones(16, 1, dtype=torch.uint8), f"{UP}.weight.absmax": torch.ones(1, dtype=torch.uint8)},
         "bitsandbytes"),
        ({f"{UP}.weight": torch.ones(4, 4, dtype=torch.int8), f"{UP}.SCB": torch.ones(4)}, "bitsandbytes"),
        ({f"{UP}.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), f"{UP}.weight_scale_inv": torch.ones(1, 1)}, "fp8"),
        ({f"{UP}.weight": torch.ones(4, 4).to(torch.float8_e5m2)}, "fp8"),
        ({f"{UP}.weight_packed": torch.ones(4, 1).int(), f"{UP}.weight_scale": torch.ones(4, 1)}, "compressed-tensors"),
        ({"model.layers.0.mlp.experts.up_proj_blocks": torch.ones(4, 4, dtype=torch.uint8),
          "model.layers.0.mlp.experts.up_proj_scales": torch.ones(4, dtype=torch.uint8)}, "mxfp4"),
        ({f"{UP}.weight": torch.ones(4, 4, dtype=torch.int8)}, "8-bit integers"),
    ],
)  # fmt: skip
def test_what_tensors_say_though_config_does_not(tmp_path: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    error = refused(tmp_path / "m", {"model.embed_tokens.weight": torch.ones(4, 4)} | tensors, LLAMA)
    assert f"({name})" in error.what
    assert UP in error.why or "up_proj" in error.why


@pytest.mark.parametrize(
    "more",
    [
        {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)},
        {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)},
        {"embeddings.position_ids": torch.arange(4)[None]},
        {"model.layers.0.router.scales": torch.ones(4), "logit_scale": torch.ones(1)},
        {"model.layers.0.mlp.expert_scales": torch.ones(4)},
    ],
    ids=["byte mask", "boolean mask", "positions", "scales", "expert scales"],
)
def test_buffers_of_whole_numbers_are_no_quantisation(tmp_path: Path, more: dict[str, torch.Tensor]) -> None:
    with ModelFolder(write_checkpoint(tmp_path / "m", PLAIN | more, LLAMA | {"quantization_config": None})) as model:
        assert model.tensors.keys() == (PLAIN | more).keys()
