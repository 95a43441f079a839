"""Bootstrap intervals: they cover what is true, follow from the samples alone, and do not depend on the order of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sensmerge.records import Intervals, SensSettings
from sensmerge.rules import RULES
from sensmerge.rules.compute import Measurements, applied, compute
from sensmerge.rules.intervals import LEVEL, PerSample, bootstrap, drawn_counts
from sensmerge.rules.rule import Array, Rule

PAPER = SensSettings()


def samples(seed: int, sizes: tuple[int, ...] = (7, 5, 9), layers: int = 4) -> PerSample:
    random = np.random.default_rng(seed)
    experts = len(sizes)
    return PerSample(
        sensitivity=[random.exponential(size=(m, layers)) * (1 + i) for i, m in enumerate(sizes)],
        distances=[
            [np.zeros(m) if i == j else random.exponential(size=m) * (1 + i) for j, m in enumerate(sizes)]
            for i in range(experts)
        ],
        keys=[f"task {i}" for i in range(experts)],
    )


def measured(per_sample: PerSample) -> Measurements:
    experts = len(per_sample.keys)
    return Measurements(
        models=tuple(per_sample.keys),
        layers=tuple(f"model.layers.{at}" for at in range(per_sample.sensitivity[0].shape[1])),
        sensitivity=np.array([each.sum(axis=0) for each in per_sample.sensitivity]),
        outside={"embed": np.ones(experts)},
        distances=np.array([[each.mean() for each in row] for row in per_sample.distances]),
        inputs="here",
        per_sample=per_sample,
    )


def intervals_of(per_sample: PerSample, **settings: Any) -> Intervals:
    found = compute(
        measured(per_sample), replace(PAPER, **settings), weights=[1.0] * len(per_sample.keys), scale=1.0
    ).intervals
    assert found is not None
    return found


@pytest.mark.parametrize("rule", ["softmax", "normalized", "alpha_only", "cross_task_only", "additive", "uniform"])
@pytest.mark.parametrize(("axis", "direction"), [("row", "distance"), ("column", "similarity")])
def test_the_bootstrap_is_the_plain_one(rule: str, axis: str, direction: str) -> None:
    """The same draws, each written out: samples repeated as often as drawn, eq. 3, 5 and 6 from their sums and means."""
    per_sample = samples(1)
    settings = replace(PAPER, rule=rule, axis=axis, direction=direction, temperature=0.1)
    got = bootstrap(per_sample, RULES.get(rule, where="test"), settings, 0.1, draws=60, seed=3)
    alphas, taus, sigmas = [], [], []
    counts = [drawn_counts(len(s), key, 3, 60) for s, key in zip(per_sample.sensitivity, per_sample.keys, strict=True)]
    for b in range(60):
        drawn = [np.repeat(np.arange(count.shape[1]), count[b].astype(int)) for count in counts]
        assert [len(rows) for rows in drawn] == [7, 5, 9]
        s = np.array([each[rows].sum(axis=0) for each, rows in zip(per_sample.sensitivity, drawn, strict=True)])
        alpha = s / np.linalg.norm(s, axis=1, keepdims=True)
        g = np.array([[per_sample.distances[i][j][drawn[j]].mean() for j in range(3)] for i in range(3)])
        tau = (g if axis == "row" else g.T).sum(axis=1)
        tau = tau if direction == "distance" else 1 / tau
        tau = tau / tau.sum()
        scores = {
            "softmax": tau[:, None] * alpha / 0.1,
            "normalized": np.log(tau[:, None] * alpha),
            "alpha_only": alpha / 0.1,
            "cross_task_only": np.broadcast_to(tau[:, None], alpha.shape) / 0.1,
            "additive": (alpha / alpha.sum(axis=0) + tau[:, None]) / 0.2,
            "uniform": np.zeros_like(alpha),
        }[rule]
        powers = np.exp(scores)
        alphas.append(alpha)
        taus.append(tau)
        sigmas.append(powers / powers.sum(axis=0))
    for name, values in (("alpha", alphas), ("tau", taus), ("sigma", sigmas)):
        expected = np.moveaxis(np.percentile(values, [2.5, 97.5], axis=0), 0, -1)
        np.testing.assert_allclose(getattr(got, name), expected, rtol=1e-12, err_msg=name)


def test_draws_take_each_sample_equally_often() -> None:
    counts = drawn_counts(10, "a", 0, draws=4000)
    assert (counts.sum(axis=1) == 10).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=0.08)
    np.testing.assert_allclose(counts.var(axis=0), 0.9, atol=0.12)
    assert (drawn_counts(10, "a", 0) == drawn_counts(10, "a", 0)).all()
    assert (drawn_counts(10, "a", 0) != drawn_counts(10, "b", 0)).any()
    assert (drawn_counts(10, "a", 0) != drawn_counts(10, "a", 1)).any()


def test_intervals_cover_what_is_true() -> None:
    """Many calibrations of 60 samples from known distributions: about 95 % of the intervals hold the true number."""
    random = np.random.default_rng(5)
    layers, experts, m = 3, 2, 60
    s_true = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 1.0]])
    g_true = np.array([[0.0, 1.0], [2.0, 0.0]])
    alpha = s_true / np.linalg.norm(s_true, axis=1, keepdims=True)
    tau = np.array([1.0, 2.0]) / 3.0
    products = tau[:, None] * alpha
    true = {"alpha": alpha, "tau": tau, "sigma": products / products.sum(axis=0)}
    inside: dict[str, list[Array]] = {name: [] for name in true}
    rule = RULES.get("normalized", where="test")
    for _ in range(150):
        per_sample = PerSample(
            [random.gamma(4.0, s_true[i] / 4.0, size=(m, layers)) for i in range(experts)],
            [[random.gamma(4.0, g_true[i, j] / 4.0, size=m) for j in range(experts)] for i in range(experts)],
            [f"{random.integers(1 << 40)}" for _ in range(experts)],
        )
        found = bootstrap(per_sample, rule, PAPER, 1.0, draws=200)
        for name, value in true.items():
            low_high = np.array(getattr(found, name))
            inside[name].append((low_high[..., 0] <= value) & (value <= low_high[..., 1]))
    for name, hits in inside.items():
        assert 0.90 <= np.mean(hits) <= 0.98, name
    assert LEVEL == (2.5, 97.5)


@pytest.mark.parametrize("rule", ["softmax", "normalized", "additive"])
def test_the_order_of_the_experts_changes_nothing(rule: str) -> None:
    per_sample = samples(2)
    order = [2, 0, 1]
    turned = PerSample(
        [per_sample.sensitivity[i] for i in order],
        [[per_sample.distances[i][j] for j in order] for i in order],
        [per_sample.keys[i] for i in order],
    )
    one, other = intervals_of(per_sample, rule=rule), intervals_of(turned, rule=rule)
    for name in ("alpha", "tau", "sigma", "weights"):
        assert [getattr(one, name)[i] for i in order] == getattr(other, name), name


def test_one_expert_takes_all() -> None:
    found = intervals_of(samples(3, sizes=(6,)))
    assert found.tau == [[1.0, 1.0]]
    assert found.sigma == [[[1.0, 1.0]] * 4]
    assert all(low < high for low, high in found.alpha[0])


def test_equal_samples_leave_no_doubt() -> None:
    per_sample = samples(4)
    equal = PerSample(
        [np.repeat(each[:1], len(each), axis=0) for each in per_sample.sensitivity],
        [[np.full(len(each), each[0]) for each in row] for row in per_sample.distances],
        per_sample.keys,
    )
    found = intervals_of(equal)
    for name in ("alpha", "tau", "sigma", "weights"):
        low_high = np.array(getattr(found, name))
        np.testing.assert_allclose(low_high[..., 0], low_high[..., 1], rtol=1e-12, err_msg=name)
    assert found.widest()[2] < 1e-12


def test_more_samples_make_intervals_narrower() -> None:
    few, many = (intervals_of(samples(6, sizes=(m, m, m)), rule="normalized").widest()[2] for m in (10, 160))
    assert many < 0.5 * few


def test_a_sample_that_is_sensitive_nowhere() -> None:
    """α of a draw without any sensitivity is 1/√L, as everywhere."""
    per_sample = samples(7)
    zero = replace(per_sample, sensitivity=[np.zeros_like(each) for each in per_sample.sensitivity])
    np.testing.assert_allclose(intervals_of(zero).alpha, 0.5)


def test_any_rule_has_intervals() -> None:
    """A plug-in is a function of α and τ like the others."""

    def weigh(alpha_IL: Array, tau_I: Array, temperature: float) -> Array:
        return np.ones_like(alpha_IL) * tau_I[:, None] ** 2 / (tau_I**2).sum()  # type: ignore[no-any-return]

    squared = Rule("squared", "", uses_temperature=False, needs_sensitivity=False, needs_distances=True, weigh=weigh)
    found = bootstrap(samples(8), squared, PAPER, 1.0, draws=50)
    assert all(low < high for row in found.sigma for low, high in row)


@pytest.mark.parametrize("scale", [None, 0.7, -0.5])
def test_weights_follow_from_sigma(scale: float | None) -> None:
    """λ·w·total·σ at both ends, low end first; so too when λ is known later."""
    w = [1.0, -2.0, 0.5]
    settings = replace(PAPER, total=2.0, rule="normalized")
    at_once = compute(measured(samples(9)), settings, weights=w, scale=scale).intervals
    later = applied(compute(measured(samples(9)), settings, weights=[1.0] * 3, scale=1.0), w, scale).intervals
    assert at_once is not None
    assert later == at_once
    for i in range(3):
        factor = (1.0 if scale is None else scale) * w[i] * 2.0
        expected = np.sort(factor * np.array(at_once.sigma[i]), axis=-1)
        np.testing.assert_allclose(at_once.weights[i], expected, rtol=1e-6)


def test_without_samples_to_draw_from_there_are_none() -> None:
    """One sample says nothing about how much samples differ."""
    for per_sample in (None, samples(1, sizes=(5, 1, 5))):
        found = compute(replace(measured(samples(1)), per_sample=per_sample), PAPER, weights=[1.0] * 3, scale=1.0)
        assert found.intervals is None
        assert found.uncertainty() is None


def test_the_widest_is_named() -> None:
    result = compute(measured(samples(10)), replace(PAPER, rule="normalized"), weights=[1.0] * 3, scale=1.0)
    assert result.intervals is not None
    expert, layer, half = result.intervals.widest()
    low, high = result.intervals.sigma[expert][layer]
    assert half == 3 * (high - low) / 2
    assert half == max(3 * (b - a) / 2 for row in result.intervals.sigma for a, b in row)
    told = result.uncertainty()
    assert told is not None
    assert f"{half:.4f}" in told
    assert f"task {expert} in model.layers.{layer}" in told
