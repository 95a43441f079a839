"""Every merge method in float64, one tensor at a time, from the methods' definitions alone.

A second reading of what each method means: whole arrays are sorted, rows are taken one by one, nothing is clever, and
nothing of `sensmerge` is imported but the random draws, whose numbers are part of what a recipe means. Symbols: K experts
θ_k, the base θ_0, δ_k = float32(θ_k - θ_0), weights w_k, Sens coefficients c_k, λ. n elements; a row is a vector along the
last dimension (a 1-D tensor is one row, a scalar one row of one).

Papers: task arithmetic 2212.04089, TIES 2306.01708, DARE 2311.03099, Model Breadcrumbs 2312.06795, DELLA 2406.11617,
Model Stock 2403.19522, SCE (FuseChat-3) 2408.07990; the others have no paper or only a blog post.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sensmerge.randomness import uniforms

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

CANCELLED = 1e-6
"""A signed sum below this part of the sum of its parts' magnitudes has lost too many digits to decide anything."""


@dataclass(frozen=True)
class Case:
    """One tensor to merge, with everything that its merge depends on."""

    method: str
    base: F32 | None
    experts: tuple[F32, ...]
    names: tuple[str, ...]
    """The experts' model strings: they key the draws."""
    tensor: str = "model.layers.0.mlp.up_proj.weight"
    w: tuple[float, ...] = ()
    """Weights; empty means all 1."""
    c: tuple[float, ...] = ()
    """Sens coefficients; empty means all 1 (a plain merge)."""
    scale: float = 1.0
    """λ."""
    options: Mapping[str, object] = field(default_factory=dict)
    """The method's shared options as a recipe writes them."""
    per_model: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Options with a value for each expert: density, gamma, epsilon, scale."""
    thresholds: tuple[float, ...] | None = None
    """ties with `scope: global`: the smallest magnitude that each expert keeps."""


@dataclass(frozen=True)
class Merged:
    """A merged tensor."""

    exact: F64
    """The result before it is rounded to any output type, in the tensor's shape."""
    kept: Bool | None
    """[K, n]: which entries of each task vector a method that selects has selected; None where nothing is selected."""
    conditioned: Bool
    """The tensor's shape: False where a sum that decides or divides cancels below CANCELLED. Do not compare there."""


@dataclass(frozen=True)
class _Sum:
    """What one method of the form θ_0 + λ U is made of."""

    sparsifier: str
    election: bool
    normalize: bool
    rescale: str
    """The default."""
    rescales: tuple[str, ...] = ()
    """The kinds that the method has; the first one is what `rescale: true` means."""


SUMS: Mapping[str, _Sum] = {
    "task_arithmetic": _Sum("none", election=False, normalize=False, rescale="none"),
    "ties": _Sum("magnitude", election=True, normalize=True, rescale="none", rescales=("l1", "none")),
    "dare_linear": _Sum("drop", election=False, normalize=False, rescale="keep", rescales=("keep", "none", "l1")),
    "dare_ties": _Sum("drop", election=True, normalize=False, rescale="keep", rescales=("keep", "none", "l1")),
    "breadcrumbs": _Sum("band", election=False, normalize=False, rescale="none", rescales=("l1", "none")),
    "breadcrumbs_ties": _Sum("band", election=True, normalize=False, rescale="none", rescales=("l1", "none")),
    "della": _Sum("magprune", election=True, normalize=True, rescale="l1", rescales=("l1", "keep", "none")),
    "della_linear": _Sum("magprune", election=False, normalize=False, rescale="l1", rescales=("l1", "keep", "none")),
}

_SPARSE = ("rescale", "normalize", "int8_mask")
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "task_arithmetic": ("normalize",),
    "ties": (*_SPARSE, "scope"),
    "dare_linear": (*_SPARSE, "seed"),
    "dare_ties": (*_SPARSE, "seed"),
    "breadcrumbs": _SPARSE,
    "breadcrumbs_ties": _SPARSE,
    "della": (*_SPARSE, "seed"),
    "della_linear": (*_SPARSE, "seed"),
    "linear": ("normalize",),
    "slerp": ("t",),
    "nuslerp": ("nuslerp_flatten", "nuslerp_row_wise"),
    "multislerp": ("normalize_weights", "eps"),
    "karcher": ("max_iter", "tol"),
    "model_stock": ("filter_wise",),
    "sce": ("select_topk", "int8_mask"),
    "nearswap": ("t",),
    "arcee_fusion": (),
    "passthrough": (),
}


