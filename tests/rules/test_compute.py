"""From measurements to coefficients: eq. 6 and 7, roles outside the blocks, the spread and its warning."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sensmerge.errors import RecipeError
from sensmerge.records import Coefficients, SensSettings
from sensmerge.rules.compute import Measurements, applied, coefficient, compute

RULES = ("softmax", "normalized", "alpha_only", "cross_task_only", "additive", "uniform")
PAPER = SensSettings()


def measured(seed: int, experts: int = 3, layers: int = 5) -> Measurements:
    random = np.random.default_rng(seed)
    g = random.exponential(size=(experts, experts)) ** 2
    np.fill_diagonal(g, 0.0)
    return Measurements(
        models=tuple(f"m{i}" for i in range(experts)),
        layers=tuple(f"model.layers.{layer}" for layer in range(layers)),
        sensitivity=random.exponential(size=(experts, layers)) ** 2,
        outside={role: random.exponential(size=experts) for role in ("embed", "final_norm", "lm_head")},
        distances=g,
        inputs="here",
    )


def permuted(m: Measurements, order: Any) -> Measurements:
    return replace(
        m,
        models=tuple(m.models[i] for i in order),
        sensitivity=m.sensitivity[order],
        outside={role: values[order] for role, values in m.outside.items()},
        distances=m.distances[np.ix_(order, order)],
    )


def run(
    m: Measurements, settings: SensSettings = PAPER, scale: float | None = 1.0, w: list[float] | None = None
) -> Coefficients:
    return compute(m, settings, weights=w or [1.0] * len(m.models), scale=scale)


def test_the_paper_s_preset_is_eq_3_5_6_7() -> None:
    """By hand, from the equations, in plain Python."""
    m = measured(0)
    c = run(m, w=[1.0, 0.5, 2.0], scale=0.7)
    tau = [sum(m.distances[i][j] for j in range(3) if j != i) for i in range(3)]
    tau = [t / sum(tau) for t in tau]
    alpha = [[s / math.sqrt(sum(x * x for x in row)) for s in row] for row in m.sensitivity.tolist()]
    np.testing.assert_allclose(c.tau, tau, rtol=1e-14)
    np.testing.assert_allclose(c.alpha, alpha, rtol=1e-14)
    for layer in range(5):
        powers = [math.exp(tau[i] * alpha[i][layer]) for i in range(3)]
        for i in range(3):
            sigma = powers[i] / sum(powers)
            assert c.sigma[i][layer] == pytest.approx(sigma, rel=1e-14)
            assert c.weights[i][layer] == pytest.approx(0.7 * [1.0, 0.5, 2.0][i] * 3 * sigma, rel=1e-7)
    assert (c.total, c.temperature, c.rule, c.preset, c.lambda_) == (3.0, 1.0, "softmax", "paper", 0.7)
    assert (c.models, c.layers, c.w) == (list(m.models), list(m.layers), [1.0, 0.5, 2.0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("total", ["K", 1.0, 2.5, 0.0])
def test_the_coefficients_of_a_layer_sum_to_the_total(rule: str, total: float | str) -> None:
    """Eq. 7: K, or the number asked for; each rounded once to float32."""
    c = run(measured(1), replace(PAPER, rule=rule, total=total))
    expected = 3.0 if total == "K" else total
    assert c.total == expected
    for layer in range(5):
        assert math.fsum(row[layer] for row in c.weights) == pytest.approx(expected, abs=4e-7)


@pytest.mark.parametrize("scale", [None, 0.35, 1.0])
def test_weights_are_lambda_w_c_with_c_in_float32(scale: float | None) -> None:
    """1 in place of lambda while it is auto, and null in the record."""
    w = [0.3, 1.7, -0.4]
    c = run(measured(2), scale=scale, w=w)
    assert c.lambda_ == scale
    for i in range(3):
        for layer in range(5):
            factor = float(np.float32(3.0 * c.sigma[i][layer]))
            assert c.weights[i][layer] == (1.0 if scale is None else scale) * w[i] * factor


@pytest.mark.parametrize("seed", range(50))
def test_coefficient_is_rounded_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    total, sigma = float(random.uniform(0, 64)), float(random.uniform(0, 1))
    assert coefficient(total, sigma) == float(np.float32(np.float64(total) * np.float64(sigma)))


@pytest.mark.parametrize("experts", range(1, 65))
def test_uniform_with_total_k_is_exactly_one(experts: int) -> None:
    """So that every method gives its plain bytes: in the blocks, and outside them wherever `other` follows sigma."""
    m = measured(experts, experts=experts, layers=7)
    for other in ("block_mean", "own_group", "uniform"):
        c = run(m, replace(PAPER, rule="uniform", other=other))
        assert c.weights == [[1.0] * 7] * experts
        for role in m.outside:
            assert [coefficient(c.total, sigma) for sigma in c.sigma_of(role)] == [1.0] * experts
    assert c.spread < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("other", ["block_mean", "own_group", "base", "uniform"])
@pytest.mark.parametrize("direction", ["distance", "similarity"])
def test_permuting_the_experts_permutes_everything(rule: str, other: str, direction: str) -> None:
    """Bit for bit, in many random cases."""
    settings = replace(PAPER, rule=rule, other=other, direction=direction, temperature=0.2)
    for seed in range(25):
        m = measured(seed, experts=2 + seed % 5)
        order = np.random.default_rng(seed).permutation(len(m.models))
        w = np.random.default_rng(seed + 1).uniform(size=len(order)).tolist()
        one, two = run(m, settings, 0.5, w), run(permuted(m, order), settings, 0.5, [w[i] for i in order])
        for name in ("models", "alpha", "tau", "sigma", "w", "weights"):
            assert getattr(two, name) == [getattr(one, name)[i] for i in order]
        assert two.other == {role: [values[i] for i in order] for role, values in one.other.items()}
        assert (two.spread, two.layers, two.warnings) == (one.spread, one.layers, one.warnings)


@pytest.mark.parametrize("rule", RULES)
def test_other_is_what_the_design_says(rule: str) -> None:
    m = measured(3)
    settings = replace(PAPER, rule=rule, temperature=0.3)
    sigma = np.array(run(m, settings).sigma)
    mean = run(m, replace(settings, other="block_mean")).other
    assert set(mean) == set(m.outside)
    for role in m.outside:
        np.testing.assert_allclose(mean[role], sigma.mean(axis=1), rtol=1e-14)
    assert set(map(tuple, run(m, replace(settings, other="base")).other.values())) == {(0.0, 0.0, 0.0)}
    assert set(map(tuple, run(m, replace(settings, other="uniform")).other.values())) == {(1 / 3,) * 3}


@pytest.mark.parametrize("rule", RULES)
def test_own_group_weighs_a_role_like_a_block(rule: str) -> None:
    """A role whose sums are those of block 2 in every expert gets block 2's sigma."""
    m = measured(4)
    m = replace(m, outside={"embed": m.sensitivity[:, 2].copy(), "lm_head": np.zeros(3)})
    c = run(m, replace(PAPER, rule=rule, other="own_group", temperature=0.4))
    np.testing.assert_allclose(c.other["embed"], [row[2] for row in c.sigma], rtol=1e-14)
    assert math.fsum(c.other["lm_head"]) == pytest.approx(1.0)


