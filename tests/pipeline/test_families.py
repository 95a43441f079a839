"""Every family that people merge: built from its `transformers` config at tiny size, merged, and loaded again by `transformers`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import sensmerge as sm
from sensmerge.checkpoints.families import group_tensors

LAYERS = 2
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
LLAMA = SIZES | {"num_key_value_heads": 1}
HEADS = LLAMA | {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
GPT2 = {
    "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "vocab_size": 40, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip

# What lies outside the blocks of a model named like Llama, without and with a head of its own.
TIED = {"model.embed_tokens.weight": "embed", "model.norm.weight": "final_norm"}
UNTIED = TIED | {"lm_head.weight": "lm_head"}


def norm(name: str) -> dict[str, str]:
    """A final LayerNorm, with its bias."""
    return {f"{name}.weight": "final_norm", f"{name}.bias": "final_norm"}


def encoder(prefix: str) -> dict[str, str]:
    """The embeddings of an encoder."""
    inner = ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight")
    return {f"{prefix}.embeddings.{each}": "embed" for each in (*inner, "LayerNorm.weight", "LayerNorm.bias")}


FALCON = {"transformer.word_embeddings.weight": "embed"} | norm("transformer.ln_f")
PARTS = ("weight", "bias")
CLS = (
    "bias", "transform.dense.weight", "transform.dense.bias", "transform.LayerNorm.weight", "transform.LayerNorm.bias",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A family: its config class and sizes, every tensor outside its blocks with its role, biases of its attention."""

    config: str
    sizes: dict[str, Any]
    outside: dict[str, str]
    biases: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    modules: tuple[str, ...] = ("attention", "mlp")
    auto: str = "AutoModelForCausalLM"


FAMILIES = {
    "llama": Architecture("LlamaConfig", LLAMA, UNTIED),
    "llama-biases": Architecture(
        "LlamaConfig", LLAMA | {"attention_bias": True}, UNTIED, tuple(f"self_attn.{p}_proj.bias" for p in "qkvo")
    ),
    "mistral": Architecture("MistralConfig", LLAMA, UNTIED),
    "qwen2": Architecture("Qwen2Config", LLAMA, UNTIED, tuple(f"self_attn.{p}_proj.bias" for p in "qkv")),
    "qwen2.5": Architecture(
        "Qwen2Config", LLAMA | {"tie_word_embeddings": True}, TIED, tuple(f"self_attn.{p}_proj.bias" for p in "qkv")
    ),
    "qwen3": Architecture(
        "Qwen3Config", HEADS, UNTIED, inside=("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    ),
    "gemma2": Architecture("Gemma2Config", HEADS, TIED, inside=("pre_feedforward_layernorm.weight",)),
    "gemma3": Architecture("Gemma3TextConfig", HEADS, TIED, inside=("self_attn.q_norm.weight",)),
    "phi3": Architecture(
        "Phi3Config", LLAMA, UNTIED, inside=("self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight")
    ),
    "olmo2": Architecture("Olmo2Config", LLAMA, UNTIED, inside=("post_feedforward_layernorm.weight",)),
    "granite": Architecture("GraniteConfig", LLAMA, UNTIED),
    "mixtral": Architecture(
        "MixtralConfig", LLAMA | {"num_local_experts": 4}, UNTIED, inside=("block_sparse_moe.experts.3.w2.weight",)
    ),
    "qwen2-moe": Architecture(
        "Qwen2MoeConfig", LLAMA | EXPERTS | {"shared_expert_intermediate_size": 12}, UNTIED,
        tuple(f"self_attn.{p}_proj.bias" for p in "qkv"), ("mlp.experts.3.up_proj.weight", "mlp.shared_expert_gate.weight"),
    ),
    "qwen3-moe": Architecture("Qwen3MoeConfig", HEADS | EXPERTS, UNTIED, inside=("mlp.experts.3.up_proj.weight",)),
    "gpt2": Architecture(
        "GPT2Config", GPT2, {"transformer.wte.weight": "embed", "transformer.wpe.weight": "embed"} | norm("transformer.ln_f"),
        ("attn.c_attn.bias", "attn.c_proj.bias"),
    ),
    "gpt-neox": Architecture(
        "GPTNeoXConfig", SIZES,
        {"gpt_neox.embed_in.weight": "embed", "embed_out.weight": "lm_head"} | norm("gpt_neox.final_layer_norm"),
        ("attention.query_key_value.bias", "attention.dense.bias"),
    ),
    "falcon": Architecture("FalconConfig", SIZES, FALCON),
    "falcon-new-decoder": Architecture(
        "FalconConfig", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 1}, FALCON, inside=("ln_mlp.weight",)
    ),
    "falcon-biases": Architecture(
        "FalconConfig", SIZES | {"bias": True}, FALCON, ("self_attention.query_key_value.bias",)
    ),
    "bloom": Architecture(
        "BloomConfig", {"hidden_size": 16, "n_layer": LAYERS, "n_head": 2, "vocab_size": 40, "initializer_range": 0.2},
        {f"transformer.word_embeddings{part}": "embed" for part in (".weight", "_layernorm.weight", "_layernorm.bias")}
        | norm("transformer.ln_f"),
        ("self_attention.query_key_value.bias",),
    ),
    "opt": Architecture(
        "OPTConfig", SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.2},
        {f"model.decoder.embed_{kind}.weight": "embed" for kind in ("tokens", "positions")}
        | norm("model.decoder.final_layer_norm"),
        tuple(f"self_attn.{p}_proj.bias" for p in ("q", "k", "v", "out")),
    ),
    "mamba": Architecture(
        "MambaConfig", {"hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 4, "vocab_size": 40},
        {"backbone.embeddings.weight": "embed", "backbone.norm_f.weight": "final_norm"},
        inside=("mixer.A_log", "mixer.D", "mixer.conv1d.bias"), modules=("attention",),
    ),
    "bert": Architecture(
        "BertConfig", SIZES, encoder("bert") | {f"cls.predictions.{each}": "other" for each in CLS},
        tuple(f"attention.self.{p}.bias" for p in ("query", "key", "value")), auto="AutoModelForMaskedLM",
    ),
    "bert-classifier": Architecture(
        "BertConfig", SIZES,
        encoder("bert") | {f"{head}.{part}": "other" for head in ("bert.pooler.dense", "classifier") for part in PARTS},
        auto="AutoModelForSequenceClassification",
    ),
    "roberta": Architecture(
        "RobertaConfig", SIZES,
        encoder("roberta")
        | {f"lm_head.{each}": "lm_head" for each in ("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias")},
        tuple(f"attention.self.{p}.bias" for p in ("query", "key", "value")), auto="AutoModelForMaskedLM",
    ),
}  # fmt: skip

each_family = pytest.mark.parametrize("family", FAMILIES)


def made(family: str, folder: Path, experts: int = 2) -> tuple[Path, list[Path]]:
    """A random base of a family and experts that stand a tenth from it, as `save_pretrained` writes them."""
    about = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, about.auto).from_config(getattr(transformers, about.config)(**about.sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases begin at zero, and zeros could be lost unseen.
            parameter.add_(0.05 * torch.randn_like(parameter))
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(folder / "base")
    for number in range(experts):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(base[name] + 0.1 * base[name].std(correction=0) * torch.randn_like(parameter))
        model.save_pretrained(folder / f"expert-{number}")
    return folder / "base", [folder / f"expert-{number}" for number in range(experts)]


def merged(folder: Path, method: str, models: Sequence[Path], base: Path | None, *, more: str = "") -> Path:
    """The folder of a merge, made through the public interface."""
    lines = [f"merge_method: {method}", *([] if base is None else [f"base_model: {base}"]), "models:"]
    lines += [f"  - model: {model}" for model in models]
    recipe = folder / f"{method}.yml"
    recipe.write_text("\n".join([*lines, more]))
    sm.merge(sm.load_recipe(recipe), folder / method)
    return folder / method


def loaded(family: str, folder: Path) -> Any:
    """The model that `transformers` loads from a folder: nothing missing, unexpected or of another shape."""
    model, info = getattr(transformers, FAMILIES[family].auto).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 5, 7, 11, 13, 2]])).logits  # type: ignore[no-any-return]


