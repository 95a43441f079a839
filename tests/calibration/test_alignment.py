"""Distances between experts, eq. 4, against full float64 logits; and how many models are held."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from sensmerge.calibration.alignment import compared_positions, pairwise_distances
from sensmerge.distances import DISTANCES
from sensmerge.errors import NonFiniteError
from sensmerge.records import CalibrationSet
from tests.builders import VOCABULARY, tiny_llama


def task(seed: int, count: int = 2) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    lengths = [4 + 3 * k + seed for k in range(count)]
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    masks = [[0] * (length // 2) + [1] * (length - length // 2) for length in lengths]
    return CalibrationSet(tuple(range(count)), tuple(map(tuple, ids)), tuple(map(tuple, masks)), "response", 0)


def measure(models: list[Any], tasks: list[CalibrationSet], distance: str = "l2", positions: str = "all") -> list[Any]:
    names = [f"m{i}" for i in range(len(models))]
    return pairwise_distances(lambda i: models[i], names, tasks, DISTANCES.get(distance, where="test"), positions)


@cache
def logits64(seed: int, ids: tuple[int, ...]) -> Any:
    """All logits of `expert(seed)` in float64."""
    with torch.no_grad():
        return copy.deepcopy(expert(seed)).double()(input_ids=torch.tensor([ids])).logits[0].numpy()


def places(mask: tuple[int, ...], positions: str) -> list[int]:
    """DESIGN section 4: every token; those that predict a loss token; the end of the prompt."""
    predicting = [t - 1 for t in range(len(mask)) if mask[t]]
    return {"all": list(range(len(mask))), "loss": predicting, "last": [min(predicting)]}[positions]


@cache
def expert(seed: int) -> Any:
    return tiny_llama(seed)


@pytest.mark.parametrize("positions", ["all", "loss", "last"])
@pytest.mark.parametrize("experts", [2, 3, 4])
def test_distances_are_eq_4(experts: int, positions: str) -> None:
    """per_sample[i][j][k]: model i against expert j on task j's sample k; the diagonal is zero."""
    models = [expert(seed) for seed in range(experts)]
    tasks = [task(seed, count=1 + seed % 3) for seed in range(experts)]
    got = measure(models, tasks, positions=positions)
    for i in range(experts):
        for j in range(experts):
            assert len(got[i][j]) == len(tasks[j].rows)
            for k, (ids, mask) in enumerate(zip(tasks[j].token_ids, tasks[j].loss_mask, strict=True)):
                difference = (logits64(i, ids) - logits64(j, ids))[places(mask, positions)]
                expected = float(np.mean(np.sqrt((difference**2).sum(axis=1))))
                assert got[i][j][k] == pytest.approx(expected, rel=1e-5, abs=0.0 if i == j else 1e-9)


def test_a_distance_that_is_not_symmetric_is_from_the_task_s_expert() -> None:
    """kl on task j is KL(expert j || model i)."""
    models, tasks = [expert(0), expert(1)], [task(0), task(1)]
    got = measure(models, tasks, "kl")
    for i, j in ((0, 1), (1, 0)):
        for k, ids in enumerate(tasks[j].token_ids):
            theirs, ours = (torch.log_softmax(torch.tensor(logits64(n, ids)), -1) for n in (j, i))
            expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
            assert got[i][j][k] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distance", ["l2", "kl", "js", "cosine"])
def test_equal_models_stand_together(distance: str) -> None:
    got = measure([tiny_llama(0), tiny_llama(0)], [task(0), task(1)], distance)
    assert max(abs(value) for row in got for cell in row for value in cell) < 1e-12


def test_one_expert_has_no_distance() -> None:
    """And is not even loaded."""
    got = pairwise_distances(
        lambda i: pytest.fail("loaded"), ["m"], [task(0)], DISTANCES.get("l2", where="test"), "all"
    )
    assert got == [[[0.0, 0.0]]]


@pytest.mark.parametrize("experts", [2, 4])
def test_at_most_two_models_are_held_at_once(experts: int) -> None:
    """Counted through weak references at the moment a further model is asked for."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def load(index: int) -> Any:
        nonlocal most
        model = tiny_llama(index)
        alive.add(model)
        most = max(most, len(alive))
        return model

    names, tasks = [f"m{i}" for i in range(experts)], [task(0, count=1)] * experts
    pairwise_distances(load, names, tasks, DISTANCES.get("l2", where="test"), "last")
    assert most == 2
    gc.collect()  # what an exception's frames or torch's caches may still hold
    assert len(alive) == 0, "none is kept afterwards"


def test_exchanging_two_experts_exchanges_their_distances() -> None:
    """Bit for bit: the order of a recipe does not matter."""
    models, tasks = [expert(seed) for seed in range(3)], [task(seed) for seed in range(3)]
    one = measure(models, tasks)
    order = [2, 0, 1]
    two = measure([models[i] for i in order], [tasks[i] for i in order])
    assert two == [[one[i][j] for j in order] for i in order]


@pytest.mark.parametrize(
    ("mask", "positions", "expected"),
    [
        ((0, 0, 0, 1, 1), "all", [0, 1, 2, 3, 4]),
        ((0, 0, 0, 1, 1), "loss", [2, 3]),
        ((0, 0, 0, 1, 1), "last", [2]),
        ((0, 1, 1), "loss", [0, 1]),
        ((0, 1, 1), "last", [0]),
        ((0, 0, 1), "last", [1]),
        ((0, 1, 0, 1), "loss", [0, 2]),
        ((0, 1), "all", [0, 1]),
    ],
)
def test_compared_positions(mask: tuple[int, ...], positions: str, expected: list[int]) -> None:
    """`last` predicts the first loss token: the end of the prompt, or the first token of a sample without one."""
    assert list(compared_positions(mask, positions)) == expected


@pytest.mark.parametrize("bad", [0, 1])
def test_a_weight_that_is_not_finite_is_named(bad: int) -> None:
    models = [tiny_llama(0), tiny_llama(1)]
    with torch.no_grad():
        models[bad].model.layers[0].mlp.up_proj.weight[1, 2] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        measure(models, [task(0), task(1)])
    assert "model.layers.0.mlp.up_proj.weight" in caught.value.where
    assert f"m{bad}" in caught.value.where
    assert "[1, 2]" in caught.value.where


def test_no_gradient_is_kept() -> None:
    models = [expert(0), expert(1)]
    measure(models, [task(0), task(1)])
    assert all(parameter.grad is None for model in models for parameter in model.parameters())


def test_many_positions_are_taken_in_parts_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on logits at once is about memory alone."""
    models, tasks = [expert(0), expert(1)], [task(0), task(1)]
    whole = measure(models, tasks)
    monkeypatch.setattr("sensmerge.calibration.alignment.LOGITS_AT_ONCE", VOCABULARY * 2)
    np.testing.assert_allclose(measure(models, tasks)[0][1], whole[0][1], rtol=1e-14)