def merge64(case: Case) -> Merged:
    """The merged tensor. Raises ValueError for a case that no recipe may describe."""
    if unknown := set(case.options) - set(OPTIONS[case.method]):
        raise ValueError(f"{case.method} has no option {sorted(unknown)}")
    if len(case.names) != len(case.experts) or not case.experts:
        raise ValueError("one name an expert, and at least one expert")
    if case.method not in SUMS:
        if case.scale != 1.0:
            raise ValueError(f"{case.method} has no lambda")
        if case.method != "linear" and any(c != 1.0 for c in case.c):
            raise ValueError(f"{case.method} takes no coefficients")
    shape = case.experts[0].shape
    if not case.experts[0].size:
        return Merged(np.zeros(shape), None, np.ones(shape, dtype=np.bool_))
    exact, kept, conditioned = _METHODS[case.method](case)
    return Merged(exact.reshape(shape), kept, np.broadcast_to(conditioned, exact.shape).reshape(shape).copy())


def global_thresholds(tensors: Sequence[Case]) -> tuple[float, ...]:
    """For `ties` with `scope: global`: the smallest magnitude that each expert keeps anywhere, over all its tensors."""
    thresholds = []
    for k, density in enumerate(_per_model(tensors[0], "density", 1.0)):
        if any(_per_model(case, "density", 1.0)[k] != density for case in tensors):
            raise ValueError("with `scope: global` an expert has one density")
        magnitudes = np.concatenate([np.abs(_deltas(case)[k]) for case in tensors])
        thresholds.append(_kth_magnitude(magnitudes, density))
    return tuple(thresholds)


# What a case says.


def _flat(values: F32) -> F64:
    return values.astype(np.float64).reshape(-1)


def _base(case: Case) -> F32:
    if case.base is None:
        raise ValueError(f"{case.method} needs a base")
    return case.base


def _deltas(case: Case) -> F64:
    """The task vectors [K, n], each rounded to float32 and then held in float64."""
    base = _base(case)
    return np.stack([_flat(np.subtract(expert, base, dtype=np.float32)) for expert in case.experts])


def _rows(flat: F64, shape: tuple[int, ...]) -> F64:
    """[rows, columns] of a flat tensor."""
    return flat.reshape(-1, shape[-1]) if shape else flat.reshape(1, 1)


def _weights(case: Case) -> F64:
    return np.array(case.w or [1.0] * len(case.experts), dtype=np.float64)


def _coefficients(case: Case) -> F64:
    return np.array(case.c or [1.0] * len(case.experts), dtype=np.float64)


def _per_model(case: Case, name: str, default: float) -> tuple[float, ...]:
    return tuple(case.per_model.get(name, (default,) * len(case.experts)))


def _number(case: Case, name: str, default: float | None = None) -> float:
    value = case.options.get(name, default)
    if not isinstance(value, (int, float)):
        raise ValueError(f"{case.method} needs a number as {name}")
    return float(value)


def _cancels(total: F64, parts: F64) -> Bool:
    """Where |total| is lost in the sum of the magnitudes [n] of its parts [K, n]."""
    return np.abs(total) < CANCELLED * np.abs(parts).sum(axis=0)


_Result = tuple[F64, Bool | None, Bool | np.bool_ | bool]
"""(the merged tensor, flat or in any shape; kept; conditioned)"""


# θ_0 + λ U


def _kth_magnitude(magnitudes: F64, density: float) -> float:
    """The smallest magnitude that a trim to `density` keeps."""
    if density >= 1:
        return 0.0
    if density <= 0:
        return math.inf
    k = max(1, int(density * magnitudes.size))
    return float(np.sort(magnitudes)[::-1][k - 1])


