"""The oracle of the merge methods against numbers worked out by hand, and against limits where two methods must meet.

Most examples have four elements and a base of zeros, so that experts are task vectors and the result is λ U itself.
`tests/golden` compares the same oracle with merges that mergekit made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.oracle import methods64
from tests.oracle.methods64 import SUMS, Case, global_thresholds, magprune_chances, merge64

HALF = math.sqrt(0.5)

Values = Sequence[float] | Sequence[Sequence[float]]


def case(method: str, *experts: Values, base: Values | None = None, rootless: bool = False, **settings: Any) -> Case:
    """A case; without `base` the base is zeros, and with `rootless` there is none."""
    tensors = tuple(np.array(expert, dtype=np.float32) for expert in experts)
    origin = np.zeros_like(tensors[0]) if base is None else np.array(base, dtype=np.float32)
    names = tuple("abcd"[: len(experts)])
    return Case(method, None if rootless else origin, tensors, names, **settings)


def merged(method: str, *experts: Values, **settings: Any) -> NDArray[np.float64]:
    return merge64(case(method, *experts, **settings)).exact


def same(made: NDArray[Any], expected: Values, tolerance: float = 1e-12) -> None:
    # float32 inputs such as 0.1 are not the decimal numbers: examples that have them give a wider tolerance.
    np.testing.assert_allclose(made, np.array(expected), rtol=tolerance, atol=tolerance)


def densities(*values: float) -> Mapping[str, tuple[float, ...]]:
    return {"density": values}


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Draws that a test chooses, by expert name."""
    table: dict[str, list[float]] = {}

    def fake(seed: int, expert: str, tensor: str, start: int, count: int) -> NDArray[np.float64]:
        assert (seed, tensor, start, count) == (3, "model.layers.0.mlp.up_proj.weight", 0, len(table[expert]))
        return np.array(table[expert])

    monkeypatch.setattr(methods64, "uniforms", fake)
    return table


# Sums of task vectors


def test_task_arithmetic() -> None:
    base, first, second = [1, 1, 1, 1], [2, 0, 1, 3], [1, 3, 0, 1]
    # δ = (1, -1, 0, 2) and (0, 2, -1, 0); U = 2 δ1 + 0.5 δ2 = (2, -1, -0.5, 4)
    same(merged("task_arithmetic", first, second, base=base, w=(2, 0.5), scale=0.5), [2, 0.5, 0.75, 3])
    # over Σ w = 2.5: U = (0.8, -0.4, -0.2, 1.6)
    normalized = {"normalize": True}
    same(
        merged("task_arithmetic", first, second, base=base, w=(2, 0.5), scale=0.5, options=normalized),
        [1.4, 0.8, 0.9, 1.8],
    )
    # Coefficients multiply, but are not in the divisor: (6 δ1 + 1 δ2) / 2.5
    same(
        merged("task_arithmetic", first, second, base=base, w=(2, 0.5), c=(3, 2), options=normalized),
        [3.4, -0.6, 0.6, 5.8],
    )


def test_a_task_vector_is_rounded_to_float32_before_anything_else() -> None:
    delta = np.float32(0.001) - np.float32(1000)
    made = merged("task_arithmetic", [0.001], base=[1000])
    assert made[0] == 1000 + float(delta)
    assert abs(made[0] - 0.001) > 1e-6


def test_ties_trims_elects_and_averages_those_that_agree() -> None:
    first, second = [4, -3, 2, 1], [-1, -2, 3, 4]
    # All kept: s = (3, -5, 5, 5). In the first place only the first expert has the elected sign.
    same(merged("ties", first, second), [4, -2.5, 2.5, 2.5])
    same(merged("ties", first, second, options={"normalize": False}), [4, -5, 5, 5])
    # Half kept: (4, -3, 0, 0) and (0, 0, 3, 4); a zero agrees with nobody, so nothing is halved.
    half = densities(0.5, 0.5)
    same(merged("ties", first, second, per_model=half), [4, -3, 3, 4])
    same(merged("ties", first, second, per_model=half, w=(1, 0.5)), [4, -3, 3, 4])
    same(merged("ties", first, second, per_model=half, w=(1, 0.5), options={"normalize": False}), [4, -3, 1.5, 2])
    # A coefficient is in the sum and not in its divisor.
    same(merged("ties", first, second, per_model=half, c=(2, 1), scale=0.5), [4, -3, 1.5, 2])
    # It also votes: s = 0.25 (4, -3, 2, 1) + (-1, -2, 3, 4) = (0, -2.75, 3.5, 4.25), and 0 elects plus.
    same(merged("ties", first, second, c=(0.25, 1)), [1, -1.375, 1.75, 2.125])


