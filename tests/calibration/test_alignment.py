"""Distances between experts, eq. 4: from hidden states and output heads, against full logits in float64."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sensmerge.calibration import alignment
from sensmerge.calibration.alignment import compared_positions, mean_distances
from sensmerge.calibration.heads import Head
from sensmerge.calibration.measure import MeasuredModel
from sensmerge.distances import DISTANCES
from sensmerge.errors import IncompatibleModelsError
from sensmerge.records import CalibrationSet
from tests.calibration.families import VOCABULARY, config, measured_model, samples, saved, tiny
from tests.calibration.toys import LouderConfig, LouderForCausalLM

NAMES = ("l2", "kl", "js", "cosine")


def distance64(name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """By position, from logits [T, V] in float64: model i, then the expert whose task it is."""
    if name == "l2":
        return (ours - theirs).square().sum(-1).sqrt()
    if name == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    q, p = ours.softmax(-1), theirs.softmax(-1)
    if name == "kl":
        return (p * (p / q).log()).sum(-1)
    middle = (p + q) / 2
    return ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2


@cache
def logits64(family: str, seed: int, ids: tuple[int, ...], **changes: Any) -> Tensor:
    """All logits of the model in float64: nothing of ours."""
    with torch.no_grad():
        return copy.deepcopy(tiny(family, seed, **changes)).double()(input_ids=torch.tensor([ids])).logits[0]


def places(mask: tuple[int, ...], positions: str) -> list[int]:
    """DESIGN section 4: every token; those that predict a loss token; the end of the prompt."""
    predicting = [t - 1 for t in range(len(mask)) if mask[t]]
    return {"all": list(range(len(mask))), "loss": predicting, "last": [min(predicting)]}[positions]


def hidden_of(measured: MeasuredModel, data: CalibrationSet, positions: str = "all") -> list[Tensor]:
    found: dict[int, Tensor] = {}
    with measured.held():
        measured.check_head(data)
        measured.hidden(data, places=range(len(data.rows)), keep=found.__setitem__, task="x")
    return [found[at][compared_positions(data.loss_mask[at], positions)] for at in range(len(data.rows))]


def distances(
    ours: MeasuredModel, theirs: MeasuredModel, data: CalibrationSet, name: str, positions: str = "all"
) -> list[float]:
    distance = DISTANCES.get(name, where="test")
    one, other = hidden_of(ours, data, positions), hidden_of(theirs, data, positions)
    return mean_distances(one, ours.head(), other, theirs.head(), distance)


def expected(family: str, data: CalibrationSet, name: str, positions: str) -> list[float]:
    found = []
    for ids, mask in zip(data.token_ids, data.loss_mask, strict=True):
        each = distance64(name, logits64(family, 0, ids), logits64(family, 1, ids))
        found.append(float(each[places(mask, positions)].mean()))
    return found


@pytest.mark.parametrize("positions", ["all", "loss", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_distances_are_eq_4(name: str, positions: str, tmp_path: Path) -> None:
    models = [measured_model(saved(tiny("llama", seed), tmp_path / str(seed))) for seed in (0, 1)]
    data = samples()
    got = distances(models[0], models[1], data, name, positions)
    assert got == pytest.approx(expected("llama", data, name, positions), rel=1e-4)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("name", ["l2", "kl"])
@pytest.mark.parametrize(
    "family", ["gemma2", "granite", "cohere", "phi", "gpt2", "llama-tied", "opt", "falcon", "mamba"]
)
def test_families_that_change_their_logits(family: str, name: str, memory: str, tmp_path: Path) -> None:
    """Soft caps (Gemma 2), scales (Granite, Cohere), heads with a bias (Phi), tied ones."""
    models = [measured_model(saved(tiny(family, seed), tmp_path / str(seed)), memory) for seed in (0, 1)]
    data = samples((5, 9))
    got = distances(models[0], models[1], data, name)
    assert got == pytest.approx(expected(family, data, name, "all"), rel=1e-4)


def test_the_families_do_change_their_logits() -> None:
    """Else the test before would show nothing."""
    assert config("gemma2").final_logit_softcapping
    assert config("granite").logits_scaling != 1
    assert config("cohere").logit_scale != 1
    assert tiny("phi").lm_head.bias is not None


def test_a_soft_cap_that_bites(tmp_path: Path) -> None:
    """Logits of many times the cap."""
    models = [
        measured_model(saved(tiny("gemma2", seed, final_logit_softcapping=0.5), tmp_path / str(seed)))
        for seed in (0, 1)
    ]
    data = samples((5, 9))
    got = distances(models[0], models[1], data, "l2")
    for at, ids in enumerate(data.token_ids):
        ours, theirs = (logits64("gemma2", seed, ids, final_logit_softcapping=0.5) for seed in (0, 1))
        assert ours.abs().max() > 0.49
        assert got[at] == pytest.approx(float(distance64("l2", ours, theirs).mean()), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_models_of_unlike_vocabulary_are_compared_in_their_common_rows(name: str, tmp_path: Path) -> None:
    """Added tokens of one expert: the others know nothing of them."""
    longer = tiny("llama", 1, vocab_size=VOCABULARY + 5)
    models = [
        measured_model(saved(tiny("llama", 0), tmp_path / "0")),
        measured_model(saved(longer, tmp_path / "1")),
    ]
    data = samples()
    for got, order in ((distances(*models, data, name), 1), (distances(models[1], models[0], data, name), -1)):
        for at, ids in enumerate(data.token_ids):
            with torch.no_grad():
                long = copy.deepcopy(longer).double()(input_ids=torch.tensor([ids])).logits[0][:, :VOCABULARY]
            pair = (logits64("llama", 0, ids), long)[::order]
            assert got[at] == pytest.approx(float(distance64(name, *pair).mean()), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_a_slice_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is about memory alone."""
    models = [measured_model(saved(tiny("llama", seed), tmp_path / str(seed))) for seed in (0, 1)]
    whole = distances(models[0], models[1], samples(), name)
    monkeypatch.setattr(alignment, "SLICE_BYTES", 8 * 38 * 7)
    assert distances(models[0], models[1], samples(), name) == pytest.approx(whole, rel=1e-6)