def _magnitude_mask(case: Case, k: int, delta: F64) -> tuple[Bool, F64]:
    magnitudes = np.abs(delta)
    if case.options.get("scope", "tensor") == "global":
        assert case.thresholds is not None, "`scope: global` needs the thresholds of all tensors"
        threshold = case.thresholds[k]
    else:
        threshold = _kth_magnitude(magnitudes, _per_model(case, "density", 1.0)[k])
    return magnitudes >= threshold, np.ones(delta.size)


def _drop_mask(case: Case, k: int, delta: F64) -> tuple[Bool, F64]:
    density = _per_model(case, "density", 1.0)[k]
    draws = uniforms(_seed(case), case.names[k], case.tensor, 0, delta.size)
    return draws < density, np.full(delta.size, density)


def _band_mask(case: Case, k: int, delta: F64) -> tuple[Bool, F64]:
    density, gamma = _per_model(case, "density", 1.0)[k], _per_model(case, "gamma", 0.01)[k]
    n, magnitudes = delta.size, np.abs(delta)
    chances = np.ones(n)
    if density >= 1:
        return np.ones(n, dtype=np.bool_), chances
    target, top = int(density * n), int(gamma * n)
    if target == 0:
        return np.zeros(n, dtype=np.bool_), chances
    bottom = max(0, n - target - top)
    ascending = np.sort(magnitudes)
    lowest, highest = ascending[bottom], ascending[bottom + target - 1]
    return (lowest <= magnitudes) & (magnitudes <= highest), chances


def _magprune_mask(case: Case, k: int, delta: F64) -> tuple[Bool, F64]:
    density, epsilon = _per_model(case, "density", 1.0)[k], _per_model(case, "epsilon", 0.15)[k]
    n = delta.size
    if density >= 1:
        return np.ones(n, dtype=np.bool_), np.ones(n)
    if density <= 0:
        return np.zeros(n, dtype=np.bool_), np.ones(n)
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError("density - epsilon and density + epsilon must lie inside (0, 1)")
    chances = magprune_chances(_rows(delta, case.experts[0].shape), density, epsilon).reshape(-1)
    return uniforms(_seed(case), case.names[k], case.tensor, 0, n) < chances, chances


def magprune_chances(rows: F64, density: float, epsilon: float) -> F64:
    """DELLA's probability of keeping each entry: it rises along each row's ranks from density - ε to density + ε."""
    chances = np.full(rows.shape, density)
    columns = rows.shape[-1]
    if columns == 1:
        return chances
    for row, chance in zip(rows, chances, strict=True):
        # A stable sort: of equal magnitudes, the earlier one has the lower rank.
        for rank, place in enumerate(np.argsort(np.abs(row), kind="stable")):
            chance[place] = (density - epsilon) + 2 * epsilon * rank / (columns - 1)
    return chances


def _keep_all(case: Case, k: int, delta: F64) -> tuple[Bool, F64]:
    return np.ones(delta.size, dtype=np.bool_), np.ones(delta.size)


_MASKS: Mapping[str, Callable[[Case, int, F64], tuple[Bool, F64]]] = {
    "none": _keep_all,
    "magnitude": _magnitude_mask,
    "drop": _drop_mask,
    "band": _band_mask,
    "magprune": _magprune_mask,
}
"""Each returns (kept [n], the probability [n] with which `rescale: keep` divides)."""


def _seed(case: Case) -> int:
    return int(_number(case, "seed", 0))


def _rescale_kind(case: Case) -> str:
    method = SUMS[case.method]
    asked = case.options.get("rescale", method.rescale)
    if asked is True:
        return method.rescales[0]
    if asked is False:
        return "none"
    if asked not in (method.rescales or ("none",)):
        raise ValueError(f"{case.method} cannot rescale by {asked!r}")
    return str(asked)


def _sparsified(case: Case, k: int, delta: F64) -> tuple[F64, Bool]:
    """(t_k, which of its entries are kept)."""
    kept, chances = _MASKS[SUMS[case.method].sparsifier](case, k, delta)
    t = np.where(kept, delta, 0.0)
    kind = _rescale_kind(case)
    if kind == "keep":
        t[kept] /= chances[kept]
    if kind == "l1":
        before, after = math.fsum(np.abs(delta)), math.fsum(np.abs(t))
        if after != 0:
            t *= before / after
    return t, kept


