"""What names tell: blocks, roles and modules, on the names that transformers itself gives real architectures."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers

from sensmerge.checkpoints.families import group_tensors, natural_key, role_outside, stack_of, tied_head
from sensmerge.errors import IncompatibleModelsError

LAYERS = 11
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PLAIN = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT2 = {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}

# Class of the config, its sizes, the prefix of a block.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", SIZES, "model.layers"),
    "mistral": ("MistralConfig", SIZES, "model.layers"),
    "qwen2": ("Qwen2Config", SIZES, "model.layers"),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 8}, "model.layers"),
    "gemma2": ("Gemma2Config", SIZES | {"head_dim": 8}, "model.layers"),
    "gemma3": ("Gemma3TextConfig", SIZES | {"head_dim": 8}, "model.layers"),
    "phi3": ("Phi3Config", SIZES, "model.layers"),
    "olmo2": ("Olmo2Config", SIZES, "model.layers"),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4}, "model.layers"),
    "gpt2": ("GPT2Config", GPT2, "transformer.h"),
    "gpt_neox": ("GPTNeoXConfig", PLAIN, "gpt_neox.layers"),
    "falcon": ("FalconConfig", PLAIN, "transformer.h"),
    "bloom": ("BloomConfig", {"hidden_size": 16, "n_layer": LAYERS, "n_head": 2, "vocab_size": 32}, "transformer.h"),
    "mamba": (
        "MambaConfig", {"hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 4, "vocab_size": 32},
        "backbone.layers",
    ),
    "bert": ("BertConfig", PLAIN | {"is_decoder": False}, "bert.encoder.layer"),
}  # fmt: skip
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "gemma2", "gemma3", "olmo2")

# Whether a norm belongs to attention or the MLP, by what the architecture's code does with it.
NORMS = {
    "llama": {"input_layernorm": "attention", "post_attention_layernorm": "mlp"},
    "gemma2": {
        "input_layernorm": "attention", "post_attention_layernorm": "attention",
        "pre_feedforward_layernorm": "mlp", "post_feedforward_layernorm": "mlp",
    },
    "olmo2": {"post_attention_layernorm": "attention", "post_feedforward_layernorm": "mlp"},
}  # fmt: skip


@cache
def names_of(family: str) -> tuple[str, ...]:
    """The parameters' names of a tiny model that takes no memory."""
    kind, sizes, _ = FAMILIES[family]
    config = getattr(transformers, kind)(**sizes)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return tuple(auto.from_config(config).state_dict())


each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_as_many_blocks_as_the_config_says(family: str) -> None:
    """In the order of the stack: 2 before 10."""
    grouping = group_tensors(names_of(family))
    assert grouping.layers == tuple(f"{FAMILIES[family][2]}.{n}" for n in range(LAYERS))
    assert set(grouping.group_of) == set(names_of(family))


@each_family
def test_names_come_apart_and_together_again(family: str) -> None:
    stack, names = stack_of(reversed(names_of(family))), names_of(family)
    assert stack.numbers == tuple(str(n) for n in range(LAYERS))
    assert stack.prefix == FAMILIES[family][2]
    for name in names:
        parts = stack.split(name)
        assert (parts is not None) is name.startswith(f"{stack.prefix}.")
        if parts is not None:
            assert stack.join(*parts) == name
            assert parts[0] in stack.numbers


def test_stacks_without_a_prefix_or_without_blocks() -> None:
    bare = stack_of(["0.weight", "1.weight", "10.weight", "2.weight", "head.weight"])
    assert (bare.prefix, bare.numbers) == ("", ("0", "1", "2", "10"))
    assert bare.split("10.weight") == ("10", ".weight")
    assert bare.join("3", ".weight") == "3.weight"
    assert stack_of(["embed.weight"]).numbers == ()
    assert stack_of(["embed.weight"]).split("embed.weight") is None


@each_family
def test_every_tensor_of_a_block_is_in_its_block(family: str) -> None:
    grouping, prefix = group_tensors(names_of(family)), FAMILIES[family][2]
    for name in names_of(family):
        inside = name.startswith(f"{prefix}.")
        expected = ".".join(name.split(".")[: prefix.count(".") + 2]) if inside else None
        assert (grouping.group_of[name] == expected) is inside