def test_ties_trim_keeps_at_least_one_and_all_that_are_equal() -> None:
    trimmed = merge64(case("ties", [2, -2, 2, 1], per_model=densities(0.5)))
    same(trimmed.exact, [2, -2, 2, 0])
    assert trimmed.kept is not None
    assert trimmed.kept.tolist() == [[True, True, True, False]]
    same(merged("ties", [4, -3, 2, 1], per_model=densities(0.1)), [4, 0, 0, 0])
    same(merged("ties", [4, -3, 2, 1], per_model=densities(0)), [0, 0, 0, 0])
    # int(0.7 · 4) = 2
    same(merged("ties", [4, -3, 2, 1], per_model=densities(0.7)), [4, -3, 0, 0])


@pytest.mark.parametrize("rescale", [True, "l1"])
def test_rescale_l1_gives_a_trimmed_task_vector_its_old_sum_of_magnitudes(rescale: object) -> None:
    made = merged("ties", [4, -3, 2, 1], per_model=densities(0.5), options={"rescale": rescale})
    same(made, [40 / 7, -30 / 7, 0, 0])
    same(merged("ties", [4, -3, 2, 1], per_model=densities(0), options={"rescale": rescale}), [0, 0, 0, 0])


def test_ties_with_negative_weights() -> None:
    first, second = [1, 2, 3, -4], [-1, 2, -3, -4]
    # w δ = (1, 2, 3, -4) and (0.5, -1, 1.5, 2); s = (1.5, 1, 4.5, -2); over those that agree: 1 - 0.5 and 1.
    same(merged("ties", first, second, w=(1, -0.5)), [3, 2, 9, -4])
    # w δ = (1, 2, 3, -4) and (1, -2, 3, 4); s = (2, 0, 6, 0), and 0 elects plus. Weights that agree and sum to 0 give 0;
    # in the last place only the second expert agrees: 4 / -1.
    same(merged("ties", first, second, w=(1, -1)), [0, 2, 0, -4])
    same(merged("ties", first, second, w=(1, -1), options={"normalize": False}), [2, 2, 6, 4])


def test_ties_with_one_threshold_for_all_tensors() -> None:
    tensors = [
        case("ties", values, per_model=densities(0.25), options={"scope": "global"})
        for values in ([5, -4, 1, 0.5], [3, 2, -0.25, 0.125])
    ]
    # Two of eight: 5 and 4. Each tensor for itself would keep one.
    assert global_thresholds(tensors) == (4.0,)
    results = [
        merge64(Case(**{**vars(tensor), "thresholds": global_thresholds(tensors)})).exact.tolist() for tensor in tensors
    ]
    assert results == [[5, -4, 0, 0], [0, 0, 0, 0]]
    both = [
        case("ties", values, values[::-1], per_model=densities(0.5, 1))
        for values in ([5, -4, 1, 0.5], [3, 2, -0.25, 0.125])
    ]
    assert global_thresholds(both) == (2.0, 0.0)
    assert global_thresholds([case("ties", [1, 2], per_model=densities(0))]) == (math.inf,)


def test_an_election_without_a_winner_elects_plus_and_is_told() -> None:
    tied = merge64(case("ties", [1, 1, -1, 0], [-1, 2, -2, 0]))
    same(tied.exact, [1, 1.5, -1.5, 0])
    assert tied.conditioned.tolist() == [False, True, True, True]
    near = merge64(case("dare_ties", [1, 1], [-1 - 2**-22, -1 - 2**-18]))
    assert near.conditioned.tolist() == [False, True]


def test_dare_keeps_what_is_drawn_below_the_density(draws: dict[str, list[float]]) -> None:
    draws["a"] = [0.1, 0.5, 0.3, 0.9]
    values, per_model = [1, 2, 3, 4], densities(0.5)
    kept = merge64(case("dare_linear", values, per_model=per_model, options={"seed": 3}))
    same(kept.exact, [2, 0, 6, 0])
    assert kept.kept is not None
    assert kept.kept.tolist() == [[True, False, True, False]]
    for rescale, expected in (
        (True, [2, 0, 6, 0]),
        ("keep", [2, 0, 6, 0]),
        (False, [1, 0, 3, 0]),
        ("none", [1, 0, 3, 0]),
    ):
        same(merged("dare_linear", values, per_model=per_model, options={"seed": 3, "rescale": rescale}), expected)
    # Σ|δ| / Σ|t| = 10 / 4
    same(merged("dare_linear", values, per_model=per_model, options={"seed": 3, "rescale": "l1"}), [2.5, 0, 7.5, 0])


