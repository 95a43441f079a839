"""Draws keyed by place: the same in any order, uniform, and unrelated between keys."""

from __future__ import annotations

import numpy as np
import pytest

from sensmerge.randomness import key, uniforms


def test_any_piece_is_a_piece_of_the_whole() -> None:
    whole = uniforms(3, "org/chat", "model.layers.0.w", 0, 10_000)
    for start, count in ((0, 1), (17, 900), (9_999, 1), (5_000, 5_000), (3, 0)):
        assert np.array_equal(uniforms(3, "org/chat", "model.layers.0.w", start, count), whole[start : start + count])


def test_draws_are_as_they_always_were() -> None:
    """A merge must be the same in every version: these numbers were drawn once and are kept."""
    assert key(0, "chat", "w") == (3959824284, 435709150)
    assert (uniforms(0, "chat", "w", 0, 3) * 2**32).tolist() == [1122739681, 3086649749, 646385957]


def test_draws_are_uniform() -> None:
    draws = uniforms(0, "a", "w", 0, 1 << 20)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=1024, range=(0, 1))[0]
    chi = float(np.sum((counts - 1024.0) ** 2) / 1024.0)
    assert 1023 - 5 * 45.2 < chi < 1023 + 5 * 45.2
    for bit in range(32):
        share = np.mean((draws * 2**32).astype(np.uint64) >> np.uint64(bit) & np.uint64(1))
        assert share == pytest.approx(0.5, abs=5 * 0.5 / 1024)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, "a", "w"), (1, "a", "w")),
        ((0, "a", "w"), (0, "b", "w")),
        ((0, "a", "w"), (0, "a", "v")),
        ((0, "ab", "c"), (0, "a", "bc")),
    ],
)
def test_keys_are_unrelated(first: tuple[int, str, str], second: tuple[int, str, str]) -> None:
    n = 1 << 18
    one, two = uniforms(*first, 0, n), uniforms(*second, 0, n)
    for shift in (0, 1, 2, 64, 1024):
        assert abs(np.corrcoef(one[: n - shift], two[shift:])[0, 1]) < 5 / 512
    kept_both = np.mean((one < 0.3) & (two < 0.3))
    assert kept_both == pytest.approx(0.09, abs=0.003)


def test_neighbours_are_unrelated() -> None:
    n = 1 << 20
    draws = uniforms(0, "a", "w", 0, n)
    for lag in (1, 2, 3, 4, 8, 16, 64, 128, 1024, 4096, 65536):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 5 / 1024, lag
    # Runs of drops are geometric: no long empty stretches in a row of weights.
    kept = np.flatnonzero(draws < 0.1)
    assert np.diff(kept).mean() == pytest.approx(10, abs=0.2)
    assert np.diff(kept).std() == pytest.approx(np.sqrt(90), abs=0.3)


def test_tensors_beyond_32_bits_go_on() -> None:
    edge = 1 << 32
    around = uniforms(0, "a", "w", edge - 500, 1000)
    assert np.array_equal(around[500:], uniforms(0, "a", "w", edge, 500))
    assert not np.array_equal(uniforms(0, "a", "w", 0, 500), around[500:])
    assert abs(np.corrcoef(uniforms(0, "a", "w", 0, 100_000), uniforms(0, "a", "w", edge, 100_000))[0, 1]) < 5 / 316
