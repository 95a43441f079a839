"""Tiny families on disk: a random Llama base, K experts, their tokenizer, calibration files and recipes.

Everything follows from the seed of a `FamilySpec`. The experts differ on purpose: in the size of their task vectors, in
how that size and the scale of the weights run over the blocks, in how sharp their logits are, and each has been moved a
few steps down the gradient of its own calibration loss. So the coefficients are far from uniform, and the loss of the
merged model has its minimum inside the range of lambda.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .llama64 import Array, loss_and_gradients
from .sens64 import Settings, read_config, read_samples

Row = dict[str, str]

WEIGHT_STD = 0.2


@dataclass(frozen=True)
class FamilySpec:
    """What a family looks like. `kinds` holds an expert's kind of calibration row: `pair`, `instruction` or `text`."""

    name: str
    seed: int
    kinds: tuple[str, ...]
    sizes: tuple[float, ...]
    """The task vector's standard deviation relative to the base weights', an expert."""
    layers: int = 4
    hidden: int = 32
    heads: int = 4
    key_value_heads: int = 2
    tied: bool = False
    attention_bias: bool = False
    adds_bos: bool = True
    dtype: torch.dtype = torch.float32
    rows: tuple[int, ...] = (5, 4, 6)


@dataclass(frozen=True)
class FamilyFiles:
    """Where a family lies: the base's folder, K expert folders and K JSONL files, in recipe order."""

    spec: FamilySpec
    folder: Path
    base: Path
    experts: tuple[Path, ...]
    data: tuple[Path, ...]


def build_family(spec: FamilySpec, folder: Path) -> FamilyFiles:
    """Write base, experts and calibration files below `folder`."""
    rng = np.random.default_rng(spec.seed)
    data = []
    for i, kind in enumerate(spec.kinds):
        rows = make_rows(kind, i, spec.rows[i], rng)
        data.append(folder / f"calibration-{i}.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        data[i].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    tokenizer = train_tokenizer([file.read_text(encoding="utf-8") for file in data], spec.adds_bos)

    model = LlamaForCausalLM(make_config(spec, tokenizer))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    weights = {name: random_weights(name, shape, rng) for name, shape in sorted(shapes.items())}
    base = folder / "base"
    save(model, tokenizer, weights, spec, base)

    experts = []
    for i, file in enumerate(data):
        experts.append(folder / f"expert-{'abc'[i]}")
        noisy = {name: perturb(name, weight, i, spec, rng) for name, weight in weights.items()}
        save(model, tokenizer, descend(noisy, base, tokenizer, file), spec, experts[i])
    return FamilyFiles(spec, folder, base, tuple(experts), tuple(data))


def make_config(spec: FamilySpec, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Make the config; the vocabulary is padded as real ones are, so some rows belong to no token."""
    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=spec.hidden,
        intermediate_size=2 * spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.key_value_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=spec.tied,
        attention_bias=spec.attention_bias,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def random_weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Draw one tensor of the base: norm gains around 1, all else around 0."""
    noise = WEIGHT_STD * rng.standard_normal(shape)
    return 1.0 + noise if "norm" in name else noise


def perturb(name: str, weight: Array, i: int, spec: FamilySpec, rng: np.random.Generator) -> Array:
    """Make one tensor of expert i: noise and a change of scale whose sizes depend on the expert and the block.

    Expert i is strongest around block i + 1, and the scale of its final norm makes its logits sharper or softer.
    """
    size = spec.sizes[i]
    sharpness = 1.0
    if name.startswith("model.layers."):
        nearness = 1.0 / (1.0 + abs(int(name.split(".")[2]) - (i + 1) % spec.layers))
        size *= 0.3 + nearness
        sharpness += 0.5 * nearness if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.0
    if name == "model.norm.weight":
        sharpness = (0.7, 1.8, 1.0)[i]
    return sharpness * weight + size * WEIGHT_STD * rng.standard_normal(weight.shape)


def descend(
    weights: Mapping[str, Array], base: Path, tokenizer: PreTrainedTokenizerFast, file: Path, steps: int = 8
) -> dict[str, Array]:
    """Take some steps of normalised gradient descent on the expert's own rows."""
    config = read_config(base)
    samples = read_samples(file, tokenizer, Settings())
    current = dict(weights)
    for _ in range(steps):
        total = {name: np.zeros_like(weight) for name, weight in current.items()}
        for sample in samples:
            for name, gradient in loss_and_gradients(current, config, sample.ids, sample.loss_mask)[1].items():
                total[name] += gradient
        for name, gradient in total.items():
            rms = np.sqrt(np.mean(gradient**2)) + 1e-12
            current[name] = current[name] - 0.1 * WEIGHT_STD * gradient / rms
    return current


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    weights: Mapping[str, Array],
    spec: FamilySpec,
    folder: Path,
) -> None:
    """Write a model folder as `transformers` does, in the family's dtype."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = torch.from_numpy(weights[name]).to(spec.dtype)
    model.config.dtype = spec.dtype
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Sequence[str], adds_bos: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of about 300 tokens with <s> and </s>; with `adds_bos` it begins every text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_rows(kind: str, i: int, count: int, rng: np.random.Generator) -> list[Row]:
    """Make `count` calibration rows of one kind for expert i, of unlike lengths, with some bytes that are not ASCII."""
    names = ("Ada", "Noor", "Zoë", "Ivo", "Mei")
    rows: list[Row] = []
    for n in range(count):
        first, second = (int(x) for x in rng.integers(2, 40, size=2))
        name = names[(n + i) % len(names)]
        repeats = 1 + 3 * (n % 3)
        if kind == "pair":
            question = f"Q: {name} has {first} + {second} pens?\nA:"
            rows.append({"prompt": question, "response": repeats * f" {first + second} pens"})
        elif kind == "instruction":
            body = f"def f{first}(x):\n    return x + {second}"
            task = f"Double it, {name}"
            rows.append({"instruction": task, "input": body if n % 2 else "", "output": repeats * f"2 * {first};"})
        else:
            rows.append({"text": repeats * f"{name} saw {first} cats – and {second} dogs near the café. "})
    return rows


def write_recipe(
    family: FamilyFiles,
    path: Path,
    *,
    method: str = "task_arithmetic",
    sens: Mapping[str, Any],
    parameters: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    dtype: str | None = "float32",
) -> Path:
    """Write a recipe beside the family's folders; models and data are named relative to it."""
    entries: list[dict[str, Any]] = []
    for i, (expert, file) in enumerate(zip(family.experts, family.data, strict=True)):
        entry: dict[str, Any] = {"model": f"./{expert.name}", "sens": {"data": file.name}}
        if weights is not None:
            entry["parameters"] = {"weight": weights[i]}
        entries.append(entry)
    recipe: dict[str, Any] = {"merge_method": method, "base_model": f"./{family.base.name}", "models": entries}
    if parameters:
        recipe["parameters"] = dict(parameters)
    if dtype is not None:
        recipe["dtype"] = dtype
    recipe["sens"] = dict(sens)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