def test_dare_with_an_election(draws: dict[str, list[float]]) -> None:
    draws |= {"a": [0.1, 0.5, 0.3, 0.9], "b": [0.1, 0.1, 0.9, 0.9]}
    # The task vectors become (2, 0, 6, 0) and (-4, 4, 0, 0), and their sum (-2, 4, 6, 0).
    settings: dict[str, Any] = {"per_model": densities(0.5, 0.5)}
    experts = [1, 2, 3, 4], [-2, 2, 2, 2]
    same(merged("dare_ties", *experts, options={"seed": 3}, **settings), [-4, 4, 6, 0])
    same(merged("dare_linear", *experts, options={"seed": 3}, **settings), [-2, 4, 6, 0])
    same(merged("dare_linear", *experts, options={"seed": 3, "normalize": True}, **settings), [-1, 2, 3, 0])


def test_draws_are_those_of_the_package() -> None:
    ones = np.ones(4000).tolist()

    def kept(**settings: Any) -> NDArray[np.bool_]:
        found = merge64(case("dare_linear", ones, per_model=densities(0.3), **settings)).kept
        assert found is not None
        return found

    first = kept()
    assert first.mean() == pytest.approx(0.3, abs=0.03)
    assert np.array_equal(first, kept(options={"seed": 0}))
    assert not np.array_equal(first, kept(options={"seed": 1}))
    assert not np.array_equal(first, kept(tensor="lm_head.weight"))


def test_breadcrumbs_takes_a_band_of_magnitudes() -> None:
    values = [4, -3, 2, 1]

    def band(values: Values, density: float, gamma: float, **options: object) -> NDArray[np.float64]:
        return merged("breadcrumbs", values, per_model={"density": (density,), "gamma": (gamma,)}, options=options)

    # target 2, top 1, bottom 1: of 1 2 3 4 the middle ones.
    same(band(values, 0.5, 0.25), [0, -3, 2, 0])
    # target 2, top 3: more than there is room for, so the band starts at the smallest.
    same(band(values, 0.5, 0.75), [0, 0, 2, 1])
    # int(0.1 · 4) = 0: nothing is kept.
    same(band(values, 0.1, 0), [0, 0, 0, 0])
    same(band(values, 1, 0.5), values)
    # target 1, top 2, bottom 1: the second of 1 1 2 3, and so both ones.
    same(band([1, -1, 2, 3], 0.25, 0.5), [1, -1, 0, 0])
    # Σ|δ| / Σ|t| = 10 / 5
    same(band(values, 0.5, 0.25, rescale=True), [0, -6, 4, 0])
    # gamma is 0.01 unless told: of 1 … 100 the largest goes, and then the smaller 49.
    hundred = np.arange(1, 101)
    made = merged("breadcrumbs", hundred.tolist(), per_model=densities(0.5))
    same(made, np.where((hundred >= 50) & (hundred <= 99), hundred, 0).tolist())


def test_breadcrumbs_with_an_election() -> None:
    settings: dict[str, Any] = {"per_model": {"density": (0.5, 0.5), "gamma": (0.25, 0.0)}}
    experts = [4, -3, 2, 1], [1, 5, 1.5, -6]
    # The task vectors become (0, -3, 2, 0) and (0, 5, 0, -6), and their sum (0, 2, 2, -6).
    same(merged("breadcrumbs_ties", *experts, **settings), [0, 5, 2, -6])
    same(merged("breadcrumbs", *experts, **settings), [0, 2, 2, -6])
    same(merged("breadcrumbs_ties", *experts, w=(1, 2), options={"normalize": True}, **settings), [0, 5, 2, -6])


@pytest.mark.parametrize("density", [0.2, 0.5, 0.75])
def test_breadcrumbs_without_gamma_trims_as_ties_does(density: float) -> None:
    values = np.random.RandomState(0).normal(size=(5, 8)).tolist()
    trimmed = merge64(case("ties", values, per_model=densities(density)))
    banded = merge64(case("breadcrumbs", values, per_model={"density": (density,), "gamma": (0.0,)}))
    np.testing.assert_array_equal(trimmed.kept, banded.kept)
    np.testing.assert_array_equal(trimmed.exact, banded.exact)


def test_della_keeps_larger_changes_more_often() -> None:
    # Ranks 3 2 1 0 of three steps from 0.4 to 0.6.
    rows = np.array([[4.0, -3, 2, 1], [0.1, 0.3, 0.2, 9]])
    same(
        magprune_chances(rows, 0.5, 0.1),
        [[0.6, 0.4 + 0.4 / 3, 0.4 + 0.2 / 3, 0.4], [0.4, 0.4 + 0.4 / 3, 0.4 + 0.2 / 3, 0.6]],
    )
    # Of equal magnitudes the earlier has the lower rank.
    same(magprune_chances(np.array([[1.0, -1, 1]]), 0.5, 0.1), [[0.4, 0.5, 0.6]])
    same(magprune_chances(np.array([[1.0], [2]]), 0.5, 0.1), [[0.5], [0.5]])