@pytest.mark.parametrize("total", ["K", 1.0, 10.0])
def test_spread_is_the_largest_distance_from_a_plain_merge(total: float | str) -> None:
    """max|K sigma - 1|, whatever the total is."""
    c = run(measured(5), replace(PAPER, total=total, rule="normalized"))
    assert c.spread == pytest.approx(max(abs(3 * s - 1) for row in c.sigma for s in row), rel=1e-13)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.3, 1.0, 3.0, 100.0])
def test_a_spread_below_a_tenth_is_warned_of(temperature: float) -> None:
    """And the warning names the way out; above it there is none."""
    c = run(measured(6), replace(PAPER, temperature=temperature))
    assert bool(c.warnings) == (c.spread < 0.10)
    assert all("preset: calibrated" in warning for warning in c.warnings)


def test_both_sides_of_the_warning_are_seen() -> None:
    """The cases above are not all on one side."""
    assert (
        run(measured(6), replace(PAPER, temperature=100.0)).spread
        < 0.10
        < run(measured(6), replace(PAPER, temperature=0.1)).spread
    )


@pytest.mark.parametrize(("experts", "layers"), [(1, 4), (3, 1), (1, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_degenerate_shapes(rule: str, experts: int, layers: int) -> None:
    """One expert gets the whole total in every layer."""
    c = run(measured(7, experts, layers), replace(PAPER, rule=rule))
    if experts == 1:
        assert c.sigma == [[1.0] * layers]
        assert c.weights == [[1.0] * layers]
        assert c.tau == [1.0]
        assert c.spread == 0.0
    np.testing.assert_allclose(np.sum(c.sigma, axis=0), 1.0, rtol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("other", ["block_mean", "own_group"])
def test_nothing_measured_is_uniform(rule: str, other: str) -> None:
    """s = 0 and g = 0: alpha = 1/sqrt(L), tau = 1/K, and so sigma = 1/K."""
    m = measured(8)
    m = replace(m, sensitivity=np.zeros((3, 5)), distances=np.zeros((3, 3)), outside={"embed": np.zeros(3)})
    c = run(m, replace(PAPER, rule=rule, other=other))
    np.testing.assert_allclose(c.sigma, 1 / 3, rtol=1e-15)
    np.testing.assert_allclose(c.other["embed"], 1 / 3, rtol=1e-15)


def test_applied_changes_lambda_and_weights_alone() -> None:
    """The same sigma under another recipe's numbers: equal to having computed with them."""
    m = measured(9)
    auto = run(m, scale=None)
    fixed = applied(auto, [0.5, 1.0, 2.0], 0.85)
    direct = run(m, scale=0.85, w=[0.5, 1.0, 2.0])
    for name in ("alpha", "tau", "sigma", "other", "weights", "w", "lambda_", "spread", "total", "rule", "models"):
        assert getattr(fixed, name) == getattr(direct, name)
    assert fixed.inputs != auto.inputs
    assert applied(fixed, [1.0] * 3, None).weights == auto.weights
    assert auto.lambda_ is None


@pytest.mark.parametrize(
    "change",
    [
        {"rule": "additive"},
        {"temperature": 0.5},
        {"total": 1.0},
        {"axis": "column"},
        {"direction": "similarity"},
        {"other": "base"},
    ],
)
def test_inputs_tell_settings_apart(change: dict[str, Any]) -> None:
    """Whatever changes the numbers changes the hash; equal inputs give equal hashes."""
    m = measured(10)
    assert run(m).inputs == run(m).inputs
    assert run(m).inputs != run(m, replace(PAPER, **change)).inputs
    assert run(m).inputs != run(replace(m, inputs="there")).inputs
    assert run(m).inputs != run(m, scale=0.5).inputs
    assert run(m).inputs != run(m, w=[1.0, 1.0, 2.0]).inputs


def test_a_record_comes_out_that_can_be_written(tmp_path: Any) -> None:
    c = run(measured(11), replace(PAPER, other="own_group"))
    c.save(tmp_path / "c.json")
    assert Coefficients.load(tmp_path / "c.json") == c


def test_an_unknown_rule_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="did you mean 'softmax'"):
        run(measured(12), replace(PAPER, rule="softmx"))
