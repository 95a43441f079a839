"""The factors: alpha (eq. 3) and tau (eq. 5), and what they are where nothing was measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sensmerge.rules.factors import cross_task, task_specific

Array = NDArray[np.float64]


def distances(seed: int, experts: int | None = None) -> Array:
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 9)) if experts is None else experts
    g = random.exponential(size=(size, size)) * 10.0 ** random.integers(-6, 7)
    np.fill_diagonal(g, 0.0)
    return g


@pytest.mark.parametrize("seed", range(20))
def test_alpha_is_s_over_its_norm(seed: int) -> None:
    random = np.random.default_rng(seed)
    s = random.exponential(size=int(random.integers(1, 60))) * 10.0 ** random.integers(-12, 12)
    alpha = task_specific(s)
    np.testing.assert_allclose(alpha, s / np.linalg.norm(s), rtol=1e-14)
    assert math.fsum(a * a for a in alpha) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("layers", [1, 2, 7, 32])
def test_alpha_of_nothing_is_even(layers: int) -> None:
    """DESIGN: s = 0 gives 1/sqrt(L)."""
    assert task_specific(np.zeros(layers)).tolist() == [1 / math.sqrt(layers)] * layers


@pytest.mark.parametrize("power", [-40, -8, 8, 40])
def test_alpha_does_not_see_the_number_of_samples(power: int) -> None:
    """Sums over twice the samples, twice as large: the same alpha, bit for bit."""
    s = np.random.default_rng(power + 50).exponential(size=12)
    assert task_specific(s * 2.0**power).tobytes() == task_specific(s).tobytes()


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_alpha_keeps_its_meaning_at_extreme_scales(scale: float) -> None:
    """Only s = 0 is degenerate: a tiny or huge s has its direction still."""
    np.testing.assert_allclose(task_specific(np.array([3.0, 4.0]) * scale), [0.6, 0.8], rtol=1e-12)


def test_alpha_keeps_zero_layers_at_zero() -> None:
    assert task_specific(np.array([0.0, 2.0, 0.0])).tolist() == [0.0, 1.0, 0.0]


def _tau(g: Array, axis: str, direction: str) -> list[float]:
    """Eq. 5 by its definition."""
    size = len(g)
    sums = [sum(g[i][j] if axis == "row" else g[j][i] for j in range(size) if j != i) for i in range(size)]
    parts = sums if direction == "distance" else [1 / part for part in sums]
    return [part / sum(parts) for part in parts]


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("direction", ["distance", "similarity"])
def test_tau_is_its_formula(axis: str, direction: str) -> None:
    for seed in range(50):
        g = distances(seed)
        tau = cross_task(g, axis, direction)
        np.testing.assert_allclose(tau, _tau(g, axis, direction), rtol=1e-13)
        assert math.fsum(tau) == pytest.approx(1.0, abs=1e-14)


def test_the_default_is_the_row_of_distances() -> None:
    """Row i is model i on the others' samples; the farthest gets the most."""
    g = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(cross_task(g), np.array([3.0, 7.0, 1.0]) / 11.0, rtol=1e-15)
    np.testing.assert_allclose(cross_task(g, "column"), np.array([3.5, 1.5, 6.0]) / 11.0, rtol=1e-15)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("direction", ["distance", "similarity"])
def test_tau_permutes_with_the_experts_bit_for_bit(axis: str, direction: str) -> None:
    for seed in range(200):
        g = distances(seed)
        order = np.random.default_rng(seed + 7).permutation(len(g))
        moved = cross_task(g[np.ix_(order, order)], axis, direction)
        assert moved.tobytes() == cross_task(g, axis, direction)[order].tobytes()


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("direction", ["distance", "similarity"])
@pytest.mark.parametrize("experts", [1, 2, 3, 8])
def test_tau_of_nothing_is_even(experts: int, axis: str, direction: str) -> None:
    """DESIGN: K = 1 or all g = 0 gives 1/K."""
    assert cross_task(np.zeros((experts, experts)), axis, direction).tolist() == [1 / experts] * experts


def test_the_diagonal_does_not_count() -> None:
    """The sum of eq. 5 leaves j = i out, whatever stands there."""
    g = distances(4)
    with_diagonal = g + np.diag(np.full(len(g), 1e6))
    assert cross_task(with_diagonal).tobytes() == cross_task(g).tobytes()


def test_similarity_with_experts_at_distance_zero() -> None:
    """The limit: one at distance zero takes all, several share it."""
    one = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    assert cross_task(one, "row", "similarity").tolist() == [1.0, 0.0, 0.0]
    two = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    assert cross_task(two, "row", "similarity").tolist() == [0.5, 0.5, 0.0]


def test_similarity_turns_the_order_round() -> None:
    for seed in range(20):
        g = distances(seed)
        near, far = cross_task(g, "row", "similarity"), cross_task(g, "row", "distance")
        assert np.argsort(near).tolist() == np.argsort(far)[::-1].tolist()


def test_with_two_experts_tau_only_compares_the_two_data_sets() -> None:
    """DESIGN's remark on K = 2: row and column are each other's mirror."""
    g = distances(9, experts=2)
    assert cross_task(g, "row").tolist() == cross_task(g, "column")[::-1].tolist()