def test_della(draws: dict[str, list[float]]) -> None:
    draws["a"] = [0.55, 0.55, 0.3, 0.3]
    settings: dict[str, Any] = {"per_model": {"density": (0.5,), "epsilon": (0.1,)}}
    values = [4, -3, 2, 1]
    # Kept: 0.55 < 0.6, 0.3 < 0.467 and 0.3 < 0.4, but not 0.55 < 0.533. Σ|δ| / Σ|t| = 10 / 7.
    for method in ("della", "della_linear"):
        same(merged(method, values, options={"seed": 3}, **settings), [40 / 7, 0, 20 / 7, 10 / 7])
        same(merged(method, values, options={"seed": 3, "rescale": True}, **settings), [40 / 7, 0, 20 / 7, 10 / 7])
        same(merged(method, values, options={"seed": 3, "rescale": False}, **settings), [4, 0, 2, 1])
        same(
            merged(method, values, options={"seed": 3, "rescale": "keep"}, **settings),
            [4 / 0.6, 0, 2 / (0.4 + 0.2 / 3), 1 / 0.4],
        )
    # Each row has ranks of its own: 0.55 is below 0.6 and above 0.4.
    draws["a"] = [0.55, 0.55, 0.55, 0.55]
    same(merged("della", [[2, 1], [3, 4]], options={"seed": 3, "rescale": False}, **settings), [[2, 0], [0, 4]])
    # A row of one element is kept with the density itself.
    draws["a"] = [0.45, 0.55]
    same(merged("della", [[2], [3]], options={"seed": 3, "rescale": False}, **settings), [[2], [0]])
    # 0.15 unless told: 0.35 … 0.65.
    draws["a"] = [0.64, 0.36]
    same(merged("della", [2, 1], options={"seed": 3, "rescale": False}, per_model=densities(0.5)), [2, 0])


def test_della_averages_and_elects_and_its_linear_form_does_neither(draws: dict[str, list[float]]) -> None:
    draws |= {"a": [0.1, 0.1], "b": [0.1, 0.1]}
    settings: dict[str, Any] = {"per_model": densities(0.5, 0.5), "options": {"seed": 3}}
    same(merged("della", [4, 1], [-2, 3], **settings), [4, 2])
    same(merged("della_linear", [4, 1], [-2, 3], **settings), [2, 4])


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.1), (0.5, 0.5)])
def test_della_refuses_probabilities_outside_of_0_to_1(density: float, epsilon: float) -> None:
    with pytest.raises(ValueError, match="inside"):
        merge64(case("della", [1, 2], per_model={"density": (density,), "epsilon": (epsilon,)}))
    same(merged("della", [1, 2], per_model={"density": (0.0,), "epsilon": (epsilon,)}), [0, 0])
    same(merged("della", [1, 2], per_model={"density": (1.0,), "epsilon": (epsilon,)}), [1, 2])


@pytest.mark.parametrize("method", [name for name in SUMS if not SUMS[name].election])
@pytest.mark.parametrize("rescale", [True, False])
def test_a_density_of_1_is_task_arithmetic(method: str, rescale: bool) -> None:
    random = np.random.RandomState(1)
    experts = [random.normal(size=(3, 7)).tolist() for _ in range(3)]
    options = {} if method == "task_arithmetic" else {"rescale": rescale}
    made = merged(method, *experts, w=(0.5, 0.3, -0.2), c=(1, 2, 0.5), scale=0.7, options=options)
    same(made, merged("task_arithmetic", *experts, w=(0.5, 0.3, -0.2), c=(1, 2, 0.5), scale=0.7).tolist())


@pytest.mark.parametrize("method", SUMS)
def test_one_expert_of_weight_1_is_itself(method: str) -> None:
    same(merged(method, [4, -3, 2, 1], base=[1, 2, 3, 4]), [4, -3, 2, 1])


@pytest.mark.parametrize("method", [name for name in SUMS if SUMS[name].election])
def test_experts_with_the_same_signs_elect_nothing_away(method: str) -> None:
    first, second = [4, -3, 2, 1], [1, -1, 5, 2]
    made = merged(method, first, second, w=(1, 0.5), options={"normalize": False})
    same(made, merged("task_arithmetic", first, second, w=(1, 0.5)).tolist())


# Averages of the models themselves