def test_scratch_does_not_grow_with_the_vocabulary() -> None:
    """No more rows of a head are asked for than fit the limit, however large the vocabulary."""
    asked: list[int] = []

    def rows(first: int, last: int) -> Tensor:
        asked.append(last - first)
        return torch.ones(last - first, 4)

    positions, vocabulary = 4096, 1 << 14
    hidden = [torch.ones(positions, 4)]
    head = Head(vocabulary, rows)
    [found] = mean_distances(hidden, head, [2 * hidden[0]], head, DISTANCES.get("l2", where="test"))
    assert found == pytest.approx(4.0 * vocabulary**0.5, rel=1e-6)
    assert max(asked) * positions * 8 <= alignment.SLICE_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_equal_models_stand_together(name: str, tmp_path: Path) -> None:
    model = measured_model(saved(tiny("llama"), tmp_path))
    assert max(map(abs, distances(model, model, samples(), name))) < 1e-7


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_family_that_changes_its_logits_in_an_unknown_way_is_refused(memory: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = {key: value for key, value in config("llama").to_dict().items() if key != "model_type"}
    measured = measured_model(saved(LouderForCausalLM(LouderConfig(**values)), tmp_path), memory)
    with measured.held(), pytest.raises(IncompatibleModelsError) as caught:
        measured.check_head(samples())
    assert "expert" in caught.value.where
    assert "alpha_only" in caught.value.fix


@pytest.mark.parametrize(
    ("mask", "positions", "expected_positions"),
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
def test_compared_positions(mask: tuple[int, ...], positions: str, expected_positions: list[int]) -> None:
    """`last` predicts the first loss token: the end of the prompt, or the first token of a sample without one."""
    assert list(compared_positions(mask, positions)) == expected_positions
