"""Merge methods against float64, and the promises that let a merge run in tiles."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sensmerge.methods import METHODS
from sensmerge.methods.method import weighted_sum

Tile = NDArray[np.float32]
NAMES = ("linear", "task_arithmetic")

each_method = pytest.mark.parametrize("name", NAMES)
each_normalize = pytest.mark.parametrize("normalize", [True, False])


def case(seed: int, n: int = 1000, experts: int | None = None) -> tuple[Tile, list[Tile], list[float], list[float]]:
    """A base, K experts near it, weights and float32 coefficients around 1."""
    random = np.random.default_rng(seed)
    experts = int(random.integers(1, 6)) if experts is None else experts
    base = random.normal(size=n).astype(np.float32)
    near = [(base + random.normal(size=n) * 0.1).astype(np.float32) for _ in range(experts)]
    w = random.uniform(0.2, 1.5, size=experts).tolist()
    c = random.uniform(0.0, 2.0, size=experts).astype(np.float32).astype(float).tolist()
    return base, near, w, c


def combine(name: str, base: Tile | None, experts: list[Tile], w: list[float], c: list[float], normalize: bool) -> Tile:
    return METHODS.get(name, where="test").combine(base, experts, w, c, {"normalize": normalize})


def merged(
    name: str, base: Tile, experts: list[Tile], w: list[float], c: list[float], normalize: bool, scale: float
) -> Tile:
    """The merged tile as the engine forms it: base + lambda * update where the method adds."""
    result = combine(name, base, experts, w, c, normalize)
    return base + np.float32(scale) * result if METHODS.get(name, where="test").adds else result


def oracle(
    name: str, base: Tile, experts: list[Tile], w: list[float], c: list[float], normalize: bool, scale: float
) -> Any:
    """DESIGN section 5 in float64."""
    theta0, thetas = base.astype(np.float64), [expert.astype(np.float64) for expert in experts]
    over = sum(w) if normalize else 1.0
    if name == "task_arithmetic":
        return theta0 + scale * sum(wi * ci * (t - theta0) for wi, ci, t in zip(w, c, thetas, strict=True)) / over
    total = sum(wi * ci * t for wi, ci, t in zip(w, c, thetas, strict=True))
    remainder = sum(w) - sum(wi * ci for wi, ci in zip(w, c, strict=True))
    return (total + remainder * theta0) / over


@each_method
@each_normalize
def test_a_method_is_its_formula(name: str, normalize: bool) -> None:
    """Within 2e-6 max(1, |theta|) of float64."""
    for seed in range(40):
        base, experts, w, c = case(seed)
        expected = oracle(name, base, experts, w, c, normalize, 0.7)
        got = merged(name, base, experts, w, c, normalize, 0.7)
        assert got.dtype == np.float32
        assert (np.abs(got - expected) <= 2e-6 * np.maximum(1.0, np.abs(expected))).all()


@each_normalize
def test_linear_without_a_base_is_the_weighted_average(normalize: bool) -> None:
    """Sum w theta / sum w; plain coefficients are exactly 1, and no base is needed."""
    for seed in range(20):
        _, experts, w, _ = case(seed)
        expected = np.average(np.array(experts, dtype=np.float64), axis=0, weights=w) * (1.0 if normalize else sum(w))
        got = combine("linear", None, experts, w, [1.0] * len(w), normalize)
        np.testing.assert_allclose(got, expected, atol=2e-6 * max(1.0, float(np.abs(expected).max())))


@each_normalize
def test_linear_with_c_of_one_does_not_look_at_the_base(normalize: bool) -> None:
    """At c = 1 the base drops out exactly: the same bits whatever the base, and none at all."""
    for seed in range(20):
        base, experts, w, _ = case(seed)
        ones = [1.0] * len(w)
        plain = combine("linear", None, experts, w, ones, normalize)
        assert combine("linear", base, experts, w, ones, normalize).tobytes() == plain.tobytes()
        assert combine("linear", base * 1e30, experts, w, ones, normalize).tobytes() == plain.tobytes()


@each_normalize
def test_task_arithmetic_with_c_of_one_is_plain_bit_for_bit(normalize: bool) -> None:
    """Against float32 arithmetic written out: sum of float32(w) * (theta - theta_0), in order."""
    for seed in range(20):
        base, experts, w, _ = case(seed)
        expected = np.zeros_like(base)
        for place, (wi, expert) in enumerate(zip(w, experts, strict=True)):
            part = np.float32(wi) * (expert - base)
            expected = part if place == 0 else expected + part
        if normalize:
            expected = expected / np.float32(sum(w))
        got = combine("task_arithmetic", base, experts, w, [1.0] * len(w), normalize)
        np.testing.assert_array_almost_equal_nulp(got, expected, nulp=1 if normalize else 0)


@each_method
@each_normalize
def test_tiles_of_any_split_give_the_same_bits(name: str, normalize: bool) -> None:
    """Every element depends on the same element alone: the promise that lets a merge stream."""
    base, experts, w, c = case(1, n=777)
    whole = combine(name, base, experts, w, c, normalize)
    random = np.random.default_rng(0)
    for _ in range(20):
        cuts = [0, *sorted(random.integers(0, 778, size=int(random.integers(1, 30))).tolist()), 777]
        parts = [combine(name, base[a:b], [e[a:b] for e in experts], w, c, normalize) for a, b in pairwise(cuts)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


@each_method
@each_normalize
def test_elements_do_not_move(name: str, normalize: bool) -> None:
    """Permuting the elements permutes the result."""
    base, experts, w, c = case(2, n=501)
    order = np.random.default_rng(3).permutation(501)
    whole = combine(name, base, experts, w, c, normalize)
    moved = combine(name, base[order], [e[order] for e in experts], w, c, normalize)
    assert moved.tobytes() == whole[order].tobytes()


@each_method
@each_normalize
def test_inputs_are_not_changed(name: str, normalize: bool) -> None:
    """Pure, and the result is memory of its own: the engine adds to it in place."""
    base, experts, w, c = case(4)
    for array in (base, *experts):
        array.flags.writeable = False
    before = [array.tobytes() for array in (base, *experts)]
    result = combine(name, base, experts, w, c, normalize)
    assert not any(np.shares_memory(result, array) for array in (base, *experts))
    result += 1
    assert [array.tobytes() for array in (base, *experts)] == before


@each_method
@each_normalize
@pytest.mark.parametrize("which", ["w", "c"])
def test_neither_weight_nor_coefficient_is_ignored(name: str, normalize: bool, which: str) -> None:
    """Changing one number of one expert changes the merge."""
    base, experts, w, c = case(14, experts=3)
    assert len(w) > 1
    changed = list(w if which == "w" else c)
    changed[-1] += 0.5
    one = combine(name, base, experts, w, c, normalize)
    two = combine(name, base, experts, *((changed, c) if which == "w" else (w, changed)), normalize)
    assert (one != two).mean() > 0.9


@each_method
def test_normalize_divides_by_the_weights_never_by_the_coefficients(name: str) -> None:
    """DESIGN: a normalising method divides by the w's alone."""
    base, experts, w, c = case(14, experts=3)
    plain = combine(name, base, experts, w, c, False).astype(np.float64)
    np.testing.assert_allclose(combine(name, base, experts, w, c, True), plain / sum(w), atol=2e-6)