def test_linear() -> None:
    first, second = [1, 2, 3, 4], [5, -2, 3, 0]
    same(merged("linear", first, second, rootless=True), [3, 0, 3, 2])
    same(merged("linear", first, second, rootless=True, w=(3, 1)), [2, 1, 3, 3])
    same(merged("linear", first, second, rootless=True, w=(3, 1), options={"normalize": False}), [8, 4, 12, 12])
    # What the coefficients do not use goes to the base: (1.5 θ1 + 0.25 θ2 + 0.25 θ0) / 2
    same(merged("linear", first, second, base=[8, 8, 8, 0], c=(1.5, 0.25)), [2.375, 2.25, 3.625, 3])
    same(merged("linear", first, second, base=[8, 8, 8, 0]), [3, 0, 3, 2])


def test_slerp() -> None:
    base, other = [1, 0, 0, 0], [0, 2, 0, 0]
    for t, expected in ((0, base), (1, other), (0.5, [HALF, 2 * HALF, 0, 0]), (1 / 3, [math.sqrt(0.75), 1, 0, 0])):
        same(merged("slerp", other, base=base, options={"t": t}), expected)
    # 60 degrees, and a fourth of the way: sin 45 / sin 60 and sin 15 / sin 60
    third = [0.5, math.sqrt(0.75)]
    sines = [math.sin(math.radians(degrees)) for degrees in (45, 15, 60)]
    expected = [(sines[0] + sines[1] * third[0]) / sines[2], sines[1] * third[1] / sines[2]]
    same(merged("slerp", third, base=[1, 0], options={"t": 0.25}), expected, 1e-7)


def test_slerp_is_straight_where_the_models_are_parallel() -> None:
    for factor in (2, -3):
        along = [factor * value for value in (1, 2, 3, 4)]
        expected = [0.75 * value + 0.25 * factor * value for value in (1, 2, 3, 4)]
        same(merged("slerp", along, base=[1, 2, 3, 4], options={"t": 0.25}), expected)
    # cos of 1.8 degrees is 0.99951, and of 1.82 degrees 0.99950 (above and below 0.9995).
    for degrees, straight in ((1.8, True), (1.82, False)):
        angle = math.radians(degrees)
        other = [math.cos(angle), math.sin(angle)]
        made = np.linalg.norm(merged("slerp", other, base=[1, 0], options={"t": 0.5}))
        assert made == pytest.approx(math.cos(angle / 2) if straight else 1, abs=1e-6)


def test_slerp_from_zero_counts_as_a_right_angle() -> None:
    same(merged("slerp", [0, 2], base=[0, 0], options={"t": 1 / 3}), [0, 1])
    # So does a model of a norm up to 1e-8, parallel though it is.
    same(merged("slerp", [2, 0], base=[1e-9, 0], options={"t": 0.5}), [2 * HALF, 0], 1e-8)
    same(merged("slerp", [2, 0], base=[1e-7, 0], options={"t": 0.5}), [1, 0], 1e-6)


def test_nuslerp_of_whole_tensors() -> None:
    first, second = [1, 0, 0, 0], [0, 2, 0, 0]
    same(merged("nuslerp", first, second, rootless=True), [HALF, 2 * HALF, 0, 0])
    same(merged("nuslerp", first, second, rootless=True, w=(4, 2)), [math.sqrt(0.75), 1, 0, 0])
    # Weights that cancel mean the middle.
    same(merged("nuslerp", first, second, rootless=True, w=(1, -1)), [HALF, 2 * HALF, 0, 0])
    # Of the task vectors if there is a base.
    same(merged("nuslerp", [2, 5, 0, 0], [1, 7, 0, 0], base=[1, 5, 0, 0]), [1 + HALF, 5 + 2 * HALF, 0, 0])
    same(merged("nuslerp", first, first, rootless=True, w=(1, 3)), first)
    same(merged("nuslerp", first, [3, 0, 0, 0], rootless=True, w=(1, 3)), [2.5, 0, 0, 0])


def test_nuslerp_of_rows_and_of_columns() -> None:
    first, second = [[1, 0], [1, 0]], [[0, 1], [1, 0]]
    rows = {"nuslerp_flatten": False}
    same(merged("nuslerp", first, second, rootless=True, options=rows), [[HALF, HALF], [1, 0]])
    # Columns: (1, 1) and (0, 1) are 45 degrees apart: sin 22.5 / sin 45 of each. (0, 0) and (1, 0): a right angle.
    part = math.sin(math.radians(22.5)) / HALF
    columns = {**rows, "nuslerp_row_wise": True}
    same(merged("nuslerp", first, second, rootless=True, options=columns), [[part, HALF], [2 * part, 0]])
    # A vector is its own row and its own column.
    for options in (rows, columns):
        same(merged("nuslerp", [1, 0], [0, 2], rootless=True, options=options), [HALF, 2 * HALF])
    # Whole tensors: cos = 1 / 2, so 60 degrees: sin 30 / sin 60 of each.
    whole = 1 / math.sqrt(3)
    same(merged("nuslerp", first, second, rootless=True), [[whole, whole], [2 * whole, 0]])


