"""Distances between logits against NumPy float64, position by position."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensmerge.distances import DISTANCES

Array = NDArray[np.float64]
NAMES = ("l2", "kl", "js", "cosine")
each_distance = pytest.mark.parametrize("name", NAMES)


def distance(name: str, model: Tensor, expert: Tensor) -> Tensor:
    return DISTANCES.get(name, where="test")(model, expert)


def logits(seed: int, positions: int = 6, vocabulary: int = 50, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(positions, vocabulary, generator=generator) * scale
    return first, first + torch.randn(positions, vocabulary, generator=generator)


def _log_probabilities(row: Array) -> Array:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def _kl(p: Array, q: Array) -> float:
    return float((np.exp(p) * (p - q)).sum())


def _js(model: Array, expert: Array) -> float:
    p, q = _log_probabilities(model), _log_probabilities(expert)
    middle = np.log((np.exp(p) + np.exp(q)) / 2)
    return (_kl(p, middle) + _kl(q, middle)) / 2


ORACLES: dict[str, Callable[[Array, Array], float]] = {
    "l2": lambda model, expert: math.sqrt(((model - expert) ** 2).sum()),
    "kl": lambda model, expert: _kl(_log_probabilities(expert), _log_probabilities(model)),
    "js": _js,
    "cosine": lambda model, expert: (
        1 - float(model @ expert) / math.sqrt(float(model @ model) * float(expert @ expert))
    ),
}


@each_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_each_distance_is_its_formula(name: str, dtype: torch.dtype, scale: float) -> None:
    """One float64 number a position, from logits of any float dtype taken as they are."""
    for seed in range(5):
        model, expert = (part.to(dtype) for part in logits(seed, scale=scale))
        got = distance(name, model, expert)
        assert got.dtype == torch.float64
        assert got.shape == (6,)
        expected = [ORACLES[name](m, e) for m, e in zip(model.double().numpy(), expert.double().numpy(), strict=True)]
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-13)


@each_distance
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_a_model_is_at_no_distance_from_itself(name: str, scale: float) -> None:
    model, _ = logits(1, positions=200, scale=scale)
    got = distance(name, model, model.clone())
    assert float(got.abs().max()) <= 1e-14


@each_distance
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_no_distance_is_negative(name: str, scale: float) -> None:
    """Not even by a rounding error: tau is formed from sums of distances."""
    model, expert = logits(2, positions=300, scale=scale)
    for other in (model, expert, model * 2.0, model + 1e-6):
        assert float(distance(name, model, other).min()) >= 0.0


@pytest.mark.parametrize("name", ["l2", "js", "cosine"])
def test_symmetric_distances_are_symmetric(name: str) -> None:
    model, expert = logits(3)
    np.testing.assert_allclose(distance(name, model, expert), distance(name, expert, model), rtol=1e-12)


def test_kl_is_from_the_expert_to_the_model() -> None:
    """KL(expert || model): what is lost by predicting the expert's tokens with the model. By hand for two tokens."""
    model, expert = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert float(distance("kl", model, expert)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert float(distance("kl", expert, model)) == pytest.approx(-0.5 * math.log(0.75), rel=1e-6)


@pytest.mark.parametrize("name", ["kl", "js"])
def test_divergences_do_not_see_a_shift_of_all_logits(name: str) -> None:
    """They compare distributions; l2 and cosine compare vectors."""
    model, expert = logits(4)
    shifted = distance(name, model.double() + 7.0, expert.double() - 3.0)
    np.testing.assert_allclose(shifted, distance(name, model, expert), rtol=1e-9)


def test_js_is_at_most_ln_2() -> None:
    """And reaches it for distributions that share nothing."""
    model, expert = torch.full((1, 4), -500.0), torch.full((1, 4), -500.0)
    model[0, 0] = expert[0, 1] = 500.0
    assert float(distance("js", model, expert)) == pytest.approx(math.log(2.0), rel=1e-12)
    random, other = logits(5, positions=300, scale=40.0)
    assert float(distance("js", random, other).max()) <= math.log(2.0) * (1 + 1e-12)


@each_distance
def test_extreme_logits_stay_finite(name: str) -> None:
    model, expert = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert torch.isfinite(distance(name, model, expert)).all()


def test_cosine_is_blind_to_length_and_l2_is_not() -> None:
    model, expert = logits(6)
    np.testing.assert_allclose(distance("cosine", model * 8, expert), distance("cosine", model, expert), rtol=1e-12)
    np.testing.assert_allclose(distance("l2", model * 8, expert * 8), 8 * distance("l2", model, expert), rtol=1e-12)
    assert float(distance("cosine", model, -model).min()) == pytest.approx(2.0)


@each_distance
def test_positions_are_independent(name: str) -> None:
    """Each position alone gives what it gives among others."""
    model, expert = logits(7)
    whole = distance(name, model, expert)
    for place in range(6):
        alone = distance(name, model[place : place + 1], expert[place : place + 1])
        np.testing.assert_allclose(alone, whole[place : place + 1], rtol=1e-13)
