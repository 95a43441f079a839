"""Models that store the same tensors differently are shown alike, and what is a difference stays one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensmerge import progress
from sensmerge.checkpoints.conforming import conformed
from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.source import Checkpoint
from tests.builders import write_checkpoint

TIE = "tie_word_embeddings"
LLAMA = {"model_type": "llama"}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []

    def task(self, label: str, total: int) -> Any:
        raise AssertionError

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llama(seed: int, *, head: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    tensors = {EMBED: random(seed, 6, 4), "model.layers.0.mlp.up_proj.weight": random(seed + 50, 8, 4)}
    return tensors if head is None else tensors | {HEAD: head}


Made = tuple[dict[str, torch.Tensor], dict[str, Any]]


@contextmanager
def shown(folder: Path, models: Mapping[str, Made], donor: str) -> Iterator[tuple[dict[str, Checkpoint], Heard]]:
    """The conformed models by name, and what was said."""
    readers = {name: ModelFolder(write_checkpoint(folder / name, *made), name) for name, made in models.items()}
    heard = Heard()
    with progress.listening(heard):
        found = conformed(readers, donor)
    try:
        yield found, heard
    finally:
        for reader in readers.values():
            reader.close()


def values(model: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    spec = model.tensors[name]
    return model.read(name, 0, spec.elements).reshape(spec.shape)


def test_models_that_are_alike_are_left_alone(tmp_path: Path) -> None:
    models = {name: (llama(seed, head=random(seed + 9, 6, 4)), LLAMA | {TIE: False}) for seed, name in enumerate("ab")}
    with shown(tmp_path, models, "a") as (found, heard):
        assert all(isinstance(model, ModelFolder) for model in found.values())
        assert not heard.messages + heard.warnings


@pytest.mark.parametrize("donor", ["bare", "prefixed"])
def test_all_bear_the_donor_s_names(tmp_path: Path, donor: str) -> None:
    bare = {"wte.weight": random(0, 6, 4), "h.0.attn.c_attn.bias": random(1, 12), "ln_f.weight": random(2, 4)}
    prefixed = {f"transformer.{name}": tensor + 1 for name, tensor in bare.items()}
    models = {"bare": (bare, {"model_type": "gpt2"}), "prefixed": (prefixed, {"model_type": "gpt2"})}
    with shown(tmp_path, models, donor) as (found, _):
        names = models[donor][0].keys()
        for key in models:
            assert found[key].tensors.keys() == names
        for name in bare:
            there = name if donor == "bare" else f"transformer.{name}"
            np.testing.assert_array_equal(values(found["bare"], there), bare[name].numpy())
            np.testing.assert_array_equal(values(found["prefixed"], there), bare[name].numpy() + 1)


def test_buffers_that_some_store_are_left_out_and_told_once(tmp_path: Path) -> None:
    """A learned bias of the same name is not: a model that lacks one is another model."""
    bare = {"h.0.attn.c_attn.weight": random(0, 4, 12), "h.0.attn.bias": random(1, 4)}
    buffers = {"h.1.attn.bias": torch.ones(1, 1, 4, 4).tril().bool(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    models = {
        "a": (bare, LLAMA),
        "b": (bare | buffers, LLAMA),
        "c": ({"h.0.attn.c_attn.weight": random(2, 4, 12)}, LLAMA),
    }
    with shown(tmp_path, models, "a") as (found, heard):
        assert found["b"].tensors.keys() == bare.keys()
        assert "h.0.attn.bias" in found["a"].tensors
        assert "h.0.attn.bias" not in found["c"].tensors
        (message,) = heard.messages
        assert "1 × bias" in message
        assert "1 × masked_bias" in message


def test_buffers_that_all_store_alike_stay(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    alike = {name: torch.tensor([1.0, 0.1])}
    other = {name: torch.tensor([1.0, 0.1, 0.01])}
    for shapes, kept in (((alike, alike), True), ((alike, other), False)):
        models = {key: (llama(0) | each, LLAMA | {TIE: True}) for key, each in zip("ab", shapes, strict=True)}
        with shown(tmp_path / str(kept), models, "a") as (found, heard):
            assert all((name in model.tensors) is kept for model in found.values())
            assert bool(heard.messages) is not kept


EMBEDDING = llama(0)[EMBED]


@pytest.mark.parametrize("donor", ["plain", "stored"])
@pytest.mark.parametrize("said", [True, None])
def test_a_stored_copy_of_a_tied_head_is_the_embedding(tmp_path: Path, donor: str, said: bool | None) -> None:
    """Whether config.json says so or not: the matrix is stored once, so that it stays one."""
    config = {"model_type": "gpt2"} if said is None else LLAMA | {TIE: said}
    models = {"plain": (llama(1), LLAMA | {TIE: True}), "stored": (llama(0, head=EMBEDDING.clone()), config)}
    with shown(tmp_path, models, donor) as (found, heard):
        assert all(HEAD not in model.tensors for model in found.values())
        assert all(model.config[TIE] is True for model in found.values())
        assert not heard.messages + heard.warnings


def test_a_head_that_differs_is_a_head_though_config_ties_it(tmp_path: Path) -> None:
    """As transformers 5 loads it. The result says so."""
    models = {name: (llama(seed, head=random(seed + 9, 6, 4)), LLAMA | {TIE: True}) for seed, name in enumerate("ab")}
    with shown(tmp_path, models, "a") as (found, heard):
        assert all(HEAD in model.tensors and model.config[TIE] is False for model in found.values())
        assert [warning.partition(":")[0] for warning in heard.warnings] == ["a", "b"]


def test_heads_of_their_own_without_a_word_in_config_stay(tmp_path: Path) -> None:
    models = {name: (llama(seed, head=random(seed + 9, 6, 4)), LLAMA) for seed, name in enumerate("ab")}
    with shown(tmp_path, models, "a") as (found, heard):
        assert all(HEAD in model.tensors and TIE not in model.config for model in found.values())
        assert not heard.messages + heard.warnings


@pytest.mark.parametrize("kind", ["llama", "gpt2", "nobody-knows-it"])
def test_equal_matrices_without_a_word_in_config_are_what_the_family_makes_of_them(tmp_path: Path, kind: str) -> None:
    """A Llama would look for both when it is loaded; a GPT-2 has one, and an unknown family is told by its config from now on."""
    models = {name: (llama(0, head=EMBEDDING.clone()), {"model_type": kind}) for name in "ab"}
    with shown(tmp_path, models, "a") as (found, _):
        assert all((HEAD in model.tensors) is (kind == "llama") for model in found.values())
        assert all(model.config.get(TIE) is (None if kind == "llama" else True) for model in found.values())


@pytest.mark.parametrize("donor", ["tied", "untied"])
def test_one_untied_model_unties_all(tmp_path: Path, donor: str) -> None:
    """A tied model's head is its embedding, and is shown as one."""
    models = {"tied": (llama(0), LLAMA | {TIE: True}), "untied": (llama(1, head=random(5, 6, 4)), LLAMA | {TIE: False})}
    with shown(tmp_path, models, donor) as (found, heard):
        np.testing.assert_array_equal(values(found["tied"], HEAD), EMBEDDING.numpy())
        np.testing.assert_array_equal(values(found["tied"], EMBED), EMBEDDING.numpy())
        np.testing.assert_array_equal(values(found["untied"], HEAD), random(5, 6, 4).numpy())
        assert all(model.config[TIE] is False for model in found.values())
        (message,) = heard.messages
        assert "tie_word_embeddings: false" in message