def test_nuslerp_between_opposite_models_is_not_conditioned() -> None:
    assert not merge64(case("nuslerp", [1, 2, 3], [-1, -2, -3], rootless=True)).conditioned.any()


def test_multislerp() -> None:
    first, second = [1, 0, 0, 0], [0, 3, 0, 0]
    # The middle direction, and the mean length 2.
    same(merged("multislerp", first, second, rootless=True), [2 * HALF, 2 * HALF, 0, 0], 1e-7)
    same(merged("multislerp", first, second, rootless=True, w=(5, 5)), [2 * HALF, 2 * HALF, 0, 0], 1e-7)
    unnormalized = {"normalize_weights": False}
    same(merged("multislerp", first, second, rootless=True, options=unnormalized), [4 * HALF, 4 * HALF, 0, 0], 1e-7)
    # w = 0.8 and 0.6: already of length 1; mean length 0.8 · 1 + 0.6 · 3
    made = merged("multislerp", first, second, rootless=True, w=(0.8, 0.6), options=unnormalized)
    same(made, [0.8 * 2.6, 0.6 * 2.6, 0, 0], 1e-7)
    same(merged("multislerp", [2, 5], [1, 8], base=[1, 5]), [1 + 2 * HALF, 5 + 2 * HALF], 1e-7)
    same(merged("multislerp", [2, 5], base=[1, 4]), [2, 5])
    same(merged("multislerp", [1, 2], [-2, -4], rootless=True), [-0.5, -1])
    # A larger eps lessens a small model's say: 1 / (1 + 1) and 3 / (3 + 1). m = (0.25, 0.375) is shorter than it: the mean.
    same(merged("multislerp", first, second, rootless=True, options={"eps": 1.0}), [0.5, 1.5, 0, 0])
    # m = 8 (0.5, 0.75) = (4, 6), and a length of 8 · 1 + 8 · 3
    made = merged("multislerp", first, second, rootless=True, w=(8, 8), options={"eps": 1.0, **unnormalized})
    same(made, [32 * 4 / math.hypot(4, 6), 32 * 6 / math.hypot(4, 6), 0, 0])


def test_karcher_is_the_mean_of_angles() -> None:
    # 0, 0 and 90 degrees: 30 degrees. The mean of the vectors, which is where it starts, stands at 26.57 degrees.
    along, across = [1, 0, 0, 0], [0, 1, 0, 0]
    same(merged("karcher", along, along, across, rootless=True), [math.sqrt(0.75), 0.5, 0, 0], 1e-6)
    start = merged("karcher", along, along, across, rootless=True, options={"max_iter": 0})
    same(start, [2 / math.sqrt(5), 1 / math.sqrt(5), 0, 0])
    # Lengths do not turn it; its own length is their mean.
    same(merged("karcher", [2, 0], [1, 0], [0, 6], rootless=True), [3 * math.sqrt(0.75), 1.5], 1e-6)
    # A base is one model more.
    same(merged("karcher", along, across, base=along), [math.sqrt(0.75), 0.5, 0, 0], 1e-6)


def test_karcher_ends_where_the_steps_to_all_models_cancel() -> None:
    experts = [1, 0.1, 0, 0], [-0.3, 2, 0.4, 0], [0.2, -0.5, 3, 1]

    def step(point: NDArray[np.float64]) -> float:
        point = point / np.linalg.norm(point)
        total = np.zeros(4)
        for expert in experts:
            unit = np.array(expert) / np.linalg.norm(expert)
            across = unit - (unit @ point) * point
            total += math.acos(unit @ point) * across / np.linalg.norm(across)
        return float(np.linalg.norm(total))

    sizes = [step(merged("karcher", *experts, rootless=True, options={"max_iter": count})) for count in (0, 1, 10)]
    assert sizes[0] > 0.01
    assert sizes[0] > 2 * sizes[1] > 20 * sizes[2]
    assert sizes[2] < 3e-5
    assert step(merged("karcher", *experts, rootless=True)) == sizes[2]
    assert step(merged("karcher", *experts, rootless=True, options={"tol": 0.2})) == sizes[0]


def test_karcher_at_its_limits() -> None:
    same(merged("karcher", [1, 2], [1, 2], [1, 2], rootless=True), [1, 2])
    same(merged("karcher", [1, 2], rootless=True), [1, 2])
    # A model of zeros has no direction, but it has a length.
    same(merged("karcher", [1, 2], [0, 0], rootless=True), [0.5, 1])
    same(merged("karcher", [0, 0], [0, 0], rootless=True), [0, 0])
    assert not merge64(case("karcher", [1, 2], [-1, -2], rootless=True)).conditioned.any()


