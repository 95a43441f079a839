"""`diff`: its figures against float64 arithmetic written out, and everything that is no figure told in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sensmerge as sm
from sensmerge.errors import SeveralErrors
from tests.builders import write_checkpoint
from tests.conftest import Run
from tests.oracle.families import FamilyFiles

EMBED, UP, DOWN, HEAD = "model.embed_tokens.weight", "model.layers.0.up", "model.layers.1.up", "lm_head.weight"
SHAPES = {EMBED: (50, 8), UP: (700, 900), DOWN: (3, 4, 5), HEAD: (50, 8)}


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A base in bfloat16 and two models near it, on disk; a shares a tenth of its entries with b."""
    base = random_tensors(0, torch.bfloat16)
    a = {name: (values.float() + 0.1 * random_tensors(1)[name]).half() for name, values in base.items()}
    b = {name: values.float() + 0.1 * random_tensors(2)[name] for name, values in base.items()}
    for name, values in b.items():
        values.flatten()[::10] = a[name].float().flatten()[::10]
    for name, tensors in (("base", base), ("a", a), ("b", b)):
        write_checkpoint(tmp_path / name, tensors, shards=2 if name == "b" else 1)
    return {"base": base, "a": a, "b": b}


def expected(a: torch.Tensor, b: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    x, y, z = (each.double().numpy().ravel() for each in (a, b, base))

    def cosine(u: np.ndarray, v: np.ndarray) -> float:  # type: ignore[type-arg]
        return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))

    def signs(u: np.ndarray, v: np.ndarray) -> float:  # type: ignore[type-arg]
        known = (u != 0) & (v != 0)
        return float(np.mean(np.sign(u[known]) == np.sign(v[known])))

    return {
        "elements": x.size,
        "norm_a": float(np.linalg.norm(x)),
        "norm_b": float(np.linalg.norm(y)),
        "difference": float(np.linalg.norm(x - y)),
        "relative": float(np.linalg.norm(x - y) / np.linalg.norm(x)),
        "cosine": cosine(x, y),
        "signs": signs(x, y),
        "equal": float(np.mean(x == y)),
        "largest": float(np.abs(x - y).max()),
        "task_norm_a": float(np.linalg.norm(x - z)),
        "task_norm_b": float(np.linalg.norm(y - z)),
        "task_cosine": cosine(x - z, y - z),
        "task_signs": signs(x - z, y - z),
        "nonfinite_a": 0,
        "nonfinite_b": 0,
        "nonfinite_base": 0,
    }


def test_the_figures_are_those_of_float64(models: dict[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    found = sm.diff(tmp_path / "a", tmp_path / "b", base=tmp_path / "base")
    parts = {name: [name] for name in SHAPES}
    for name in SHAPES:
        assert found.tensors[name].figures == pytest.approx(
            expected(*(models[model][name] for model in ("a", "b", "base"))), rel=1e-9
        )
    groups = {"model.layers.0": [UP], "model.layers.1": [DOWN], "embed": [EMBED], "lm_head": [HEAD]}
    assert list(found.groups) == list(groups)
    for names, comparison in [
        *((groups[group], each) for group, each in found.groups.items()),
        (list(parts), found.whole),
    ]:
        joined = [torch.cat([models[model][n].double().ravel() for n in names]) for model in ("a", "b", "base")]
        assert comparison.figures == pytest.approx(expected(*joined), rel=1e-9)
    assert found.dtypes[UP] == ("F16", "F32")
    assert not found.same_weights


def test_threads_change_no_digit(models: dict[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    one = sm.diff(tmp_path / "a", tmp_path / "b", jobs=1)
    assert sm.diff(tmp_path / "a", tmp_path / "b", jobs=4).whole.sums == one.whole.sums


def test_a_model_is_itself(untrained: FamilyFiles, sensmerge: Run) -> None:
    found = sm.diff(untrained.base, untrained.base)
    assert found.same_weights
    assert (found.whole.figures["relative"], found.whole.figures["equal"]) == (0.0, 1.0)
    assert found.whole.figures["cosine"] == pytest.approx(1.0, abs=1e-12)
    shown = sensmerge("diff", untrained.base, untrained.base)
    assert shown.returncode == 0, shown.stderr
    assert "every tensor is the same" in shown.stdout


def test_what_cannot_be_compared_is_told(tmp_path: Path, sensmerge: Run) -> None:
    ours, theirs = random_tensors(1), random_tensors(2)
    ours[UP][0, :3] = torch.tensor([float("nan"), float("inf"), 1.0])
    theirs[HEAD] = theirs[HEAD][:40]
    theirs["model.extra"] = torch.ones(2)
    ours["ids"], theirs["ids"] = torch.tensor([1, 2]), torch.tensor([1, 3])
    ours["zero"] = theirs["zero"] = torch.zeros(4)
    ours["empty"] = theirs["empty"] = torch.zeros(0)
    config = {"model_type": "llama", "rope": {"theta": 1, "type": "x"}}
    write_checkpoint(tmp_path / "a", ours, config)
    write_checkpoint(
        tmp_path / "b", {n: t for n, t in theirs.items() if n != DOWN}, {**config, "rope": {"theta": 2, "type": "x"}}
    )
    done = sensmerge("diff", "a", "b", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["only_a"], found["only_b"]) == ([DOWN], ["model.extra"])
    assert found["shapes"] == {HEAD: [[50, 8], [40, 8]]}
    assert found["bytes_differ"] == ["ids"]
    assert found["config"] == {"rope.theta": [1, 2]}
    assert found["tensors"][UP]["nonfinite_a"] == 2
    whole = ours[UP].double().nan_to_num(0, 0, 0).norm().item()
    assert found["tensors"][UP]["norm_a"] == pytest.approx(whole)
    assert found["tensors"]["zero"]["cosine"] is None
    assert found["tensors"]["empty"]["equal"] is None
    shown = sensmerge("diff", "a", "b", "--tensors", cwd=tmp_path).stdout
    for words in (
        "2 elements of a are NaN or infinite", f"only in a: {DOWN}", "only in b: model.extra", "[50, 8] and [40, 8]",
        "not floating point, and unlike: ids", "rope.theta: 1 and 2", "whole model", UP,
    ):  # fmt: skip
        assert words in shown, words


def test_bars_and_pipes(models: dict[str, dict[str, torch.Tensor]], tmp_path: Path, sensmerge: Run) -> None:
    """The longest bar belongs to the group that differs most; no colours in a pipe; plain characters where needed."""
    done = sensmerge("diff", "a", "b", "--base", "base", cwd=tmp_path, env={"PYTHONIOENCODING": "utf-8"})
    assert "\x1b" not in done.stdout
    assert "█" * 12 in done.stdout
    assert "task cos" in done.stdout
    plain = sensmerge("diff", "a", "b", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert plain.returncode == 0, plain.stderr
    assert "#" * 12 in plain.stdout


def test_models_that_are_not_there_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(SeveralErrors) as caught:
        sm.diff(tmp_path / "no", tmp_path / "nowhere")
    assert len(caught.value.errors) == 2