def test_a_missing_head_is_not_filled_in(tmp_path: Path) -> None:
    """A Llama without a head whose config says nothing lacks it: its family does not tie."""
    models = {"headless": (llama(0), LLAMA), "whole": (llama(1, head=random(5, 6, 4)), LLAMA | {TIE: False})}
    with shown(tmp_path, models, "whole") as (found, _):
        assert HEAD not in found["headless"].tensors
    models["headless"] = (llama(0), LLAMA | {TIE: False})
    with shown(tmp_path / "said", models, "whole") as (found, _):
        assert HEAD not in found["headless"].tensors


def test_a_matrix_stored_under_the_head_s_name_alone(tmp_path: Path) -> None:
    only = {HEAD: EMBEDDING, "model.layers.0.mlp.up_proj.weight": random(9, 8, 4)}
    models = {"head": (only, LLAMA | {TIE: True}), "embedding": (llama(1), LLAMA | {TIE: True})}
    with shown(tmp_path, models, "embedding") as (found, _):
        assert found["head"].tensors.keys() == found["embedding"].tensors.keys()
        np.testing.assert_array_equal(values(found["head"], EMBED), EMBEDDING.numpy())
    with shown(tmp_path / "other", models, "head") as (found, _):
        assert found["embedding"].tensors.keys() == only.keys()


def test_the_text_part_of_a_config_ties_too(tmp_path: Path) -> None:
    nested = {"model_type": "m", "text_config": {"model_type": "t", TIE: True}}
    models = {"nested": (llama(0), nested), "untied": (llama(1, head=random(5, 6, 4)), LLAMA | {TIE: False})}
    with shown(tmp_path, models, "nested") as (found, _):
        assert found["nested"].config["text_config"] == {"model_type": "t", TIE: False}
        assert HEAD in found["nested"].tensors


def test_a_bias_stored_twice_is_one(tmp_path: Path) -> None:
    bias = random(0, 5)
    bert = {"bert.encoder.layer.0.output.dense.weight": random(1, 3, 3), "cls.predictions.bias": bias}
    copy = {"cls.predictions.decoder.bias": bias.clone()}
    models = {"a": (bert, LLAMA), "b": (bert | copy, LLAMA)}
    with shown(tmp_path, models, "a") as (found, _):
        assert found["b"].tensors.keys() == bert.keys()
    models["b"] = (bert | {"cls.predictions.decoder.bias": bias + 1}, LLAMA)
    with shown(tmp_path / "unlike", models, "a") as (found, _):
        assert "cls.predictions.decoder.bias" in found["b"].tensors, "it is no copy, and is told as a difference"