def test_model_stock() -> None:
    base = [1, 1, 1, 1]
    # cos = 1 / √2; T = 2 cos / (1 + cos); mean δ = (1, 0.5, 0, 0)
    ratio = 2 * HALF / (1 + HALF)
    same(merged("model_stock", [2, 1, 1, 1], [2, 2, 1, 1], base=base), [1 + ratio, 1 + ratio / 2, 1, 1])
    # Three pairs: cos = (1 + 0 + 0) / 3; T = 3 cos / (1 + 2 cos) = 0.6; mean δ = (2, 1) / 3
    same(merged("model_stock", [1, 0], [1, 0], [0, 1]), [0.4, 0.2])
    same(merged("model_stock", [3, 4], [3, 4], base=[1, 1]), [3, 4])
    same(merged("model_stock", [1, 0], [0, 1]), [0, 0])
    # Opposite ones: no divisor, so the base. One that is the base has no angle: cos = 0.
    same(merged("model_stock", [6, 5], [3, 5], base=[5, 5]), [5, 5])
    same(merged("model_stock", [1, 0], [0, 0]), [0, 0])
    # Tiny task vectors have their angle as large ones do.
    same(merged("model_stock", [1e-5, 0], [1e-5, 1e-5]), [1e-5 * ratio, 0.5e-5 * ratio], 1e-11)


def test_model_stock_row_by_row() -> None:
    first, second = [[1, 0], [2, 0]], [[1, 0], [0, 2]]
    same(merged("model_stock", first, second, options={"filter_wise": True}), [[1, 0], [0, 0]])
    # Whole: cos = 1 / 5; T = 0.4 / 1.2; mean δ = ((1, 0), (1, 1))
    same(merged("model_stock", first, second), [[1 / 3, 0], [1 / 3, 1 / 3]])


def test_sce() -> None:
    first, second = [1, 2, 3, 4], [1, -2, 1, 0]
    # Mean squares 30 / 4 and 6 / 4: weights 5/6 and 1/6. s = (2, 0, 4, 4): all plus.
    whole = merge64(case("sce", first, second))
    same(whole.exact, [1, 2, (5 * 3 + 1) / 6, 4])
    assert whole.conditioned.tolist() == [True, False, True, True]
    # Variances (0, 4, 1, 4): int(0.4 · 3) = 1 is kept, and with it its equal. Mean squares 20 / 4 and 4 / 4.
    picked = merge64(case("sce", first, second, options={"select_topk": 0.4}))
    same(picked.exact, [0, 2, 0, 4])
    assert picked.kept is not None
    assert picked.kept.tolist() == [[False, True, False, True]] * 2
    # int(0.3 · 3) = 0
    same(merged("sce", first, second, base=[1, 1, 1, 1], options={"select_topk": 0.3}), [1, 1, 1, 1])
    same(merged("sce", first, first, options={"select_topk": 0.9}), [0, 0, 0, 0])
    same(merged("sce", first, first), first)


def test_sce_weights_are_those_of_the_masked_task_vectors() -> None:
    first, second = [3, 1, 0, 0], [-1, 2, 0, 9]
    # Variances (4, 0.25, 0, 20.25): int(0.7 · 3) = 2 are kept, the first and the last.
    # Mean squares 9 / 4 and 82 / 4; s = (2, ., ., 9). The second expert does not agree in the first place.
    same(merged("sce", first, second, options={"select_topk": 0.7}), [3, 0, 0, 9])
    # In the same direction: (9 · 3 + 82 · 1) / 91
    same(merged("sce", first, [1, 2, 0, 9], options={"select_topk": 0.7}), [(9 * 3 + 82) / 91, 0, 0, 9])


def test_nearswap_moves_by_at_most_t() -> None:
    same(merged("nearswap", [0.5, 1, 2, -4], options={"t": 1.0}), [0.5, 1, 1, -1])
    same(merged("nearswap", [3, 1, 0, 2], base=[1, 1, 1, 2], options={"t": 0.5}), [1.5, 1, 0.5, 2])
    # Differences below 1e-6 count as 1e-6: a tenth of the way.
    same(merged("nearswap", [1e-8, 1], options={"t": 1e-7}), [1e-9, 1e-7], 1e-15)


