"""Tiny models of many families on disk, samples, and eq. 1 by its definition: plain autograd, a sample at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from sensmerge.calibration.measure import MeasuredModel
from sensmerge.calibration.per_sample import Score
from sensmerge.calibration.scores import WeightScore
from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.records import CalibrationSet

VOCABULARY = 67
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
NARROW = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", HEADS),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma2", HEADS),
    "gemma3": ("Gemma3Text", HEADS),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "neox": ("GPTNeoX", COMMON),
    "falcon": ("Falcon", NARROW),
    "olmo2": ("Olmo2", COMMON),
    "phi3": ("Phi3", COMMON),
    "opt": ("OPT", {**NARROW, "ffn_dim": 24, "max_position_embeddings": 64, "word_embed_proj_dim": 16}),
    "opt-projected": (
        "OPT",
        {
            **NARROW,
            "ffn_dim": 24,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 8,
            "do_layer_norm_before": False,
        },
    ),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**HEADS, "num_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1}),
    "mamba": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "granite": ("Granite", {**GROUPED, "logits_scaling": 4.0}),
    "cohere": ("Cohere", {**GROUPED, "logit_scale": 0.25}),
    "phi": ("Phi", COMMON),
}


def config(family: str, **changes: Any) -> Any:
    """The config of a family."""
    name, values = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**{**values, **changes})


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in which no weight has a special value: norms and biases are noisy, too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(model: Any, folder: Path) -> ModelFolder:
    """The model as `save_pretrained` writes it."""
    model.save_pretrained(folder)
    return ModelFolder(folder)


def samples(lengths: tuple[int, ...] = (7, 19, 12), seed: int = 0, first: int = 10) -> CalibrationSet:
    """Samples of these lengths, the loss on their later half; their rows in the file begin with `first`."""
    generator = torch.Generator().manual_seed(seed)
    ids = [tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]
    masks = [(0,) * (length // 2) + (1,) * (length - length // 2) for length in lengths]
    return CalibrationSet(tuple(range(first, first + len(lengths))), tuple(ids), tuple(masks), "response", 0)


def picked(data: CalibrationSet, places: list[int]) -> CalibrationSet:
    """Some of the samples."""
    return dataclasses.replace(
        data,
        rows=tuple(data.rows[at] for at in places),
        token_ids=tuple(data.token_ids[at] for at in places),
        loss_mask=tuple(data.loss_mask[at] for at in places),
    )


def plain_loss(model: Any, ids: tuple[int, ...], mask: tuple[int, ...]) -> Tensor:
    """The mean loss of one sample over its loss tokens, each predicted from the position before."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    terms = [-torch.log_softmax(logits[t - 1], -1)[ids[t]] for t in range(1, len(ids)) if mask[t]]
    return torch.stack(terms).sum() / len(terms)


def loop(
    model: Any, data: CalibrationSet, score: Callable[[str, Tensor, Tensor], Tensor] = lambda _, w, g: (w * g).abs()
) -> list[dict[str, float]]:
    """By sample and parameter, the sum of `score` over its elements: one backward pass a sample."""
    model.requires_grad_(True)
    found = []
    for ids, mask in zip(data.token_ids, data.loss_mask, strict=True):
        model.zero_grad()
        plain_loss(model, ids, mask).backward()
        sums = {}
        for name, weight in model.named_parameters():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            sums[name] = float(score(name, weight.detach(), gradient).double().sum())
        found.append(sums)
    model.zero_grad()
    return found


def measured_model(checkpoint: ModelFolder, memory: str = "resident", **named: Any) -> MeasuredModel:
    """The checkpoint, ready to be measured on the CPU."""
    return MeasuredModel(checkpoint, label="expert", device="cpu", memory=memory, **named)


def sums_of(
    model: MeasuredModel, data: CalibrationSet, score: Score | None = None, places: list[int] | None = None
) -> list[dict[str, float]]:
    """By sample (in order of `places`) and tensor of the checkpoint: what the engine gives."""
    chosen = list(range(len(data.rows))) if places is None else places
    found: dict[int, Mapping[str, float]] = {}
    with model.held():
        model.sums(
            data, WeightScore() if score is None else score, places=chosen, save=lambda new, _: found.update(new)
        )
    return [dict(found[place]) for place in chosen]


def by_parameter(model: MeasuredModel, sums: Mapping[str, float]) -> dict[str, float]:
    """Sums by parameter: those of the tensors that transformers fuses are added up."""
    return {name: sum(sums.get(each.name, 0.0) for each in stored) for name, stored in model.names.items()}