def _task_vector_sum(case: Case) -> _Result:
    method = SUMS[case.method]
    base, deltas, w = _flat(_base(case)), _deltas(case), _weights(case)
    normalize = bool(case.options.get("normalize", method.normalize))
    sparse = [_sparsified(case, k, delta) for k, delta in enumerate(deltas)]
    parts = np.stack([wk * ck * t for wk, ck, (t, _) in zip(w, _coefficients(case), sparse, strict=True)])
    kept = None if method.sparsifier == "none" else np.stack([mask for _, mask in sparse])
    if not method.election:
        total = parts.sum(axis=0)
        if normalize:
            if math.fsum(w) == 0:
                raise ValueError("the weights sum to zero")
            total = total / math.fsum(w)
        return base + case.scale * total, kept, True
    total, conditioned = _elected(parts, parts, w if normalize else None)
    return base + case.scale * total, kept, conditioned


def _elected(votes: F64, parts: F64, divisors: F64 | None) -> tuple[F64, Bool]:
    """(the sum of `parts` [K, n] whose votes agree with the elected sign, over the sum of their divisors; conditioned).

    The elected sign is that of the sum of `votes`, plus where the sum is 0. A vote of 0 agrees with neither sign. Where the
    divisors of those that agree sum to 0 the result is 0.
    """
    ballot = votes.sum(axis=0)
    elected = np.where(ballot >= 0, 1.0, -1.0)
    agrees = np.sign(votes) == elected
    conditioned = ~_cancels(ballot, votes)
    total = np.where(agrees, parts, 0.0).sum(axis=0)
    if divisors is None:
        return total, conditioned
    column = np.where(agrees, divisors[:, None], 0.0)
    divisor = column.sum(axis=0)
    # Weights of both signs: a divisor that is nothing but rounding. A true zero has a meaning of its own.
    conditioned &= ~(_cancels(divisor, column) & (divisor != 0))
    return np.divide(total, divisor, out=np.zeros_like(total), where=divisor != 0), conditioned


def _sce(case: Case) -> _Result:
    """Select, calculate, erase."""
    base, deltas = _flat(_base(case)), _deltas(case)
    count = len(deltas)
    topk = _number(case, "select_topk", 1.0)
    selected = np.ones(base.size, dtype=np.bool_)
    if topk < 1:
        mean = deltas.sum(axis=0) / count
        variance = (((deltas - mean) ** 2).sum(axis=0) / count).astype(np.float32)
        k = int(np.count_nonzero(variance) * topk)
        selected = variance >= np.sort(variance)[::-1][k - 1] if k > 0 else np.zeros(base.size, dtype=np.bool_)
    t = np.where(selected, deltas, 0.0)
    squares = np.array([math.fsum(row**2) / row.size for row in t])
    total = math.fsum(squares)
    weights = squares / total if total > 0 else np.full(count, 1 / count)
    update, conditioned = _elected(t, weights[:, None] * t, weights)
    return base + update, np.broadcast_to(selected, deltas.shape).copy(), conditioned


# Averages of the models themselves


def _linear(case: Case) -> _Result:
    w, wc = _weights(case), _weights(case) * _coefficients(case)
    total = sum((k * _flat(expert) for k, expert in zip(wc, case.experts, strict=True)), np.zeros(case.experts[0].size))
    if np.any(w != wc):
        # Coefficients shift weight between an expert and the base, so that the sum stays Σ w.
        total = total + (math.fsum(w) - math.fsum(wc)) * _flat(_base(case))
    if case.options.get("normalize", True):
        if math.fsum(w) == 0:
            raise ValueError("the weights sum to zero")
        total = total / math.fsum(w)
    return total, None, True


def _norm(x: F64) -> float:
    return math.sqrt(math.fsum(x**2))