def test_arcee_fusion_takes_what_matters_most() -> None:
    # Base rows (0, 0), expert rows (ln x, 0): p = (x, 1) / (x + 1) against (1, 1) / 2.
    # x          3        2        1.5       1.1
    # KL         0.13081  0.05663  0.02014   0.00113
    # importance 0.14371  0.03926  0.008164  0.000108, and four zeros
    # Places 1, 3 and 5 of eight, ascending: 0, 0 and 0.008164. Threshold 1.5 · 0.008164 = 0.0122.
    expert = [[math.log(x), 0] for x in (3, 1.1, 2, 1.5)]
    result = merge64(case("arcee_fusion", expert))
    same(result.exact, [[math.log(3), 0], [0, 0], [math.log(2), 0], [0, 0]], 1e-7)
    assert result.kept is not None
    assert result.kept.tolist() == [[True, False, False, False, True, False, False, False]]
    # x = 10, 20, 40, 100: importance 0.96, 1.5030, 2.1340, 2.9363 and threshold 1.5 · 1.5030 = 2.2545. (The divergence the
    # other way round would be 2.5569 and 4.3381 for 20 and 40, and would take 40 too.)
    expert = [[math.log(x), 0] for x in (10, 20, 40, 100)]
    same(merged("arcee_fusion", expert), [[0, 0], [0, 0], [0, 0], [math.log(100), 0]], 1e-6)
    # One row: importance is |δ| times one number. Places floor(2.75), floor(5.5) and floor(8.25) of twelve: 3, 6 and 9, so the
    # threshold is 15; interpolated quartiles would give 14.75.
    row = [3, 12, -15.2, 1, -2, 9, 4, 7, 8, 5, -6, 14.8]
    same(merged("arcee_fusion", row), [-15.2 if value == -15.2 else 0 for value in row], 1e-6)
    # Equal models: every importance is 0, and so is the threshold.
    same(merged("arcee_fusion", [1, 2, 3], base=[1, 2, 3]), [1, 2, 3])


def test_passthrough() -> None:
    same(merged("passthrough", [1, 2], rootless=True), [1, 2])
    same(merged("passthrough", [1, 2], rootless=True, per_model={"scale": (0.5,)}), [0.5, 1])


# Shapes and refusals

EVERY: Mapping[str, dict[str, Any]] = {
    **{name: {} for name in (*SUMS, "linear", "multislerp", "karcher", "sce")},
    "slerp": {"options": {"t": 0.5}},
    "nearswap": {"options": {"t": 0.5}},
    "nuslerp": {},
    "model_stock": {},
    "arcee_fusion": {},
    "passthrough": {},
}
ONE_EXPERT = ("slerp", "nearswap", "arcee_fusion", "passthrough")


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 4), (0,), (0, 4)])
@pytest.mark.parametrize("method", EVERY)
def test_every_method_keeps_the_shape(method: str, shape: tuple[int, ...]) -> None:
    random = np.random.RandomState(2)
    tensors = [np.asarray(random.normal(size=shape), dtype=np.float32) for _ in range(3)]
    experts = tuple(tensors[1 : 2 if method in ONE_EXPERT else 3])
    result = merge64(Case(method, tensors[0], experts, ("a", "b")[: len(experts)], **EVERY[method]))
    assert result.exact.shape == result.conditioned.shape == shape
    assert result.exact.dtype == np.float64
    assert np.all(np.isfinite(result.exact))


@pytest.mark.parametrize("flag", [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}])
def test_nuslerp_of_more_dimensions_takes_vectors_along_one(flag: dict[str, bool]) -> None:
    random = np.random.RandomState(3)
    first, second = (random.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(2))
    made = merge64(Case("nuslerp", None, (first, second), ("a", "b"), options=flag)).exact
    alone = merge64(
        Case("nuslerp", None, (first[:, 1, 2], second[:, 1, 2]), ("a", "b"))
        if "nuslerp_row_wise" in flag
        else Case("nuslerp", None, (first[1, 2], second[1, 2]), ("a", "b"))
    ).exact
    same(made[:, 1, 2] if "nuslerp_row_wise" in flag else made[1, 2], alone.tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        case("ties", [1, 2], options={"densty": 1}),
        case("ties", [1, 2], options={"rescale": "keep"}),
        case("task_arithmetic", [1, 2], rootless=True),
        case("task_arithmetic", [1, 2], [3, 4], w=(1, -1), options={"normalize": True}),
        case("linear", [1, 2], [3, 4], w=(1, -1), rootless=True),
        case("linear", [1, 2], [3, 4], c=(1, 2), rootless=True),
        case("slerp", [1, 2]),
        case("slerp", [1, 2], [3, 4], options={"t": 0.5}),
        case("slerp", [1, 2], options={"t": 0.5}, scale=2.0),
        case("sce", [1, 2], [3, 4], c=(1, 2)),
        case("nuslerp", [1, 2]),
        case("model_stock", [1, 2]),
        case("passthrough", [1, 2], [3, 4]),
    ],
    ids=lambda wrong: wrong.method,
)
def test_what_no_recipe_may_say_is_refused(wrong: Case) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        merge64(wrong)
