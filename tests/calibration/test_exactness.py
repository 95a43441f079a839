"""Eq. 1 of many samples at once, whole or a block at a time, against plain autograd a sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sensmerge.calibration.measure import MeasuredModel
from sensmerge.calibration.scores import FisherScore, TaskVectorScore, WeightScore
from tests.calibration.families import (
    FAMILIES,
    by_parameter,
    loop,
    measured_model,
    picked,
    samples,
    saved,
    sums_of,
    tiny,
)

MODES = ("resident", "streamed")


def close(got: list[dict[str, float]], expected: list[dict[str, float]], rel: float) -> None:
    """Every sample and tensor. One that gets next to nothing is compared with the sample's whole."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert set(ours) == set(theirs)
        rounding = 1e-9 * sum(theirs.values())
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=rel, abs=rounding), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_sum_is_that_of_a_loop_over_samples(family: str, tmp_path: Path) -> None:
    """Padded batches, tied matrices, biases, Conv1D, 1 + weight, fused experts: in both modes, within 1e-4."""
    model, data = tiny(family), samples()
    checkpoint, expected = saved(model, tmp_path), loop(model, data)
    found = {}
    for memory in MODES:
        measured = measured_model(checkpoint, memory)
        assert measured.streamed is (memory == "streamed")
        found[memory] = sums_of(measured, data)
        close([by_parameter(measured, sums) for sums in found[memory]], expected, 1e-4)
    close(found["streamed"], found["resident"], 1e-5)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("score", ["weight", "task_vector", "fisher"])
def test_scores_in_float64(score: str, tied: bool, memory: str, tmp_path: Path) -> None:
    """|theta g|, |delta g| and g squared; a tied matrix once, with both its uses."""
    family = "llama-tied" if tied else "llama"
    model, base, data = tiny(family), tiny(family, seed=1), samples()
    start = {name: value.detach().double() for name, value in base.named_parameters()}
    formulas: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {
        "weight": lambda _, w, g: (w * g).abs(),
        "task_vector": lambda name, w, g: ((w - start[name]) * g).abs(),
        "fisher": lambda _, w, g: g * g,
    }
    tuned = {name: value.detach() for name, value in model.named_parameters()}

    def rows(name: str, first: int, count: int) -> Tensor:
        delta = tuned[name] - start[name].float()
        return delta.reshape(len(delta) if delta.dim() > 1 else 1, -1)[first : first + count]

    scores = {"weight": WeightScore(), "task_vector": TaskVectorScore(rows), "fisher": FisherScore()}
    got = sums_of(measured_model(saved(model, tmp_path), memory), data, scores[score])
    expected = loop(copy.deepcopy(model).double(), data, formulas[score])
    assert ("lm_head.weight" in got[0]) is (not tied)
    close(got, expected, 1e-4)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "mixtral"])
def test_a_sample_does_not_depend_on_its_company(family: str, memory: str, tmp_path: Path) -> None:
    """Neither on what else is in the batch, nor on its order, nor on how much padding that means."""
    measured, data = measured_model(saved(tiny(family), tmp_path), memory), samples((7, 30, 12, 12, 5))
    together = sums_of(measured, data)
    close([sums_of(measured, picked(data, [at]))[0] for at in range(5)], together, 1e-4)
    close(sums_of(measured, picked(data, [4, 2, 0, 1, 3])), [together[at] for at in (4, 2, 0, 1, 3)], 1e-4)
    close(sums_of(measured, data, places=[3, 1]), [together[3], together[1]], 1e-4)


def test_the_absolute_value_is_taken_per_sample_and_per_weight(tmp_path: Path) -> None:
    """DESIGN: sum_k |theta g_k|, never |theta sum_k g_k|: here the two are far apart."""
    model, data = tiny("llama"), samples((9, 9, 9, 9))
    ours = sum(sum(sums.values()) for sums in sums_of(measured_model(saved(model, tmp_path)), data))
    gradients: dict[str, Any] = {}

    def keep(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        gradients[name] = gradients.get(name, 0.0) + gradient.clone()
        return weight

    loop(model, data, keep)
    of_the_sum = sum(
        float((weight.detach() * gradients[name]).abs().sum()) for name, weight in model.named_parameters()
    )
    assert ours > 1.2 * of_the_sum


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2"])
def test_common_families_need_no_loop(family: str, tmp_path: Path) -> None:
    paths = counted(measured_model(saved(tiny(family), tmp_path)))
    assert paths["loop"] == 0
    assert paths["batched"] > 10


def test_modules_measured_a_sample_at_a_time_are_counted(tmp_path: Path) -> None:
    """Mixtral: the fused experts and the router of each of two layers, and nothing else."""
    assert counted(measured_model(saved(tiny("mixtral"), tmp_path)))["loop"] == 4


def counted(measured: MeasuredModel) -> dict[str, int]:
    found: dict[str, int] = {}
    with measured.held():
        measured.sums(samples((5,)), WeightScore(), places=[0], save=lambda _, paths: found.update(paths))
    return found


@pytest.mark.parametrize("memory", MODES)
def test_computing_in_bfloat16(memory: str, tmp_path: Path) -> None:
    """The weights are held in bfloat16, sums are formed in float32: within a few roundings of the exact ones."""
    model, data = tiny("llama").to(torch.bfloat16), samples()
    checkpoint = saved(model, tmp_path)
    got = sums_of(measured_model(checkpoint, memory, compute_dtype="bfloat16"), data)
    exact = loop(copy.deepcopy(model).double(), data)
    for ours, theirs in zip(got, exact, strict=True):
        assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=0.05)
        assert set(ours) == set(theirs)
    in_float32 = sums_of(measured_model(checkpoint, memory), data)
    close(in_float32, exact, 1e-4)
