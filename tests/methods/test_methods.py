"""Every method through the engine, against the float64 oracle, at non-default values of every option and in awkward shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensmerge.methods import METHODS
from tests.execution.plans import random_case, run
from tests.oracle.methods64 import Case, global_thresholds, merge64

# Scalars, vectors, matrices whose rows do and do not divide a tile, more than one tile, three dimensions, one row, one column.
SHAPES = {
    "s": (),
    "one": (1,),
    "v": (37,),
    "m": (61, 24),
    "tall": (700, 100),
    "cube": (5, 7, 11),
    "row": (1, 90),
    "column": (90, 1),
}

THIRDS: dict[str, Any] = {"density": (0.2, 0.5, 0.8)}

# method -> (how the models are given, settings of each variant). Together the variants name every option at a non-default value.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"options": {"normalize": False}}, {"c": (0.5, 1.5, 2.0)}],
    "task_arithmetic": [{}, {"options": {"normalize": True}, "scale": 0.7}, {"c": (0.5, 1.5, 0.0), "scale": 1.3}],
    "ties": [
        {"per_model": {"density": (0.3,) * 3}},
        {"per_model": THIRDS, "options": {"normalize": False}, "scale": 0.6, "w": (0.5, -0.7, 1.0)},
        {"per_model": THIRDS, "options": {"rescale": True}, "c": (0.9, 1.1, 1.3)},
        {"per_model": {"density": (0.0, 1.0, 0.5)}, "options": {"int8_mask": True}},
    ],
    "dare_linear": [
        {"per_model": THIRDS},
        {"per_model": THIRDS, "options": {"rescale": "none", "seed": 7}, "scale": 0.5},
        {"per_model": THIRDS, "options": {"rescale": "l1", "normalize": True}, "c": (0.5, 1.0, 2.0)},
    ],
    "dare_ties": [
        {"per_model": THIRDS},
        {"per_model": THIRDS, "options": {"rescale": False, "seed": 3, "normalize": True}, "c": (0.5, 1.0, 2.0)},
        {"per_model": {"density": (0.0, 1.0, 0.5)}, "options": {"rescale": "l1"}},
    ],
    "breadcrumbs": [
        {"per_model": THIRDS},
        {"per_model": {**THIRDS, "gamma": (0.0, 0.1, 0.3)}, "options": {"rescale": "l1"}, "scale": 0.8},
        {"per_model": {"density": (0.0, 1.0, 0.9), "gamma": (0.1, 0.1, 0.4)}, "options": {"normalize": True}, "c": (1.0, 2.0, 3.0)},
    ],
    "breadcrumbs_ties": [
        {"per_model": {**THIRDS, "gamma": (0.05, 0.1, 0.15)}},
        {"per_model": THIRDS, "options": {"normalize": True, "rescale": True}, "c": (0.5, 1.0, 2.0)},
    ],
    "della": [
        {"per_model": {"density": (0.4, 0.5, 0.6)}},
        {
            "per_model": {"density": (0.4, 0.5, 0.6), "epsilon": (0.05, 0.3, 0.0)},
            "options": {"rescale": "keep", "seed": 11, "normalize": False},
            "c": (0.5, 1.0, 2.0),
        },
        {"per_model": {"density": (0.0, 1.0, 0.5)}, "options": {"rescale": "none"}, "scale": 0.4},
    ],
    "della_linear": [
        {"per_model": {"density": (0.4, 0.5, 0.6), "epsilon": (0.1, 0.2, 0.3)}},
        {
            "per_model": {"density": (0.3,) * 3},
            "options": {"rescale": "keep", "normalize": True, "seed": 5},
            "c": (1.0, 0.5, 0.2),
        },
    ],
    "slerp": [{"options": {"t": 0.3}}, {"options": {"t": 1.0}}, {"options": {"t": -0.2}}],
    "nuslerp": [
        {},
        {"base": None},
        {"options": {"nuslerp_flatten": False}},
        {"options": {"nuslerp_flatten": False, "nuslerp_row_wise": True}, "w": (0.2, 1.4)},
        {"options": {"nuslerp_flatten": False}, "base": None, "w": (1.0, -1.0)},
    ],
    "multislerp": [
        {},
        {"base": None},
        {"options": {"normalize_weights": False, "eps": 1e-3}},
        {"experts": 1},
    ],
    "karcher": [{"base": None}, {"base": None, "options": {"max_iter": 1, "tol": 1e-3}}],
    "model_stock": [{}, {"options": {"filter_wise": True}}, {"experts": 2}],
    "sce": [{}, {"options": {"select_topk": 0.4, "int8_mask": True}}, {"options": {"select_topk": 0.0}}],
    "nearswap": [{"options": {"t": 0.05}}, {"options": {"t": 1e-7}}],
    "arcee_fusion": [{}],
    "passthrough": [{"base": None}, {"base": None, "per_model": {"scale": (0.25,)}}],
}  # fmt: skip
EXPERTS = {"slerp": 1, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}

CASES = [
    pytest.param(method, variant, id=f"{method}-{number}")
    for method, variants in VARIANTS.items()
    for number, variant in enumerate(variants)
]


def cases_of(method: str, variant: dict[str, Any], seed: int = 0) -> dict[str, Case]:
    """One case for each shape."""
    settings = dict(variant)
    experts = settings.pop("experts", EXPERTS.get(method, 3))
    return {
        name: replace(random_case(method, seed + place, shape, experts, tensor=name), **settings)
        for place, (name, shape) in enumerate(SHAPES.items())
    }


def tolerance(exact: Any) -> Any:
    """What float32 arithmetic may be off by."""
    return 2e-6 * np.maximum(1.0, np.abs(exact))


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_a_method_is_what_it_says(method: str, variant: dict[str, Any], tmp_path: Path) -> None:
    cases = cases_of(method, variant)
    found = run(cases, tmp_path / "out")
    for name, case in cases.items():
        oracle = merge64(case)
        assert found[name].shape == oracle.exact.shape
        off = np.abs(found[name].astype(np.float64) - oracle.exact) - tolerance(oracle.exact)
        assert not np.any((off > 0) & oracle.conditioned), (name, float(off.max()))
        assert oracle.conditioned.mean() > 0.99 or oracle.conditioned.size < 200, name


def test_every_option_of_every_method_is_tried() -> None:
    assert set(VARIANTS) == set(METHODS.names())
    for method, variants in VARIANTS.items():
        tried = {name for variant in variants for part in ("options", "per_model") for name in variant.get(part, {})}
        options = {option.name for option in METHODS.get(method, where="test").options}
        # `scope: global` has a test of its own below.
        assert options - tried <= {"weight", "int8_mask", "scope"}, method


@pytest.mark.parametrize(
    "method", [name for name in METHODS.names() if "weight" in METHODS.get(name, where="t").by_name]
)
def test_weights_count(method: str, tmp_path: Path) -> None:
    variant = next(v for v in VARIANTS[method] if "w" not in v and v.get("experts") != 1)
    cases = {"m": cases_of(method, variant)["m"]}
    w = cases["m"].w
    first = run(cases, tmp_path / "a")["m"]
    second = run({"m": replace(cases["m"], w=(w[0] * 3, *w[1:]))}, tmp_path / "b")["m"]
    assert np.mean(np.abs(first - second) > 1e-4) > 0.05


@pytest.mark.parametrize("density", [(0.3, 0.3, 0.3), (0.1, 0.6, 0.0)])
def test_ties_can_select_over_the_whole_model(density: tuple[float, ...], tmp_path: Path) -> None:
    cases = cases_of("ties", {"per_model": {"density": density}, "options": {"scope": "global"}})
    thresholds = global_thresholds(list(cases.values()))
    found = run(cases, tmp_path / "out")
    for name, case in cases.items():
        oracle = merge64(replace(case, thresholds=thresholds))
        off = np.abs(found[name] - oracle.exact) > tolerance(oracle.exact)
        assert not np.any(off & oracle.conditioned), name
    merges = [merge64(replace(case, thresholds=thresholds)) for case in cases.values()]
    shares = [np.mean(np.concatenate([merge.kept[k].ravel() for merge in merges])) for k in range(3)]
    assert shares == pytest.approx(density, abs=1e-4)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "slerp", "linear", "model_stock"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_is_the_exact_merge_rounded_once(method: str, dtype: str, tmp_path: Path) -> None:
    variant = VARIANTS[method][1]
    random = cases_of(method, variant)["tall"]

    # What the file holds is what is merged.
    def stored(values: Any) -> Any:
        import torch

        kind = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
        return torch.from_numpy(values).to(kind).float().numpy()

    case = replace(random, base=stored(random.base), experts=tuple(map(stored, random.experts)))
    found = run({"tall": case}, tmp_path / "out", dtype=dtype, out_dtype=dtype)["tall"]
    exact = merge64(case).exact
    if dtype == "F16":
        # numpy rounds float64 to float16 once, to nearest even.
        assert np.mean(found == exact.astype(np.float16)) > 0.999
        return
    values = (found.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    above = ((found + 1).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    below = ((found - 1).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    error = np.abs(values - exact)
    assert np.mean((error <= np.abs(above - exact)) & (error <= np.abs(below - exact))) > 0.999
