"""Rules: each against its formula in plain float64, and the properties that every rule promises."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from sensmerge.rules import RULES

Array = NDArray[np.float64]
NAMES = ("softmax", "normalized", "alpha_only", "cross_task_only", "additive", "uniform")


def weigh(name: str, alpha: Array, tau: Array, temperature: float = 1.0) -> Array:
    return RULES.get(name, where="test").weigh(alpha, tau, temperature)


def case(seed: int) -> tuple[Array, Array]:
    """alpha [K, L] of unit rows and tau [K] of unit sum, as eq. 3 and eq. 5 give them; some of both exactly zero."""
    random = np.random.default_rng(seed)
    experts, layers = int(random.integers(1, 9)), int(random.integers(1, 40))
    alpha = random.exponential(size=(experts, layers)) ** random.uniform(0.3, 4)
    alpha[random.random(alpha.shape) < 0.05] = 0.0
    alpha /= np.maximum(np.linalg.norm(alpha, axis=1, keepdims=True), 1e-300)
    tau = random.exponential(size=experts) ** random.uniform(0.3, 4)
    return alpha, tau / tau.sum()


def _softmax(scores: list[float]) -> list[float]:
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


def _ratio(values: list[float]) -> list[float]:
    return [value / sum(values) if sum(values) else 1 / len(values) for value in values]


ORACLES: dict[str, Callable[[list[float], list[float], float], list[float]]] = {
    "softmax": lambda a, t, T: _softmax([x * y / T for x, y in zip(a, t, strict=True)]),
    "normalized": lambda a, t, T: _ratio([x * y for x, y in zip(a, t, strict=True)]),
    "alpha_only": lambda a, t, T: _softmax([x / T for x in a]),
    "cross_task_only": lambda a, t, T: _softmax([y / T for y in t]),
    "additive": lambda a, t, T: _softmax([(x + y) / (2 * T) for x, y in zip(_ratio(a), t, strict=True)]),
    "uniform": lambda a, t, T: [1 / len(t)] * len(t),
}

each_rule = pytest.mark.parametrize("name", NAMES)


@each_rule
@pytest.mark.parametrize("temperature", [1.0, 0.1, 3.0])
def test_each_rule_is_its_formula(name: str, temperature: float) -> None:
    """DESIGN section 4, column by column, by the definition."""
    for seed in range(60):
        alpha, tau = case(seed)
        sigma = weigh(name, alpha, tau, temperature)
        assert sigma.dtype == np.float64
        assert sigma.shape == alpha.shape
        expected = np.array([ORACLES[name](list(column), list(tau), temperature) for column in alpha.T]).T
        np.testing.assert_allclose(sigma, expected, rtol=1e-12, atol=1e-300)


@each_rule
def test_columns_sum_to_one_and_nothing_is_negative(name: str) -> None:
    for seed in range(200):
        alpha, tau = case(seed)
        sigma = weigh(name, alpha, tau, 10.0 ** (seed % 7 - 3))
        np.testing.assert_allclose(sigma.sum(axis=0), 1.0, rtol=1e-14)
        assert (sigma >= 0).all()


@each_rule
def test_permuting_the_experts_permutes_the_result_bit_for_bit(name: str) -> None:
    """The order of a recipe never changes a bit."""
    for seed in range(300):
        alpha, tau = case(seed)
        order = np.random.default_rng(seed + 1).permutation(len(tau))
        sigma = weigh(name, alpha, tau, 0.3)
        assert weigh(name, alpha[order], tau[order], 0.3).tobytes() == sigma[order].tobytes()


@each_rule
def test_a_column_depends_on_that_column_alone(name: str) -> None:
    """So a group outside the blocks is weighed by the same rule, bit for bit, at any place in the array."""
    for seed in range(60):
        alpha, tau = case(seed)
        sigma = weigh(name, alpha, tau, 0.7)
        for layer in range(alpha.shape[1]):
            assert weigh(name, alpha[:, layer : layer + 1], tau, 0.7).tobytes() == sigma[:, layer].tobytes()


@each_rule
def test_inputs_are_not_changed(name: str) -> None:
    alpha, tau = case(5)
    before = alpha.copy(), tau.copy()
    weigh(name, alpha, tau, 0.5)
    assert (alpha == before[0]).all()
    assert (tau == before[1]).all()


@each_rule
def test_one_expert_takes_all(name: str) -> None:
    assert weigh(name, np.array([[0.6, 0.0, 0.8]]), np.array([1.0]), 0.2).tolist() == [[1.0, 1.0, 1.0]]


@each_rule
def test_equal_experts_share_equally(name: str) -> None:
    sigma = weigh(name, np.full((3, 4), 0.5), np.full(3, 1 / 3), 0.01)
    np.testing.assert_allclose(sigma, 1 / 3, rtol=1e-15)


@each_rule
@pytest.mark.parametrize("temperature", [1e-300, 1e-12, 1e-3, 1e3, 1e12, 1e300])
def test_no_temperature_gives_a_number_that_is_not_finite(name: str, temperature: float) -> None:
    for seed in range(30):
        alpha, tau = case(seed)
        with np.errstate(all="raise", under="ignore"):
            sigma = weigh(name, alpha, tau, temperature)
        np.testing.assert_allclose(sigma.sum(axis=0), 1.0, rtol=1e-14)


@pytest.mark.parametrize("name", ["softmax", "alpha_only", "cross_task_only", "additive"])
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300])
def test_the_limit_of_a_temperature_towards_zero_is_all_to_the_largest(name: str, temperature: float) -> None:
    """As the docstring says; down to the smallest number that a recipe can hold."""
    alpha, tau = np.array([[0.9, 0.6], [0.3, 0.5], [0.1, 0.2]]), np.array([0.5, 0.3, 0.2])
    assert weigh(name, alpha, tau, temperature).tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["softmax", "alpha_only", "cross_task_only", "additive"])
def test_a_large_temperature_is_uniform(name: str) -> None:
    alpha, tau = case(3)
    np.testing.assert_allclose(weigh(name, alpha, tau, 1e12), 1 / len(tau), rtol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_rules_say_truly_what_they_use(name: str) -> None:
    """`uses_temperature`, `needs_sensitivity` and `needs_distances` decide what is measured at all."""
    rule = RULES.get(name, where="test")
    alpha, tau = np.array([[0.9, 0.6], [0.3, 0.5]]), np.array([0.8, 0.2])
    sigma = weigh(name, alpha, tau, 1.0)
    assert rule.name == name
    assert rule.uses_temperature == (weigh(name, alpha, tau, 0.5).tolist() != sigma.tolist())
    assert rule.needs_sensitivity == (weigh(name, alpha[::-1], tau, 1.0).tolist() != sigma.tolist())
    assert rule.needs_distances == (weigh(name, alpha, tau[::-1], 1.0).tolist() != sigma.tolist())


def test_normalized_is_the_softmax_of_logarithms() -> None:
    """softmax(log(tau alpha)) = tau alpha / sum."""
    for seed in range(100):
        alpha, tau = case(seed)
        alpha = np.maximum(alpha, 1e-9)
        logs = np.log(tau[:, None] * alpha)
        np.testing.assert_allclose(
            weigh("normalized", alpha, tau), weigh("alpha_only", logs, tau, 1.0), rtol=1e-12, atol=1e-300
        )


@pytest.mark.parametrize("power", [-40, -3, 1, 50])
def test_normalized_does_not_see_the_scale(power: int) -> None:
    """Of all alpha, of all tau, or of one layer; a power of two changes no bit."""
    for seed in range(50):
        alpha, tau = case(seed)
        sigma = weigh("normalized", alpha, tau)
        assert weigh("normalized", alpha * 2.0**power, tau).tobytes() == sigma.tobytes()
        assert weigh("normalized", alpha, tau * 2.0**power).tobytes() == sigma.tobytes()
        np.testing.assert_allclose(weigh("normalized", alpha * 3.7, tau), sigma, rtol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 7.0])
def test_normalized_has_no_temperature(temperature: float) -> None:
    alpha, tau = case(11)
    assert weigh("normalized", alpha, tau, temperature).tobytes() == weigh("normalized", alpha, tau, 1.0).tobytes()


def test_a_zero_denominator_in_normalized_is_shared() -> None:
    """DESIGN: 1/K, in that column only."""
    sigma = weigh("normalized", np.array([[0.0, 1.0], [0.0, 3.0]]), np.array([0.5, 0.5]))
    assert sigma.tolist() == [[0.5, 0.25], [0.5, 0.75]]
    assert weigh("normalized", np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1.0, 0.0])).tolist() == [
        [1.0, 0.5],
        [0.0, 0.5],
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_product_never_gets_less(seed: int) -> None:
    """softmax and normalized rank the experts of a layer by tau alpha."""
    alpha, tau = case(seed + 100)
    products = tau[:, None] * alpha
    for name in ("softmax", "normalized"):
        sigma = weigh(name, alpha, tau, 0.2)
        for layer in range(alpha.shape[1]):
            ranked = sigma[np.argsort(products[:, layer]), layer]
            assert (np.diff(ranked) >= 0).all()
