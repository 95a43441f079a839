"""A LoRA adapter on a base is the model that PEFT's merge_and_unload gives, whatever the adapter's kind and however it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sensmerge.checkpoints.formats import to_float32
from sensmerge.checkpoints.lora.adapted import AdaptedModel
from sensmerge.checkpoints.opening import Opening
from sensmerge.checkpoints.source import Checkpoint
from tests.adapters import edit_config, merged_by_peft, save_adapter, save_base, tiny_qwen2
from tests.builders import tiny_gpt2, tiny_llama


def opened(name: str | Path, folder: Path, *allow: str) -> Checkpoint:
    return Opening([folder], frozenset(allow)).open(str(name), where="a test")


def adapted(folder: Path, base: str = "base", adapter: str = "adapter") -> AdaptedModel:
    model = opened(f"{base}+{adapter}", folder)
    assert isinstance(model, AdaptedModel)
    return model


def values(model: Checkpoint, name: str) -> Tensor:
    spec = model.tensors[name]
    return torch.from_numpy(to_float32(model.read(name, 0, spec.elements), spec.dtype)).reshape(spec.shape)


def own_name(name: str, merged: Mapping[str, Tensor]) -> str:
    """A stored tensor's name in the model: GPT-2's checkpoints may lack the prefix."""
    return name if name in merged else f"transformer.{name}"


LLAMA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_MODULES = ["c_attn", "c_proj", "c_fc"]

CASES: dict[str, tuple[Callable[..., PreTrainedModel], dict[str, Any]]] = {
    "llama": (tiny_llama, {"target_modules": LLAMA_MODULES}),
    "odd rank": (tiny_llama, {"r": 5}),
    "rslora": (tiny_llama, {"use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        tiny_llama,
        {
            "target_modules": LLAMA_MODULES,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.0.mlp.up_proj": 7, "down_proj": 3},
            "alpha_pattern": {"q_proj": 9, r".*\.1\.mlp\..*": 2, "k_proj": 1.5},
        },
    ),
    "patterns of rslora": (tiny_llama, {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"up": 3}}),
    "one layer": (tiny_llama, {"layers_to_transform": [1]}),
    "modules to save": (tiny_llama, {"modules_to_save": ["embed_tokens", "lm_head", "norm", "k_proj"]}),
    "head": (tiny_llama, {"target_modules": ["lm_head", "q_proj"]}),
    "every bias": (tiny_qwen2, {"bias": "all", "target_modules": ["q_proj", "o_proj"]}),
    "bias of lora layers": (tiny_qwen2, {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
    "lora_bias": (tiny_qwen2, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 9}),
    "lora_bias and bias": (tiny_qwen2, {"lora_bias": True, "bias": "all", "target_modules": ["q_proj"]}),
    "gpt2": (tiny_gpt2, {"target_modules": GPT2_MODULES, "fan_in_fan_out": True}),
    "gpt2, flag unset": (tiny_gpt2, {"target_modules": GPT2_MODULES, "bias": "all"}),
    "gpt2, norms": (tiny_gpt2, {"target_modules": ["c_proj"], "modules_to_save": ["ln_1", "ln_f"]}),
    "gaussian": (tiny_llama, {"init_lora_weights": "gaussian"}),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_every_tensor_is_what_peft_merges(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """float32 within 1e-6; rounded to the base's dtype within one unit in the last place (PEFT rounds twice)."""
    make, config = CASES[case]
    if dtype != torch.float32 and case not in ("llama", "gpt2", "modules to save", "lora_bias", "head"):
        pytest.skip("one case of each kind of change is enough for the rounding")
    base = save_base(make(), tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    merged = merged_by_peft(base, adapter)
    model, plain = adapted(tmp_path), opened("base", tmp_path)
    assert model.tensors.keys() == plain.tensors.keys()
    differing = 0
    for name, spec in model.tensors.items():
        expected, found = merged[own_name(name, merged)], values(model, name)
        assert model.stored_dtype(name) == plain.tensors[name].dtype
        differing += not torch.equal(found, values(plain, name))
        assert spec.dtype == ("F32" if name in model.changes else plain.tensors[name].dtype)
        if dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        else:
            # PEFT rounds ΔW before it adds it, so its own error is one rounding of ΔW and one of the sum.
            unit = torch.finfo(dtype).eps * (expected.float().abs() + (found - values(plain, name)).abs())
            assert ((found.to(dtype).float() - expected.float()).abs() <= unit + torch.finfo(dtype).tiny).all(), name
    assert differing == len(model.changes) > 0