def _clamped(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def _blend(at: float, a: F64, bt: float, b: F64) -> tuple[F64, Bool]:
    """(at a + bt b, conditioned)."""
    return at * a + bt * b, ~_cancels(at * a + bt * b, np.stack([at * a, bt * b]))


def _arc(t: float, cosine: float, a: F64, b: F64) -> tuple[F64, Bool]:
    """The point at t of the great arc from a to b, whose angle has this cosine."""
    omega = math.acos(cosine)
    return _blend(math.sin((1 - t) * omega) / math.sin(omega), a, math.sin(t * omega) / math.sin(omega), b)


def _slerp(case: Case) -> _Result:
    a, b, t = _flat(_base(case)), _flat(_only(case)), _number(case, "t")
    norm_a, norm_b = (norm if norm > 1e-8 else 1.0 for norm in (_norm(a), _norm(b)))
    dot = _clamped(math.fsum((a / norm_a) * (b / norm_b)), -1, 1)
    result, conditioned = _blend(1 - t, a, t, b) if abs(dot) > 0.9995 else _arc(t, dot, a, b)
    return result, None, conditioned


def _only(case: Case) -> F32:
    if len(case.experts) != 1:
        raise ValueError(f"{case.method} takes one model beside the base")
    return case.experts[0]


def _nuslerp(case: Case) -> _Result:
    if len(case.experts) != 2:
        raise ValueError("nuslerp takes two models beside the base")
    w1, w2 = _weights(case)
    t = 0.5 if abs(w1 + w2) < 1e-6 else float(w2 / (w1 + w2))
    flatten, row_wise = case.options.get("nuslerp_flatten", True), case.options.get("nuslerp_row_wise", False)
    shape = (-1,) if flatten or not case.experts[0].shape else case.experts[0].shape
    axis = 0 if row_wise else -1
    first, second = (np.moveaxis(x.reshape(shape), axis, -1) for x in _vectors(case))
    result, conditioned = np.zeros(first.shape), np.ones(first.shape, dtype=np.bool_)
    for place in np.ndindex(first.shape[:-1]):
        a, b = first[place], second[place]
        cosine = _clamped(math.fsum((a / max(_norm(a), 1e-7)) * (b / max(_norm(b), 1e-7))), -1, 1)
        colinear = 1 - cosine**2 <= 1e-16
        result[place], conditioned[place] = _blend(1 - t, a, t, b) if colinear else _arc(t, cosine, a, b)
    result, conditioned = np.moveaxis(result, -1, axis), np.moveaxis(conditioned, -1, axis)
    return _from_origin(case, result.reshape(-1)), None, conditioned.reshape(-1)


def _vectors(case: Case) -> list[F64]:
    """What is interpolated: task vectors if there is a base, the models if there is none."""
    return [_flat(expert) for expert in case.experts] if case.base is None else list(_deltas(case))


def _from_origin(case: Case, vector: F64) -> F64:
    return vector if case.base is None else _flat(case.base) + vector


def _multislerp(case: Case) -> _Result:
    if len(case.experts) == 1:
        return _flat(case.experts[0]), None, True
    vectors, w = _vectors(case), _weights(case)
    eps = _number(case, "eps", 1e-8)
    if case.options.get("normalize_weights", True):
        if math.fsum(w) == 0:
            raise ValueError("the weights sum to zero")
        w = w / math.fsum(w)
    middle = sum((wi * x / (_norm(x) + eps) for wi, x in zip(w, vectors, strict=True)), np.zeros(vectors[0].size))
    length = _norm(middle)
    if length < eps:
        flat = sum((wi * x for wi, x in zip(w, vectors, strict=True)), np.zeros(vectors[0].size))
        return _from_origin(case, flat), None, True
    size = math.fsum(wi * _norm(x) for wi, x in zip(w, vectors, strict=True))
    # Directions that nearly cancel: what remains of the middle is rounding.
    conditioned = length >= CANCELLED * math.fsum(np.abs(w))
    return _from_origin(case, size * middle / length), None, conditioned


def _karcher(case: Case) -> _Result:
    """The point of the unit sphere with the least sum of squared angles to all models, found by gradient steps."""
    models = [_flat(expert) for expert in case.experts]
    if case.base is not None:
        models = [_flat(case.base), *models]
    if len(models) == 1:
        return models[0], None, True
    steps, tol = int(_number(case, "max_iter", 10)), _number(case, "tol", 1e-5)
    units = [x / _norm(x) for x in models if _norm(x) > tol]
    if not units:
        return np.zeros(models[0].size), None, True
    mean_norm = math.fsum(_norm(x) for x in models) / len(models)
    mean = sum(units, np.zeros(models[0].size)) / len(units)
    # Opposite models: the start, or the direction of a step, is rounding.
    conditioned = _norm(mean) >= CANCELLED
    mean = units[0] if _norm(mean) < tol else mean / _norm(mean)
    for _ in range(steps):
        step = np.zeros(mean.size)
        for unit in units:
            cosine = _clamped(math.fsum(mean * unit), -1, 1)
            angle = math.acos(cosine)
            if angle < tol:
                continue
            conditioned = conditioned and math.pi - angle > CANCELLED
            step += angle / math.sin(angle) * (unit - cosine * mean) / len(units)
        length = _norm(step)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
        mean = mean / _norm(mean)
    return mean_norm * mean, None, conditioned


def _model_stock(case: Case) -> _Result:
    base, deltas = _flat(_base(case)), _deltas(case)
    count = len(deltas)
    if count < 2:
        raise ValueError("model_stock takes two experts or more")
    shape = case.experts[0].shape if case.options.get("filter_wise", False) else (base.size,)
    groups = np.stack([_rows(delta, shape) for delta in deltas])  # [K, groups, length]
    update, conditioned = np.zeros(groups.shape[1:]), np.ones(groups.shape[1:], dtype=np.bool_)
    for at in range(groups.shape[1]):
        vectors = groups[:, at]
        cosines = [_cosine(vectors[i], vectors[j]) for i in range(count) for j in range(i + 1, count)]
        cosine = math.fsum(cosines) / len(cosines)
        divisor = 1 + (count - 1) * cosine
        ratio = 0.0 if abs(divisor) < 1e-6 else count * cosine / divisor
        update[at] = ratio * vectors.sum(axis=0) / count
        # Well below 1e-6 the base stays; about there and a little above, the ratio is rounding.
        conditioned[at] = not 0.5e-6 < abs(divisor) < 1e-5
    return base + update.reshape(-1), None, conditioned.reshape(-1)


def _cosine(a: F64, b: F64) -> float:
    norms = _norm(a) * _norm(b)
    return 0.0 if norms == 0 else _clamped(math.fsum(a * b) / norms, -1, 1)


def _nearswap(case: Case) -> _Result:
    a, b, t = _flat(_base(case)), _flat(_only(case)), _number(case, "t")
    fraction = np.clip(t / np.maximum(np.abs(_deltas(case)[0]), 1e-6), 0, 1)
    return fraction * b + (1 - fraction) * a, None, True


def _softmax(row: F64) -> F64:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def _arcee_fusion(case: Case) -> _Result:
    a, b = _flat(_base(case)), _flat(_only(case))
    shape = case.experts[0].shape
    importance = _rows(np.abs(_deltas(case)[0]), shape).copy()
    for scores, base_row, expert_row in zip(importance, _rows(a, shape), _rows(b, shape), strict=True):
        p, q = _softmax(expert_row) + 1e-8, _softmax(base_row) + 1e-8
        scores *= math.fsum(p * np.log(p / q))
    rounded = importance.reshape(-1).astype(np.float32)
    ascending = np.sort(rounded).astype(np.float64)
    low, median, high = (float(ascending[int(q * (rounded.size - 1))]) for q in (0.25, 0.5, 0.75))
    taken = rounded.astype(np.float64) >= median + 1.5 * (high - low)
    return np.where(taken, b, a), taken[None, :], True


def _passthrough(case: Case) -> _Result:
    if len(case.experts) != 1:
        raise ValueError("passthrough takes one model")
    return _flat(case.experts[0]) * _per_model(case, "scale", 1.0)[0], None, True


_METHODS: Mapping[str, Callable[[Case], _Result]] = {
    **dict.fromkeys(SUMS, _task_vector_sum),
    "linear": _linear,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
    "sce": _sce,
    "nearswap": _nearswap,
    "arcee_fusion": _arcee_fusion,
    "passthrough": _passthrough,
}