@each_method
def test_normalised_weights_have_no_scale(name: str) -> None:
    """Weights 1, 1 and 2, 2 mean the same average."""
    base, experts, w, c = case(14, experts=3)
    one = combine(name, base, experts, w, c, True)
    np.testing.assert_array_equal(one, combine(name, base, experts, [wi * 4 for wi in w], c, True))


@each_method
def test_one_expert_of_weight_one_is_that_expert(name: str) -> None:
    """Exactly, where float32 can: the update is theta - theta_0."""
    base, experts, _, _ = case(6)
    got = combine(name, base, experts[:1], [1.0], [1.0], False)
    expected = experts[0] if name == "linear" else experts[0] - base
    assert got.tobytes() == expected.tobytes()


@each_method
def test_coefficients_of_zero_leave_the_base(name: str) -> None:
    """Every expert's share goes back to the base."""
    base, experts, w, _ = case(14, experts=3)
    got = merged(name, base, experts, w, [0.0] * len(w), name == "linear", 1.0)
    np.testing.assert_allclose(got, base, atol=2e-6 * float(np.abs(base).max()))


@each_method
def test_an_empty_tile_is_merged_to_an_empty_tile(name: str) -> None:
    """A tensor may have no element."""
    empty = np.zeros(0, dtype=np.float32)
    assert combine(name, empty, [empty, empty], [1.0, 1.0], [0.5, 1.5], True).shape == (0,)


def test_what_cannot_be_merged_without_a_base_says_so() -> None:
    _, experts, w, _ = case(14, experts=3)
    with pytest.raises(ValueError, match="base"):
        combine("task_arithmetic", None, experts, w, [1.0] * len(w), False)
    with pytest.raises(ValueError, match="base"):
        combine("linear", None, experts, w, [0.5] * len(w), True)


@each_method
def test_numbers_of_unlike_length_are_an_error(name: str) -> None:
    """A missing weight is never taken for 1."""
    base, experts, w, c = case(14, experts=3)
    with pytest.raises(ValueError, match="zip"):
        combine(name, base, experts, w[:-1], c, False)
    with pytest.raises(ValueError, match="zip"):
        combine(name, base, experts, w[:-1], c[:-1], False)


def test_weighted_sum_is_float32_in_the_order_given() -> None:
    """Factors rounded once to float32, products and sums in float32."""
    _, experts, w, _ = case(14, experts=3)
    expected = experts[0] * np.float32(w[0])
    for expert, factor in zip(experts[1:], w[1:], strict=True):
        expected = expected + expert * np.float32(factor)
    assert weighted_sum(experts, w).tobytes() == expected.tobytes()


@each_method
def test_methods_tell_the_truth_about_themselves(name: str) -> None:
    """What a plan relies on: whether a base is needed, whether lambda applies, the defaults of mergekit."""
    method = METHODS.get(name, where="test")
    assert method.name == name
    assert method.needs_base is method.adds is (name == "task_arithmetic")
    assert method.takes_sens
    assert dict(method.options) == {"normalize": name == "linear"}
    assert "arXiv" in method.citation
