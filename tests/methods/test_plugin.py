"""Methods from another package: the two examples of docs/methods.md, installed as they stand there, and merged with."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import sensmerge
from sensmerge.errors import RecipeError
from sensmerge.methods import METHODS
from sensmerge.pipeline import outlook
from tests.builders import write_checkpoint
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
SHAPES = {"model.embed_tokens.weight": (5, 4), "model.layers.0.mlp.up_proj.weight": (6, 4), "model.norm.weight": (4,)}
WEIGHTS = {"a": 0.5, "b": 2.0}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's examples as an installed package."""
    files = re.findall(r"```python\n# (my_methods/\w+\.py)\n(.*?)```", PAGE, re.DOTALL)
    assert len(files) == 2
    (tmp_path / "my_methods").mkdir()
    for name, code in files:
        (tmp_path / name).write_text(code, encoding="utf-8")
    info = tmp_path / "my_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    [table] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    [(group, points)] = tomllib.loads(table)["project"]["entry-points"].items()
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{n} = {p}\n" for n, p in points.items()))
    monkeypatch.syspath_prepend(str(tmp_path))
    # The registry looks for plug-ins once.
    monkeypatch.setattr(METHODS, "_places", dict(METHODS._places))
    monkeypatch.setattr(METHODS, "_plugins_read", False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_methods"]:
        del sys.modules[name]


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    found = {
        model: {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        for model in ("base", *WEIGHTS)
    }
    for model, tensors in found.items():
        write_checkpoint(tmp_path / model, tensors)
    return found


def recipe(folder: Path, method: str, parameters: str) -> Path:
    listed = "".join(f"  - {{model: {name}, parameters: {{weight: {w}}}}}\n" for name, w in WEIGHTS.items())
    path = folder / "recipe.yml"
    # Models at random have no common origin.
    head = f"merge_method: {method}\nbase_model: base\nallow: [unrelated]\nparameters: {{{parameters}}}\n"
    path.write_text(f"{head}models:\n{listed}")
    return path


@pytest.mark.parametrize(("method", "parameters"), [("balanced", "lambda: 0.5"), ("low_rank", "lambda: 0.5, rank: 1")])
def test_the_examples_merge(
    method: str, parameters: str, tmp_path: Path, installed: None, models: dict[str, dict[str, np.ndarray]]
) -> None:
    assert method in METHODS.names()
    sensmerge.merge(sensmerge.load_recipe(recipe(tmp_path, method, parameters)), tmp_path / "out", jobs=2)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == SHAPES.keys()
    assert set(sensmerge.check(tmp_path / "out", full=True).tensors) == SHAPES.keys()
    found = outlook(sensmerge.load_recipe(tmp_path / "recipe.yml"))
    # A method of whole tensors is not timed by a part of one.
    assert (found.seconds is None) is (method == "low_rank")
    for name, values in merged.items():
        base = models["base"][name].astype(np.float64)
        deltas = {model: models[model][name] - base for model in WEIGHTS}
        if method == "balanced":
            mean = np.mean([np.linalg.norm(delta) for delta in deltas.values()])
            deltas = {model: delta * mean / np.linalg.norm(delta) for model, delta in deltas.items()}
        elif base.ndim == 2:
            for model, delta in deltas.items():
                u, s, v = np.linalg.svd(delta)
                deltas[model] = s[0] * np.outer(u[:, 0], v[0])
        exact = base + 0.5 * sum(w * deltas[model] for model, w in WEIGHTS.items())
        assert np.allclose(values, exact, rtol=0, atol=5e-6), name


def test_its_options_are_checked_like_any(tmp_path: Path, installed: None) -> None:
    with pytest.raises(RecipeError, match="'rank' of merge method 'low_rank' must be a whole number from 1 up"):
        sensmerge.load_recipe(recipe(tmp_path, "low_rank", "rank: 0"))
    with pytest.raises(RecipeError, match="unknown key 'rnak'"):
        sensmerge.load_recipe(recipe(tmp_path, "low_rank", "rnak: 1"))
