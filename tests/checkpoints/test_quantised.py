"""Quantised checkpoints are refused by name: by what config.json says, and by tensors where it says nothing."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.errors import IncompatibleModelsError
from tests.builders import tiny_llama, write_checkpoint

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
    if name in ("bitsandbytes", "fp8", "mxfp4"):
        assert "dequantize" in error.fix
    else:
        assert "from_pretrained" not in error.fix, "nothing undoes these"


def test_the_line_that_undoes_fp8_does(tmp_path: Path) -> None:
    """Pasted into a shell: a folder that can be merged, with the numbers that the 8 bits stand for."""
    model = tiny_llama(0, hidden_size=128, intermediate_size=128)
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, values in tensors.items():
        if "proj" not in name:
            stored[name] = values
            continue
        scale = values.abs().max() / 448
        stored[name] = (values / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.expand(-(-values.shape[0] // 128), 1).contiguous()
    save_file(stored, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleModelsError) as caught:
        ModelFolder(tmp_path / "m")
    line = caught.value.fix.partition("undo it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(shlex.split(line), check=True, capture_output=True)
    with ModelFolder(tmp_path / "m-plain") as plain:
        assert plain.tensors.keys() == tensors.keys()
    for name, values in load_file(tmp_path / "m-plain" / "model.safetensors").items():
        assert float((values.float() - tensors[name]).abs().max()) <= 0.05 * float(tensors[name].abs().max())


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
