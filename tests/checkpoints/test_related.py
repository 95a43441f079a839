"""Whether models have a common origin, told from a few blocks of their matrices."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.related import LIMIT, distances_from, is_same, sampled
from tests.builders import tiny_llama, write_checkpoint

BIG = 300_001


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(folder: Path, tensors: dict[str, torch.Tensor]) -> ModelFolder:
    return ModelFolder(write_checkpoint(folder, tensors))


def test_the_ratio_is_that_of_the_norms(tmp_path: Path) -> None:
    """Of matrices that fit into the blocks whole; vectors do not count, though norms near 1 would halve it."""
    base = {"a.weight": random(0, 30, 20), "b.weight": random(1, 7, 5), "norm.weight": torch.full((4000,), 9.0)}
    delta = {name: 0.3 * random(number + 2, *each.shape) for number, (name, each) in enumerate(base.items())}
    expert = {name: each + delta[name] for name, each in base.items()}
    expert["other.weight"] = random(9, 3, 3)
    with model(tmp_path / "base", base) as origin, model(tmp_path / "a", expert) as other:
        found = distances_from(origin, {"a": other, "itself": origin})
    both = [
        math.sqrt(sum(float(each[name].double().square().sum()) for name in ("a.weight", "b.weight")))
        for each in (delta, base)
    ]
    assert found["itself"] == 0.0
    assert found["a"] == pytest.approx(both[0] / both[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_without_a_common_origin_stand_at_the_root_of_two(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of any size and dtype; a strongly trained one stays below the limit."""
    base = {"w.weight": random(0, 1, BIG)}
    tuned = {"w.weight": (base["w.weight"] + 0.8 * random(1, 1, BIG)).to(dtype)}
    stranger = {"w.weight": random(2, 1, BIG).to(dtype)}
    with (
        model(tmp_path / "base", base) as origin,
        model(tmp_path / "tuned", tuned) as near,
        model(tmp_path / "stranger", stranger) as far,
    ):
        found = distances_from(origin, {"tuned": near, "stranger": far})
    assert found["tuned"] == pytest.approx(0.8, abs=0.03)
    assert found["stranger"] == pytest.approx(math.sqrt(2), abs=0.03)
    assert found["tuned"] < LIMIT < found["stranger"]


def test_two_random_models_are_strangers(tmp_path: Path) -> None:
    for seed in range(2):
        tiny_llama(seed).save_pretrained(tmp_path / str(seed))
    with ModelFolder(tmp_path / "0") as one, ModelFolder(tmp_path / "1") as other:
        assert distances_from(one, {"x": other})["x"] > 1.2


@pytest.mark.parametrize("elements", [1, 2047, 2048, 2049, 32768, 32769, BIG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_lie_at_the_same_elements_whatever_the_dtype(tmp_path: Path, elements: int, dtype: torch.dtype) -> None:
    """From the first to the last; at most 16 blocks of 2048."""
    values = torch.arange(elements).remainder(251).to(dtype)
    with model(tmp_path / "m", {"w": values}) as source:
        found = sampled(source, "w")
    assert len(found) == min(elements, 16 * 2048)
    assert (found[0], found[-1]) == (0, (elements - 1) % 251)
    if elements <= 32768:
        np.testing.assert_array_equal(found, values.float().numpy())


def test_what_cannot_be_measured_is_left_out(tmp_path: Path) -> None:
    """A base of zeros, other shapes, numbers that are not finite: others tell of these, by name."""
    ones, zeros, nan = torch.ones(4, 4), torch.zeros(4, 4), torch.full((4, 4), math.nan)
    with (
        model(tmp_path / "ones", {"w": ones}) as one,
        model(tmp_path / "zeros", {"w": zeros}) as zero,
        model(tmp_path / "nan", {"w": nan}) as broken,
        model(tmp_path / "wide", {"w": torch.ones(4, 5)}) as wide,
    ):
        assert distances_from(zero, {"x": one}) == {}
        assert distances_from(one, {"wide": wide, "nan": broken, "zero": zero}) == {"zero": 1.0}


def test_two_tensors_are_the_same_only_if_every_number_is(tmp_path: Path) -> None:
    """A difference between the sampled blocks is found too."""
    values = random(0, 1, BIG)
    changed = values.clone()
    changed[0, 3000] += 1
    tensors = {
        "a": values,
        "b": values.clone(),
        "changed": changed,
        "half": values.half().float(),
        "i": torch.ones(1, BIG).int(),
    }
    with model(tmp_path / "m", tensors) as source:
        assert np.array_equal(sampled(source, "a"), sampled(source, "changed"))
        assert is_same(source, "a", "b")
        assert not any(is_same(source, "a", other) for other in ("changed", "half", "i"))