@each_family
def test_roles_outside_the_blocks(family: str) -> None:
    """Embedding, final norm and head of every architecture, nothing of a causal model is left over."""
    grouping, prefix = group_tensors(names_of(family)), FAMILIES[family][2]
    outside = {name: grouping.group_of[name] for name in names_of(family) if not name.startswith(f"{prefix}.")}
    roles = {"embed", "other"} if family == "bert" else {"embed", "final_norm", "lm_head"}
    assert set(outside.values()) == roles == set(grouping.roles)
    for name, role in outside.items():
        if family == "bert":
            assert role == ("embed" if ".embeddings." in name else "other"), name
        elif "embed" in name or "wte" in name or "wpe" in name:
            assert role == "embed", name
        elif name.startswith("lm_head"):
            assert role == "lm_head", name
        else:
            assert role == "final_norm", name


@each_family
@pytest.mark.parametrize("group", ["block", "tensor"])
def test_the_order_of_names_does_not_matter(family: str, group: str) -> None:
    names = names_of(family)
    one, two = group_tensors(names, group), group_tensors(list(reversed(names)), group)
    assert (one.layers, one.roles, dict(one.group_of)) == (two.layers, two.roles, dict(two.group_of))


@each_family
def test_group_tensor_lists_every_tensor_of_the_blocks(family: str) -> None:
    grouping, prefix = group_tensors(names_of(family), "tensor"), FAMILIES[family][2]
    inside = [name for name in names_of(family) if name.startswith(f"{prefix}.")]
    assert set(grouping.layers) == set(inside)
    assert all(grouping.group_of[name] == name for name in inside)


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_group_module_of_llama_like_models(family: str) -> None:
    """Attention and MLP of each block; the norm before each belongs to it, a norm after one to that one."""
    grouping = group_tensors(names_of(family), "module")
    assert grouping.layers == tuple(
        f"model.layers.{n}.{module}" for n in range(LAYERS) for module in ("attention", "mlp")
    )
    norms = NORMS["gemma2" if family.startswith("gemma") else family if family == "olmo2" else "llama"]
    for name in names_of(family):
        if not name.startswith("model.layers."):
            continue
        inner = name.split(".")[3]
        expected = norms.get(inner, "attention" if inner == "self_attn" else "mlp")
        assert grouping.group_of[name] == ".".join(name.split(".")[:3]) + f".{expected}", name
    assert grouping.roles == group_tensors(names_of(family)).roles


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "bloom", "bert"])
def test_group_module_of_older_families(family: str) -> None:
    assert len(group_tensors(names_of(family), "module").layers) == 2 * LAYERS


def test_bert_s_output_is_attention_s_or_the_mlp_s() -> None:
    """By where it lies: `attention.output.dense` closes attention, `output.dense` the MLP, each with its norm."""
    group_of = group_tensors(names_of("bert"), "module").group_of
    for norm_or_dense in ("dense", "LayerNorm"):
        for place, module in (("attention.output", "attention"), ("output", "mlp")):
            name = f"bert.encoder.layer.0.{place}.{norm_or_dense}.weight"
            assert group_of[name] == f"bert.encoder.layer.0.{module}"
    assert group_of["bert.encoder.layer.0.intermediate.dense.weight"] == "bert.encoder.layer.0.mlp"


def test_mamba_s_mixer_stands_where_attention_does() -> None:
    grouping = group_tensors(names_of("mamba"), "module")
    assert grouping.layers == tuple(f"backbone.layers.{n}.attention" for n in range(LAYERS))


@pytest.mark.parametrize("inner", ["mixer.up_proj.weight", "w1.weight", "layer.0.SelfAttention.q.weight"])
def test_a_name_that_does_not_say_its_module_is_refused_by_name(inner: str) -> None:
    """Never a guess: a `mixer` with an `up_proj` is an MLP, or is not."""
    with pytest.raises(IncompatibleModelsError) as caught:
        group_tensors([f"model.layers.{n}.{inner}" for n in range(2)], "module")
    assert f"model.layers.0.{inner}" in caught.value.where
    assert "group: block" in caught.value.fix


