"""Every merge method through whole merges: uniform coefficients, the order of experts, and coefficients where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

import sensmerge as sm
from sensmerge.errors import RecipeError
from sensmerge.methods import METHODS
from tests.oracle.families import FamilyFiles
from tests.oracle.methods64 import Case, global_thresholds, merge64

# A recipe's `parameters` for each method, and those of each expert.
SHARED: dict[str, dict[str, Any]] = {
    "slerp": {"t": [0.2, 0.8]},
    "nearswap": {"t": 0.01},
    "ties": {"density": 0.4, "lambda": 0.7},
    "dare_linear": {"density": 0.6, "seed": 3},
    "dare_ties": {"density": 0.6, "lambda": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "della_linear": {"density": 0.5, "epsilon": 0.2, "lambda": 0.8},
    "breadcrumbs": {"density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.05},
    "sce": {"select_topk": 0.5},
}
TAKES_SENS = [name for name in METHODS.names() if METHODS.get(name, where="test").takes_sens]
SETTINGS = [(name, SHARED.get(name, {})) for name in TAKES_SENS] + [("ties", {"density": 0.4, "scope": "global"})]
IDS = [*TAKES_SENS, "ties-global"]


def write(family: FamilyFiles, name: str, method: str, order: tuple[int, ...], **top: Any) -> Path:
    """A recipe beside the family: the base, and as many of its three experts as the method takes, in an order."""
    known = METHODS.get(method, where="test")
    most = known.experts[1] or 3
    models = [
        {"model": f"expert-{'abc'[at]}"}
        | ({"parameters": {"weight": (0.5, 1.0, 2.0)[at]}} if "weight" in known.by_name else {})
        for at in order
        if at < most
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": models} | top
    if method != "passthrough":
        recipe["base_model"] = "base"
    if "sens" in top:
        for entry in models:
            entry["sens"] = {"data": f"calibration-{'abc'.index(entry['model'][-1])}.jsonl"}
    path = family.folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def merged(path: Path, out: Path, kept: Path | None = None) -> sm.MergeResult:
    return sm.merge(sm.load_recipe(path), out, profiles_dir=kept)


@pytest.mark.parametrize("method", METHODS.names())
def test_the_order_of_the_experts_changes_no_byte(untrained: FamilyFiles, tmp_path: Path, method: str) -> None:
    results = [
        merged(
            write(untrained, f"{method}-{turn}", method, order, parameters=SHARED.get(method, {})), tmp_path / str(turn)
        )
        for turn, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)])
    ]
    assert results[0].hashes == results[1].hashes == results[2].hashes


@pytest.mark.parametrize(("method", "parameters"), SETTINGS, ids=IDS)
def test_uniform_coefficients_give_the_plain_bytes(
    untrained: FamilyFiles, kept: Path, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    plain = write(untrained, f"plain-{method}", method, (0, 1, 2), parameters=parameters)
    sens = write(untrained, f"uniform-{method}", method, (0, 1, 2), parameters=parameters, sens={"rule": "uniform"})
    assert merged(plain, tmp_path / "plain").hashes == merged(sens, tmp_path / "sens", kept).hashes


@pytest.mark.parametrize(("method", "parameters"), SETTINGS, ids=IDS)
def test_measured_coefficients_are_where_they_belong(
    untrained: FamilyFiles, kept: Path, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    """Every tensor against float64: c multiplies what was sparsified, before the election; divisors do not know it."""
    path = write(untrained, f"sharp-{method}", method, (0, 1, 2), parameters=parameters, sens={"temperature": 0.05})
    result = merged(path, tmp_path / "out", kept)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert result.coefficients is not None
    assert result.coefficients.spread > 0.3
    known = METHODS.get(method, where="test")
    own = {name: value for name, value in parameters.items() if name in known.by_name and known.by_name[name].per_model}
    shared = {name: value for name, value in parameters.items() if name not in own and name != "lambda"}
    sources = {
        name: load_file(untrained.folder / name / "model.safetensors")
        for name in ("base", *map("expert-{}".format, "abc"))
    }
    cases = {}
    for tensor in result.plan.tensors:
        name = tensor.spec.name
        cases[name] = Case(
            method=method,
            base=sources["base"][name].float().numpy(),
            experts=tuple(sources[part.model][name].float().numpy() for part in tensor.experts),
            names=tuple(part.model for part in tensor.experts),
            tensor=name,
            w=(0.5, 1.0, 2.0),
            c=tensor.coefficients,
            scale=float(parameters.get("lambda", 1.0)),
            options=shared,
            per_model={option: (value,) * 3 for option, value in own.items()},
        )
    thresholds = global_thresholds(list(cases.values())) if shared.get("scope") == "global" else None
    sigma = result.coefficients.sigma
    for name, case in cases.items():
        if ".layers.1." in name:
            assert case.c == pytest.approx([3 * row[1] for row in sigma], rel=1e-6)
        given = case if thresholds is None else Case(**{**case.__dict__, "thresholds": thresholds})
        oracle = merge64(given)
        off = np.abs(found[name].float().numpy() - oracle.exact) > 2e-6 * np.maximum(1, np.abs(oracle.exact))
        assert not np.any(off & oracle.conditioned), name


@pytest.mark.parametrize("method", [name for name in METHODS.names() if name not in TAKES_SENS])
def test_the_others_refuse_coefficients_by_name(untrained: FamilyFiles, method: str) -> None:
    path = write(
        untrained, f"no-{method}", method, (0, 1, 2), parameters=SHARED.get(method, {}), sens={"preset": "paper"}
    )
    with pytest.raises(RecipeError, match=f"'{method}' does not work with `sens:`"):
        sm.load_recipe(path)
