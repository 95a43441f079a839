"""`sensmerge` and the float64 oracle against merges that mergekit itself made, from the same recipe files.

`make_mergekit.py` made the numbers. mergekit works in float32, so its results carry roundings of their own; no method here
needs a wider tolerance for that than TOLERANCE, for the family's changes are large enough (see `family.py`) to keep clear
of mergekit's guards: the least sum of weights of `sce` and the least product of norms of `model_stock`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from safetensors import safe_open

import sensmerge
from tests.golden import family
from tests.oracle.methods64 import OPTIONS, Case, merge64

HERE = Path(__file__).resolve().parent
RECIPES = sorted((HERE / "recipes").glob("*/*.yml"))

TOLERANCE = 2e-6
"""Of max(1, |weight|): some roundings of float32."""

PER_MODEL = ("density", "gamma", "epsilon", "scale")

recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


@cache
def golden(dtype: str) -> tuple[dict[str, Any], dict[str, dict[str, NDArray[Any]]]]:
    """(what `about` says, each recipe's tensors) of one family's file."""
    with np.load(HERE / f"{dtype}.npz") as file:
        about = json.loads(str(file["about"]))
        flat = {name: file[name] for name in about["recipes"]}
    merged = {}
    for recipe, shapes in about["recipes"].items():
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
        parts = np.split(flat[recipe], ends[:-1])
        merged[recipe] = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return about, merged


@cache
def models(dtype: str) -> dict[str, family.Tensors]:
    return family.build(dtype)


def assert_close(made: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    """Same tensors, each within TOLERANCE, or one step of bfloat16 where that is what was written."""
    assert sorted(made) == sorted(expected)
    other_steps = 0
    for name, theirs in expected.items():
        ours = made[name]
        assert ours.shape == theirs.shape, name
        if theirs.dtype == np.uint16:
            exact = family.from_bits(theirs).astype(np.float64)
            allowed = TOLERANCE + 2.0**-7 * np.abs(exact)
            other_steps += np.count_nonzero(ours != exact)
        else:
            exact = theirs.astype(np.float64)
            allowed = TOLERANCE * np.maximum(1, np.abs(exact))
        worst = float(np.max(np.abs(ours.astype(np.float64) - exact) - allowed))
        assert worst <= 0, f"{name}: {worst:.3g} beyond the tolerance"
    # A last digit of float32 can decide which of two neighbours a value is rounded to, but it seldom does.
    assert other_steps < 0.005 * sum(values.size for values in expected.values())


@pytest.mark.parametrize("dtype", family.DTYPES)
def test_the_golden_files_belong_to_this_family_and_these_recipes(dtype: str) -> None:
    about, _ = golden(dtype)
    assert about["mergekit"] == "0.1.5"
    assert about["inputs"] == family.digest(models(dtype)), "the family has changed: run make_mergekit.py"
    assert sorted(about["recipes"]) == sorted(path.stem for path in RECIPES if path.parent.name == dtype)


@pytest.mark.parametrize("dtype", family.DTYPES)
def test_no_two_changes_of_an_expert_are_equal(dtype: str) -> None:
    for expert in family.SIZES:
        for name, values in models(dtype)[expert].items():
            magnitudes = np.abs(values - models(dtype)["base"][name])
            assert np.unique(magnitudes).size == magnitudes.size
            assert magnitudes.min() > 0


@recipes
def test_sensmerge_gives_what_mergekit_gave(recipe: Path, tmp_path: Path) -> None:
    dtype = recipe.parent.name
    family.write(models(dtype), dtype, tmp_path)
    # The family's `chat` moved by more than the size of its base: large changes keep clear of mergekit's guards.
    (tmp_path / recipe.name).write_text(recipe.read_text() + "\nallow: [unrelated]\n")
    sensmerge.merge(sensmerge.load_recipe(tmp_path / recipe.name), tmp_path / "merged")
    expected = golden(dtype)[1][recipe.stem]
    made: dict[str, NDArray[Any]] = {}
    for file in sorted((tmp_path / "merged").glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                values = tensors.get_tensor(name)
                assert str(values.dtype) == ("torch.bfloat16" if expected[name].dtype == np.uint16 else "torch.float32")
                made[name] = values.float().numpy()
    assert_close(made, expected)


@recipes
def test_the_oracle_gives_what_mergekit_gave(recipe: Path) -> None:
    dtype = recipe.parent.name
    made = {name: merge64(case).exact for name, case in expanded(yaml.safe_load(recipe.read_text()), dtype).items()}
    expected = golden(dtype)[1][recipe.stem]
    if any(values.dtype == np.uint16 for values in expected.values()):
        made = {name: to_bfloat16(values) for name, values in made.items()}
    assert_close(made, expected)


def to_bfloat16(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The nearest bfloat16 values, of two as near the even one; held in float32."""
    whole = values.astype(np.float32).view(np.uint32)
    return family.from_bits(((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16))


# What a recipe asks for, tensor by tensor: mergekit's slices, gradients and filters, read a second time for the oracle.


def expanded(recipe: Mapping[str, Any], dtype: str) -> dict[str, Case]:
    """The case of every tensor that the recipe writes."""
    slices = recipe.get("slices")
    if slices is None:
        whole = [{**entry, "layer_range": [0, family.LAYERS]} for entry in recipe["models"]]
        slices = [{"sources": whole}]
    cases: dict[str, Case] = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        # What stands outside the layers belongs to the first or the last slice, at the beginning of its gradients.
        part = slices[0] if "embed" in name else slices[-1]
        cases[name] = _case(recipe, part, name, [name] * len(part["sources"]), 0.0, dtype)
    written = 0
    inside = [name.removeprefix("model.layers.0.") for name in family.shapes(1) if name.startswith("model.layers.")]
    for part in slices:
        starts = [source["layer_range"][0] for source in part["sources"]]
        count = part["sources"][0]["layer_range"][1] - starts[0]
        for step in range(count):
            along = step / (count - 1) if count > 1 else 1.0
            for name in inside:
                output = f"model.layers.{written}.{name}"
                inputs = [f"model.layers.{start + step}.{name}" for start in starts]
                cases[output] = _case(recipe, part, output, inputs, along, dtype)
            written += 1
    return cases


def _case(
    recipe: Mapping[str, Any], part: Mapping[str, Any], output: str, inputs: list[str], along: float, dtype: str
) -> Case:
    method, base_name = recipe["merge_method"], recipe.get("base_model")
    shared = (part.get("parameters"), recipe.get("parameters"))
    base = None if base_name is None else models(dtype)[base_name][output]
    experts, names = [], []
    values: dict[str, list[Any]] = {key: [] for key in ("weight", *PER_MODEL)}
    for source, tensor in zip(part["sources"], inputs, strict=True):
        if source["model"] == base_name:
            base = models(dtype)[base_name][tensor]
            continue
        experts.append(models(dtype)[source["model"]][tensor])
        names.append(source["model"])
        for key, found in values.items():
            found.append(_value(key, (source.get("parameters"), *shared), tensor, along))
    per_model = {key: tuple(found) for key, found in values.items() if found[0] is not None}
    weights = per_model.pop("weight", ())
    options = {key: _value(key, shared, output, along) for key in OPTIONS[method]}
    scale = _value("lambda", shared, output, along)
    return Case(
        method=method,
        base=base,
        experts=tuple(experts),
        names=tuple(names),
        tensor=output,
        w=weights,
        scale=1.0 if scale is None else scale,
        options={key: value for key, value in options.items() if value is not None},
        per_model=per_model,
    )


def _value(key: str, places: tuple[Mapping[str, Any] | None, ...], tensor: str, along: float) -> Any:
    """What the nearest place says of `key` for this tensor; None if none does."""
    for place in places:
        setting = (place or {}).get(key)
        if isinstance(setting, list) and isinstance(setting[0], Mapping):
            fitting = [each for each in setting if each.get("filter") is None or each["filter"] in tensor]
            setting = fitting[0]["value"] if fitting else None
        if isinstance(setting, list):
            return float(np.interp(along, np.linspace(0, 1, len(setting)), setting))
        if setting is not None:
            return setting
    return None
