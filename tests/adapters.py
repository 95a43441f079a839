"""Tiny bases with random LoRA adapters on disk, made by PEFT itself, and what PEFT merges them to."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tests.builders import VOCABULARY


def tiny_qwen2(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A random Qwen2 (biases in attention) of two layers in evaluation mode."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }
    return Qwen2ForCausalLM(Qwen2Config(**(values | changes))).eval()


def save_base(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model with random norms and biases (they start as ones and zeros), saved."""
    random = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """The model in a folder, in its stored dtype."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def save_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 1,
    tweak: Callable[[dict[str, Tensor]], None] | None = None,
    size: float = 0.3,
    **config: Any,
) -> Path:
    """A random adapter on `base`, saved by PEFT; every trainable number is drawn. `tweak` changes the trained tensors."""
    values: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 6}
    random = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(**(values | config)))
        with torch.no_grad():
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            for parameter in trained.values():
                parameter.add_(torch.randn(parameter.shape, generator=random).to(parameter.dtype) * size)
            if tweak is not None:
                tweak(dict(trained))
        model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Every tensor of the base with the adapter merged into it by PEFT, by its name in the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().state_dict()


def edit_config(adapter: Path, **changes: Any) -> Path:
    """Change adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return adapter
