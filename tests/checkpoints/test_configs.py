"""Configs side by side: what changes the mathematics, whatever the version of transformers that wrote it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import pytest
from transformers import GPTNeoXConfig, LlamaConfig, Qwen2Config

from sensmerge.checkpoints.configs import ABSENT, Difference, defaults_of, differences, normal_config
from sensmerge.checkpoints.source import Checkpoint

# As transformers 4 wrote a Llama.
OLD = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                     "rope_type": "llama3"},
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 100,
    "transformers_version": "4.43.0",
}  # fmt: skip


class Named:
    """A checkpoint that has a config, and nothing else."""

    def __init__(self, label: str, config: Mapping[str, Any]) -> None:
        self.label, self.config = label, config


def compared(*configs: Mapping[str, Any], stacked: bool = False) -> list[Difference]:
    models = [Named(f"m{number}", config) for number, config in enumerate(configs)]
    return differences([cast(Checkpoint, model) for model in models], stacked=stacked)


def keys(found: list[Difference], *, matters: bool = True) -> list[str]:
    return [each.key for each in found if each.matters is matters]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 10000.0), ("rope_scaling", None), ("rope_scaling", {**OLD["rope_scaling"], "factor": 32.0}),
        ("rms_norm_eps", 1e-6), ("num_attention_heads", 8), ("num_key_value_heads", 4), ("hidden_act", "gelu"),
        ("model_type", "mistral"), ("head_dim", 32), ("attention_bias", True), ("num_hidden_layers", 4), ("hidden_size", 32),
        ("sliding_window", 4096),
        ("final_logit_softcapping", 30.0), ("embedding_multiplier", 12.0), ("layer_types", ["full_attention"]),
    ],
)  # fmt: skip
def test_what_changes_the_mathematics(key: str, value: Any) -> None:
    found = compared(OLD, {**OLD, key: value})
    assert key in keys(found)
    (difference,) = [each for each in found if each.key == key]
    assert [label for label, _ in difference.values] == ["m0", "m1"]
    assert difference.name == key


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_position_embeddings", 4096), ("eos_token_id", 7), ("use_cache", False), ("architectures", ["Other"])],
)
def test_what_is_only_told(key: str, value: Any) -> None:
    found = compared(
        {**OLD, "eos_token_id": 2, "use_cache": True, "architectures": ["LlamaForCausalLM"]}, {**OLD, key: value}
    )
    assert keys(found, matters=False) == [key]
    assert keys(found) == []


@pytest.mark.parametrize(
    "key", ["vocab_size", "tie_word_embeddings", "torch_dtype", "dtype", "transformers_version", "_name_or_path"]
)
def test_what_is_compared_elsewhere_or_never(key: str) -> None:
    assert compared(OLD, {**OLD, key: "other"}) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (OLD, LlamaConfig.from_dict(copy.deepcopy(OLD)).to_dict()),
        (OLD, LlamaConfig.from_dict(copy.deepcopy(OLD)).to_diff_dict()),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0},
            {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000}},
        ),
        (
            {"model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.25, "hidden_size": 64, "num_attention_heads": 4},
            GPTNeoXConfig(hidden_size=64, num_attention_heads=4).to_dict(),
        ),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}, {"model_type": "llama", "hidden_size": 64,
          "num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 4, "attention_bias": False, "rms_norm_eps": 1e-6}),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "default", "rope_theta": 5000.0}},
            {"model_type": "llama", "rope_theta": 5000.0, "rope_scaling": None},
        ),
        ({"model_type": "gpt2", "n_head": 12}, {"model_type": "gpt2", "num_attention_heads": 12}),
        (
            {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
             "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {"model_type": "gemma3_text", "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}, "_sliding_window_pattern": 6},
        ),
        (
            {"model_type": "qwen2", "sliding_window": 131072, "max_window_layers": 28, "use_sliding_window": False},
            {"model_type": "qwen2", "sliding_window": 32768, "max_window_layers": 21, "use_sliding_window": False},
        ),
        (
            {"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False, "rope_theta": 1000000.0},
            Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}).to_dict(),
        ),
    ],
    ids=["to_dict", "to_diff_dict", "rope type", "neox", "defaults", "theta within", "names", "gemma3", "switched off", "qwen2"],
)  # fmt: skip
def test_one_thing_said_in_two_ways_is_no_difference(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Old files and those of transformers 5, keys left out and keys written."""
    assert keys(compared(one, other)) == []
    assert keys(compared(other, one)) == []


def test_a_key_left_out_is_the_family_s_default() -> None:
    without = {key: value for key, value in OLD.items() if key not in ("rope_theta", "rope_scaling")}
    assert keys(compared({**without, "rope_theta": 10000.0}, without)) == []
    (difference,) = compared({**without, "rope_theta": 500000.0}, without)
    assert difference.told() == "rope_theta: 500000.0 in m0; 10000.0 in m1"


def test_an_unknown_family_is_compared_as_written() -> None:
    odd = {"model_type": "nobody-knows-it", "rope_theta": 1.0}
    assert defaults_of(odd) == {}
    assert compared(odd, {**odd, "use_cache": True}) == []
    (difference,) = compared(odd, {"model_type": "nobody-knows-it"})
    assert difference.values == (("m0", 1.0), ("m1", ABSENT))
    assert "absent in m1" in difference.told()


def test_a_config_class_that_raises_is_no_crash() -> None:
    assert defaults_of({"model_type": "llama", "hidden_size": "wide", "num_attention_heads": 0}) == {}


def test_the_text_model_of_a_multimodal_config_is_looked_into() -> None:
    whole = {"model_type": "mllama", "text_config": {"model_type": "mllama_text_model", "rope_theta": 1.0},
             "vision_config": {"hidden_size": 8, "hidden_act": "gelu"}}  # fmt: skip
    other = {**whole, "text_config": {"model_type": "mllama_text_model", "rope_theta": 2.0},
             "vision_config": {"hidden_size": 16, "hidden_act": "gelu"}}  # fmt: skip
    found = compared(whole, other)
    assert keys(found) == ["rope_theta", "vision_config.hidden_size"]
    assert [each.name for each in found] == ["rope_theta", "hidden_size"]


def test_layers_of_slices_may_differ_in_number() -> None:
    deeper = {**OLD, "num_hidden_layers": 7, "rope_theta": 1.0}
    assert keys(compared(OLD, deeper, stacked=True)) == ["rope_theta"]


@pytest.mark.parametrize(
    "odd", [{"rope_scaling": "yes"}, {"text_config": 3}, {"rope_parameters": None}, {"hidden_size": None}, {}]
)
def test_odd_configs_are_compared_like_any_other(odd: dict[str, Any]) -> None:
    assert compared(odd, odd) == []
    normal_config(odd)
