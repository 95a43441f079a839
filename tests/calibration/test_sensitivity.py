"""Sensitivity, eq. 1, against a plain autograd loop in float64, and what it costs in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sensmerge.calibration.models import load_model
from sensmerge.calibration.sensitivity import (
    Reduce,
    checkpoint_names,
    fisher_score,
    sample_loss,
    sensitivities,
    task_vector_score,
    weight_score,
)
from sensmerge.errors import IncompatibleModelsError, InputFileError, NonFiniteError
from sensmerge.records import CalibrationSet
from tests.builders import VOCABULARY, tiny_gpt2, tiny_llama

SCORES = ("weight", "task_vector", "fisher")


def samples(seed: int = 0, count: int = 3) -> CalibrationSet:
    """A few samples of unlike length, the loss on their later part."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [5 + 3 * k for k in range(count)]
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    masks = [[0] * (length // 2) + [1] * (length - length // 2) for length in lengths]
    return CalibrationSet(tuple(range(10, 10 + count)), tuple(map(tuple, ids)), tuple(map(tuple, masks)), "response", 0)


def stored_names(model: Any, folder: Path) -> list[str]:
    """The tensor names that `save_pretrained` writes."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


@cache
def base_state(tied: bool) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in tiny_llama(1, tie_word_embeddings=tied).named_parameters()}


def reducer(score: str, tied: bool) -> Reduce:
    if score == "task_vector":
        tuned = dict(tiny_llama(0, tie_word_embeddings=tied).named_parameters())
        return task_vector_score(lambda name: tuned[name].detach() - base_state(tied)[name])
    return {"weight": weight_score, "fisher": fisher_score}[score]


def oracle(model: Any, data: CalibrationSet, score: str, tied: bool) -> list[dict[str, float]]:
    """Eq. 1 by its definition, in float64: |theta g|, |delta g| or g squared, a sample at a time."""
    wide = copy.deepcopy(model).double()
    found = []
    for ids, mask in zip(data.token_ids, data.loss_mask, strict=True):
        wide.zero_grad()
        logits = wide(input_ids=torch.tensor([ids])).logits[0]
        terms = [-torch.log_softmax(logits[t - 1], -1)[ids[t]] for t in range(1, len(ids)) if mask[t]]
        (torch.stack(terms).sum() / len(terms)).backward()
        sums = {}
        for name, weight in wide.named_parameters():
            grad = weight.grad
            if score == "fisher":
                sums[name] = float((grad**2).sum())
            else:
                factor = weight - base_state(tied)[name].double() if score == "task_vector" else weight
                sums[name] = float((factor * grad).abs().sum().detach())
        found.append(sums)
    return found


def measure(model: Any, data: CalibrationSet, score: str = "weight", tied: bool = False) -> list[dict[str, float]]:
    names = {name: name for name, _ in model.named_parameters()}
    return sensitivities(model, data, names, reducer(score, tied), label="expert")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("score", SCORES)
def test_sensitivity_is_eq_1(score: str, tied: bool) -> None:
    """Every parameter of every sample; a tied embedding once, with both uses."""
    model, data = tiny_llama(0, tie_word_embeddings=tied), samples()
    got, expected = measure(model, data, score, tied), oracle(model, data, score, tied)
    assert len(got) == 3
    for ours, theirs in zip(got, expected, strict=True):
        assert set(ours) == set(theirs)
        assert ("lm_head.weight" in ours) is (not tied)
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-4), name


@pytest.mark.parametrize("score", SCORES)
def test_a_sample_does_not_depend_on_the_others(score: str) -> None:
    """No gradient is carried from one sample to the next."""
    model, data = tiny_llama(0), samples()
    together = measure(model, data, score)
    for k in range(3):
        alone = CalibrationSet(
            data.rows[k : k + 1], data.token_ids[k : k + 1], data.loss_mask[k : k + 1], "response", 0
        )
        assert measure(model, alone, score)[0] == pytest.approx(together[k], rel=1e-6)


def test_the_absolute_value_is_taken_per_sample_and_per_weight() -> None:
    """DESIGN: sum_k |theta g_k|, never |theta sum_k g_k|: here the two are far apart."""
    model, data = tiny_llama(0), samples(count=4)
    per_sample = [sum(sample.values()) for sample in measure(model, data)]
    wide = copy.deepcopy(model).double()
    for ids, mask in zip(data.token_ids, data.loss_mask, strict=True):
        targets = torch.where(torch.tensor(mask).bool(), torch.tensor(ids), -100)[1:]
        torch.nn.functional.cross_entropy(wide(input_ids=torch.tensor([ids])).logits[0, :-1], targets).backward()
    of_the_sum = sum(float((weight * weight.grad).abs().sum().detach()) for weight in wide.parameters())
    assert sum(per_sample) > 1.2 * of_the_sum


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_at_most_one_gradient_exists_at_a_time(tied: bool) -> None:
    """Watched from a hook that runs before ours: the gradients of the whole model never exist at once."""
    model = tiny_llama(0, tie_word_embeddings=tied)
    alive: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in model.parameters()))
        )
    measure(model, samples(), tied=tied)
    assert len(alive) == 3 * len(list(model.parameters()))
    assert set(alive) == {1}


def test_nothing_is_left_behind() -> None:
    """No gradient, no hook, no changed weight: also after a failure in the middle."""
    model = tiny_llama(0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def failing(name: str, weight: Tensor, gradient: Tensor) -> float:
        if "layers.1" in name:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        sensitivities(model, samples(), {name: name for name in before}, failing, label="x")
    measure(model, samples())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
        assert torch.equal(parameter, before[name])


def test_a_parameter_without_a_gradient_counts_zero() -> None:
    """An expert of an MoE that no token visits."""
    model = tiny_llama(0)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    assert {sample["unused"] for sample in measure(model, samples())} == {0.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(name: str, value: float) -> None:
    """The tensor and the place in it, exit code 8."""
    model = tiny_llama(0)
    weight = model.get_parameter(name)
    place = [min(2, size - 1) for size in weight.shape]
    with torch.no_grad():
        weight[tuple(place)] = value
    with pytest.raises(NonFiniteError) as caught:
        measure(model, samples())
    assert caught.value.exit_code == 8
    assert name in caught.value.where
    assert str(place) in caught.value.where
    assert "expert" in caught.value.where


def test_a_nan_that_the_loss_does_not_see_is_found_by_the_score() -> None:
    """The embedding of a token that no sample has: 0 times NaN."""
    model = tiny_llama(0)
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 5] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        measure(model, samples())
    assert "model.embed_tokens.weight" in caught.value.where
    assert "[1, 5]" in caught.value.where


def test_an_overflow_without_a_bad_weight_names_the_sample() -> None:
    """All weights finite, the loss is not: the sample's row is told."""
    model = tiny_llama(0)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(NonFiniteError) as caught:
        measure(model, samples())
    assert "sample 10" in caught.value.where


# ---------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("seed", range(5))
def test_sample_loss_is_the_mean_over_loss_tokens(seed: int) -> None:
    """Token t from position t - 1; token 0 never counts, even if its mask says so."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, 20, generator=generator) * 4
    ids = torch.randint(0, 20, (9,), generator=generator)
    mask = torch.rand(9, generator=generator) < 0.6
    mask[-1], mask[0] = True, seed % 2 == 0
    terms = [-float(torch.log_softmax(logits[t - 1].double(), -1)[ids[t]]) for t in range(1, 9) if mask[t]]
    assert float(sample_loss(logits, ids, mask)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_sample_loss_is_computed_in_float32() -> None:
    """bfloat16 logits are widened first."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    loss = sample_loss(logits, torch.tensor([1, 2, 3, 4]), torch.tensor([False, True, True, True]))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("score", "formula"),
    [(weight_score, lambda w, g: (w * g).abs().sum()), (fisher_score, lambda w, g: (g * g).sum())],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_summed_in_float64(
    score: Reduce, formula: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Millions of small numbers lose nothing; larger than one piece."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(2100, 2100, generator=generator)).to(dtype)
    gradient = (torch.randn(2100, 2100, generator=generator) * 1e-3).to(dtype)
    assert weight.numel() > 1 << 22
    assert score("w", weight, gradient) == pytest.approx(float(formula(weight.double(), gradient.double())), rel=1e-7)


def test_scores_take_scalars_and_views() -> None:
    weight, gradient = torch.randn(6, 4).t(), torch.randn(4, 6)
    assert weight_score("w", weight, gradient) == pytest.approx(
        float((weight.double() * gradient.double()).abs().sum())
    )
    assert weight_score("w", torch.tensor(-2.0), torch.tensor(3.0)) == 6.0
    assert weight_score("w", torch.zeros(0), torch.zeros(0)) == 0.0


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("tied", [False, True])
def test_names_of_a_llama_are_its_own(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(0, tie_word_embeddings=tied)
    stored = stored_names(model, tmp_path)
    names = checkpoint_names(model, stored)
    assert names == {name: name for name, _ in model.named_parameters()}
    assert set(names.values()) == set(stored)


def test_names_of_a_gpt2_with_its_prefix(tmp_path: Path) -> None:
    model = tiny_gpt2()
    stored = stored_names(model, tmp_path)
    assert any(name.startswith("transformer.") for name in stored)
    assert set(checkpoint_names(model, stored).values()) == set(stored)


def test_names_of_a_gpt2_saved_without_its_prefix(tmp_path: Path) -> None:
    """As on the hub: `h.0.attn…`, not `transformer.h.0.attn…`."""
    model = tiny_gpt2()
    model.transformer.save_pretrained(tmp_path)
    stored = list(load_file(tmp_path / "model.safetensors"))
    assert not any(name.startswith("transformer.") for name in stored)
    names = checkpoint_names(model, stored)
    assert names["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    assert set(names.values()) == set(stored)


def test_a_model_whose_names_carry_a_prefix_that_the_class_lacks() -> None:
    """The other way round: the bare model, and a checkpoint of the whole."""
    model = tiny_gpt2()
    stored = [name for name, _ in model.named_parameters()]
    names = checkpoint_names(model.transformer, stored)
    assert names["h.1.ln_2.bias"] == "transformer.h.1.ln_2.bias"


def test_a_parameter_under_another_name_is_refused() -> None:
    """Fused while loading: sums cannot be assigned."""
    model = tiny_llama(0)
    stored = [name.replace("q_proj", "wq") for name, _ in model.named_parameters()]
    with pytest.raises(IncompatibleModelsError) as caught:
        checkpoint_names(model, stored)
    assert "q_proj" in caught.value.where
    assert caught.value.exit_code == 4


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("named", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_a_model_is_loaded_whole_in_the_dtype_asked_for(tmp_path: Path, named: str | None, dtype: torch.dtype) -> None:
    """float32 on a CPU unless named, whatever is stored; evaluation mode."""
    tiny_llama(3).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path, "cpu", named)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_checkpoint_with_invented_or_ignored_weights_is_refused(tmp_path: Path, fault: str) -> None:
    """transformers would fill in random numbers with a warning."""
    tiny_llama(3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["model.layers.1.mlp.extra.weight"] = torch.ones(2)
    else:
        tensors[name] = torch.ones(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputFileError) as caught:
        load_model(tmp_path, "cpu", None)
    assert caught.value.exit_code == 3
    assert str(tmp_path) in caught.value.where
    assert "model.layers.1.mlp" in caught.value.why