MIXTRAL = [
    f"model.layers.{n}.block_sparse_moe.{part}"
    for n in range(3)
    for part in ("gate.weight", *(f"experts.{e}.w{w}.weight" for e in range(8) for w in (1, 2, 3)))
]


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (MIXTRAL, [f"model.layers.{n}" for n in range(3)]),
        (["h.0.attn.weight", "h.1.attn.weight", "wte.weight"], ["h.0", "h.1"]),
        (["0.weight", "1.weight", "2.bias"], ["0", "1", "2"]),
        (
            [f"vision.blocks.{n}.w" for n in range(3)] + [f"text.layers.{n}.w" for n in range(4)],
            [f"text.layers.{n}" for n in range(4)],
        ),
        ([f"model.layers.{n}.w" for n in (0, 2, 10)], ["model.layers.0", "model.layers.2", "model.layers.10"]),
        (["embed.weight", "norm.weight"], []),
        ([], []),
        (["model.layers.5.w"], ["model.layers.5"]),
    ],
    ids=["experts inside", "GPT-2 as saved", "no prefix", "two stacks", "gaps", "no stack", "nothing", "one block"],
)
def test_the_stack_is_the_longest_family(names: list[str], layers: list[str]) -> None:
    """A block is the name up to its first all-digit component; experts of an MoE lie inside their block."""
    assert list(group_tensors(names).layers) == layers


def test_the_shorter_stack_is_outside() -> None:
    names = [f"vision.blocks.{n}.w" for n in range(2)] + [f"text.layers.{n}.w" for n in range(4)]
    grouping = group_tensors(names)
    assert grouping.group_of["vision.blocks.0.w"] == "other"
    assert grouping.roles == ("other",)


def test_a_prefix_is_not_mistaken_for_a_longer_name() -> None:
    """`model.layers` is not `model.layers_extra`."""
    names = [f"model.layers.{n}.w" for n in range(3)] + ["model.layers_extra.0.w"]
    assert group_tensors(names).group_of["model.layers_extra.0.w"] == "other"


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", "embed"), ("transformer.wte.weight", "embed"), ("wpe.weight", "embed"),
        ("tok_embeddings.weight", "embed"), ("embed_out.weight", "lm_head"), ("output.weight", "lm_head"),
        ("lm_head.weight", "lm_head"), ("lm_head.bias", "lm_head"), ("model.norm.weight", "final_norm"),
        ("transformer.ln_f.bias", "final_norm"), ("gpt_neox.final_layer_norm.weight", "final_norm"),
        ("transformer.word_embeddings_layernorm.weight", "embed"), ("score.weight", "other"),
        ("v_head.summary.weight", "other"),
    ],
)  # fmt: skip
def test_role_outside(name: str, role: str) -> None:
    assert role_outside(name) == role


def test_natural_key_counts() -> None:
    names = ["layers.10.w", "layers.9.w", "layers.2.b", "layers.2.a", "layers", "a10b2", "a10b10", "a9", "10", "9"]
    ordered = sorted(names, key=natural_key)
    assert (
        ordered.index("layers.2.a")
        < ordered.index("layers.2.b")
        < ordered.index("layers.9.w")
        < ordered.index("layers.10.w")
    )
    assert ordered.index("a9") < ordered.index("a10b2") < ordered.index("a10b10")
    assert ordered.index("9") < ordered.index("10")


@pytest.mark.parametrize(
    "odd",
    [
        "layers.².weight",
        "layers.x²y",
        "layers.1²2.w",
        "m" + "1" * 5000,
        "",
        ".",
        "..",
        "a..b",
        "٣.weight",
        "layers.٣.w",
    ],
)
def test_odd_names_are_grouped_like_any_other(odd: str) -> None:
    """A tensor's name comes from a file: whatever it is, it has a place in the order and a group."""
    names = ["model.layers.0.w", "model.layers.1.w", odd]
    assert odd in group_tensors(names).group_of


@pytest.mark.parametrize(
    ("config", "names", "head"),
    [
        ({"tie_word_embeddings": True}, ["lm_head.weight", "model.embed_tokens.weight"], "lm_head.weight"),
        ({"tie_word_embeddings": True}, ["model.embed_tokens.weight"], None),
        ({"tie_word_embeddings": False}, ["lm_head.weight", "model.embed_tokens.weight"], None),
        ({}, ["lm_head.weight", "model.embed_tokens.weight"], None),
        ({"tie_word_embeddings": True}, ["gpt_neox.embed_in.weight", "embed_out.weight"], "embed_out.weight"),
        (
            {"tie_word_embeddings": True},
            ["h.0.attention.output.dense.weight", "h.1.attention.output.dense.weight", "lm_head.weight"],
            "lm_head.weight",
        ),
    ],
)
def test_tied_head(config: dict[str, object], names: list[str], head: str | None) -> None:
    """The stored copy of a tied head, if there is one: never a tensor inside a block."""
    assert tied_head(config, names) == head


def test_bert_s_blocks_hold_no_head() -> None:
    """`attention.output` is not an output head."""
    head = tied_head({"tie_word_embeddings": True}, names_of("bert"))
    assert head is None or not head.startswith("bert.encoder")