@each_family
def test_a_family_is_merged_and_loads(family: str, tmp_path: Path) -> None:
    """By task arithmetic, checked against the sum written out, and by TIES; config, tensors and blocks as the family has them."""
    base, experts = made(family, tmp_path)
    about = FAMILIES[family]
    stored = [tensors(folder) for folder in (base, *experts)]
    for method in ("task_arithmetic", "ties"):
        out = merged(tmp_path, method, experts, base, more="parameters: {density: 0.5}" if method == "ties" else "")
        model = loaded(family, out)
        found = tensors(out)
        assert found.keys() == stored[0].keys()
        blocks = group_tensors(found).layers
        assert len(blocks) == model.config.num_hidden_layers == LAYERS
        for block in blocks:
            assert {f"{block}.{inner}" for inner in (*about.biases, *about.inside)} <= found.keys()
        for name, values in found.items():
            assert not torch.equal(values, stored[0][name]), f"{name} was not merged"
            if method == "task_arithmetic":
                origin, *others = (each[name].double() for each in stored)
                torch.testing.assert_close(values.double(), sum(others) - origin, rtol=1e-6, atol=1e-6)
        assert logits(model).isfinite().all()
        said = json.loads((out / "config.json").read_text())
        assert said["tie_word_embeddings"] == json.loads((base / "config.json").read_text())["tie_word_embeddings"]


@each_family
def test_every_role_and_module(family: str, tmp_path: Path) -> None:
    """Of what is stored: each tensor outside the blocks by its role, each inside by its block and its module."""
    base, _ = made(family, tmp_path, experts=0)
    names = list(tensors(base))
    grouping = group_tensors(names)
    outside = {name: group for name, group in grouping.group_of.items() if group not in grouping.layers}
    assert outside == FAMILIES[family].outside
    modules = group_tensors(names, "module")
    assert modules.layers == tuple(f"{block}.{each}" for block in grouping.layers for each in FAMILIES[family].modules)
    assert all(modules.group_of[name].startswith(f"{grouping.group_of[name]}") for name in names)


@each_family
def test_copies_of_one_model_are_that_model(family: str, tmp_path: Path) -> None:
    """Bit for bit, by every way of merging that should give it, and so are its logits."""
    base, (expert,) = made(family, tmp_path, experts=1)
    copies = [tmp_path / f"copy-{number}" for number in range(2)]
    for copy in copies:
        shutil.copytree(expert, copy)
    origin = tmp_path / "origin"
    shutil.copytree(expert, origin)
    expected = logits(loaded(family, expert))
    for method, of in (("task_arithmetic", origin), ("linear", None)):
        out = merged(tmp_path, method, copies, of)
        found, wanted = tensors(out), tensors(expert)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert torch.equal(logits(loaded(family, out)), expected)
    assert not torch.equal(logits(loaded(family, base)), expected)
