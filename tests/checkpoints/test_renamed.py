"""A checkpoint under other names: which name becomes which, and which buffers are no more than buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.renamed import RenamedModel, is_recomputed, names_like
from sensmerge.records import TensorSpec
from tests.builders import write_checkpoint

GPT2 = [
    "wte.weight",
    "wpe.weight",
    "h.0.attn.c_attn.weight",
    "h.0.ln_1.weight",
    "h.1.attn.c_attn.weight",
    "ln_f.weight",
]
BERT = ["embeddings.LayerNorm.weight", "encoder.layer.0.attention.self.query.bias", "pooler.dense.weight"]
LLAMA = ["layers.0.self_attn.q_proj.weight", "embed_tokens.weight", "norm.weight"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (GPT2, [f"transformer.{name}" for name in GPT2]),
        ([*BERT, "classifier.weight"], [f"bert.{name}" for name in BERT] + ["classifier.weight"]),
        ([f"bert.{name}" for name in BERT], [f"roberta.{name}" for name in BERT]),
        (LLAMA, [f"model.{name}" for name in LLAMA]),
        ([f"model.language_model.{name}" for name in LLAMA], [f"model.{name}" for name in LLAMA]),
        ([f"language_model.model.{name}" for name in LLAMA], [f"model.language_model.{name}" for name in LLAMA]),
        (["language_model.lm_head.weight"], ["lm_head.weight"]),
        (["bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.beta"],
         ["bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"]),
        (["embeddings.LayerNorm.weight"], ["bert.embeddings.LayerNorm.gamma"]),
    ],
)  # fmt: skip
def test_prefixes_and_spellings(names: list[str], wanted: list[str]) -> None:
    assert names_like(names, wanted) == dict(zip(names, wanted, strict=True))
    assert names_like(wanted, names) == dict(zip(wanted, names, strict=True))


def test_a_deeper_model_s_layers_follow(tmp_path: Path) -> None:
    """Blocks that the other has not are called as its blocks are; what has no counterpart at all keeps its name."""
    names = [*GPT2, "h.7.attn.c_attn.weight", "lm_head.weight", "extra.weight"]
    found = names_like(names, [f"transformer.{name}" for name in GPT2] + ["lm_head.weight"])
    assert found["h.7.attn.c_attn.weight"] == "transformer.h.7.attn.c_attn.weight"
    assert found["lm_head.weight"] == "lm_head.weight"
    assert found["extra.weight"] == "extra.weight"


def test_no_two_tensors_become_one() -> None:
    names = ["h.0.w", "transformer.h.0.w"]
    assert names_like(names, ["model.h.0.w"]) == {name: name for name in names}


@given(st.lists(st.sampled_from([f"{p}{n}" for p in ("", "model.", "bert.", "transformer.") for n in LLAMA]), unique=True),
       st.lists(st.sampled_from([f"{p}{n}" for p in ("", "model.", "roberta.") for n in LLAMA]), unique=True))  # fmt: skip
def test_every_name_has_one_and_only_one(names: list[str], wanted: list[str]) -> None:
    found = names_like(names, wanted)
    assert sorted(found) == sorted(names)
    assert len(set(found.values())) == len(names)


@pytest.mark.parametrize(
    ("name", "shape", "recomputed"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (64,), True),
        ("model.rotary_emb.inv_freq", (64,), True),
        ("h.0.attn.bias", (1, 1, 1024, 1024), True),
        ("transformer.h.0.attn.masked_bias", (), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 2048, 2048), True),
        ("gpt_neox.layers.0.attention.masked_bias", (), True),
        ("bert.embeddings.position_ids", (1, 512), True),
        # A bias that is learned has the shape of one.
        ("h.0.attn.bias", (768,), False),
        ("h.0.attn.bias", (1, 1, 12, 64), False),
        ("h.0.attn.bias", (2, 1, 8, 8), False),
        ("h.0.attn.c_attn.bias", (1, 1, 8, 8), False),
        ("model.layers.0.self_attn.q_proj.bias", (64,), False),
        ("transformer.h.0.attn.masked_bias", (1, 1), False),
        ("model.rotary_emb.inv_freq", (64, 2), False),
        ("bert.embeddings.position_embeddings.weight", (1, 512), False),
        ("bert.embeddings.position_ids", (512, 768), False),
    ],
)  # fmt: skip
def test_a_buffer_is_told_by_name_and_shape(name: str, shape: tuple[int, ...], recomputed: bool) -> None:
    assert is_recomputed(TensorSpec(name, "F32", shape)) is recomputed


def test_what_is_shown_is_what_is_stored(tmp_path: Path) -> None:
    """Under other names, twice or not at all; reads, dtypes and the identity are those of the model."""
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(1)}
    folder = write_checkpoint(tmp_path / "m", tensors)
    with ModelFolder(folder) as inner:
        shown = RenamedModel(inner, {"x": "a", "y": "a", "b": "b"}, {"model_type": "other"})
        assert sorted(shown.tensors) == ["b", "x", "y"]
        assert shown.tensors["x"] == TensorSpec("x", "F32", (3, 4))
        assert all(name == spec.name for name, spec in shown.tensors.items())
        for name in ("x", "y"):
            np.testing.assert_array_equal(shown.read(name, 5, 3), [5, 6, 7])
        assert (shown.stored_dtype("b"), shown.config, shown.label) == ("BF16", {"model_type": "other"}, inner.label)
        assert shown.fingerprint() == inner.fingerprint()
        with pytest.raises(KeyError):
            shown.read("c", 0, 1)
