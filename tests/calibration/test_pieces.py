"""The small parts: losses of a batch, batches by length, activations in a scratch file, scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sensmerge.calibration.activations import Activations
from sensmerge.calibration.batches import Batch, batch_of, by_length
from sensmerge.calibration.scores import FisherScore, WeightScore
from tests.calibration.families import samples


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_s_loss_is_the_sum_of_its_samples_means(seed: int) -> None:
    """Each sample's mean over its loss tokens, token t from position t - 1; padding has no part in it."""
    data = samples((5, 11, 8), seed)
    batch = batch_of(data, [2, 0, 1], "cpu")
    logits = torch.randn(3, 11, 67, generator=torch.Generator().manual_seed(seed)) * 4
    total = 0.0
    for row, at in enumerate((2, 0, 1)):
        ids, mask = data.token_ids[at], data.loss_mask[at]
        terms = [-torch.log_softmax(logits[row, t - 1].double(), -1)[ids[t]] for t in range(1, len(ids)) if mask[t]]
        total += float(sum(terms)) / len(terms)
    assert float(batch.loss(logits)) == pytest.approx(total, rel=1e-6)
    assert batch.loss(logits.bfloat16()).dtype == torch.float32
    assert batch.real.tolist() == [[int(t < length) for t in range(11)] for length in (8, 5, 11)]


def test_a_part_of_a_batch() -> None:
    batch = batch_of(samples((5, 11, 8)), [0, 1, 2], "cpu")
    part: Batch = batch.slice(1, 3)
    assert part.lengths == (11, 8)
    assert torch.equal(part.ids, batch.ids[1:])


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 120))
def test_batches_by_length(lengths: list[int], tokens: int) -> None:
    """Every sample once; no batch is larger than asked for unless it is one sample; the largest come first."""
    data = samples(tuple(lengths))
    groups = list(by_length(data, range(len(lengths)), tokens))
    assert sorted(at for group in groups for at in group) == list(range(len(lengths)))
    padded = [len(group) * max(lengths[at] for at in group) for group in groups]
    assert all(size <= tokens or len(group) == 1 for size, group in zip(padded, groups, strict=True))
    longest = [max(lengths[at] for at in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("limit", [0, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_come_back_as_they_were(dtype: torch.dtype, limit: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    given_in = {at: torch.randn(at + 1, 5, generator=generator).to(dtype) for at in range(6)}
    with Activations(tmp_path, limit) as kept:
        for at, value in given_in.items():
            kept.put(at, value.requires_grad_(True))
        for at in (3, 0, 5):
            assert torch.equal(kept.get(at), given_in[at])
            assert not kept.get(at).requires_grad
            assert torch.equal(kept.take(at), given_in[at])
        kept.put(1, given_in[2])
        assert torch.equal(kept.get(1), given_in[2]), "the last one counts"
        with pytest.raises(KeyError):
            kept.get(3)
    assert list(tmp_path.iterdir()) == [], "the scratch file has no name and is gone"


def test_room_in_memory_is_given_back(tmp_path: Path) -> None:
    """What is taken makes room: nothing more goes to the file."""
    value = torch.ones(10)
    with Activations(tmp_path, limit=40) as kept:
        for at in range(5):
            kept.put(at, value)
            assert not kept._spilled
            kept.take(at)
        kept.put("a", value)
        kept.put("b", value)
        assert list(kept._spilled) == ["b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_rows(dtype: torch.dtype) -> None:
    """Large rows of small numbers, in float32: relative error of rounding, whatever the weight's dtype."""
    generator = torch.Generator().manual_seed(0)
    weight: Tensor = torch.randn(128, 2048, generator=generator).to(dtype)
    gradient = torch.randn(128, 2048, generator=generator) * 1e-3
    weighed = float((weight.double() * gradient.double()).abs().sum())
    squared = float(gradient.double().square().sum())
    assert float(WeightScore().of("w", weight, gradient.clone(), 0)) == pytest.approx(weighed, rel=1e-5)
    assert float(FisherScore().of("w", weight, gradient.clone(), 0)) == pytest.approx(squared, rel=1e-5)
