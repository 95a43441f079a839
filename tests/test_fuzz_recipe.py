"""Whatever a recipe's file holds, it is read or refused with four lines and exit code 2; never another exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sensmerge.errors import RecipeError
from sensmerge.recipe import TOP_LEVEL, UNSUPPORTED, load_recipe
from sensmerge.records import Recipe

FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

VALID = [
    """merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.5, density: [0.2, 0.8]}
  - model: org/b@main
    parameters:
      weight:
        - {filter: mlp, value: 1}
        - value: 0.5
    sens: {data: x.jsonl}
parameters: {lambda: auto, normalize: true}
dtype: bfloat16
sens: {preset: paper, rule: uniform, samples: 10, total: K}
allow: [symlinks]
""",
    """merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources:
      - model: b
        layer_range: [2, 6]
        parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}
tokenizer: {source: base}
chat_template: auto
""",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: [0, 0.5, 1]}\n",
]

WORDS = (
    *TOP_LEVEL, *UNSUPPORTED, "model", "weight", "density", "lambda", "t", "filter", "value", "sources", "layer_range", "data",
    "profile", "preset", "rule", "total", "samples", "temperature", "auto", "ties", "linear", "slerp", "passthrough", "paper",
    "base", "a", "K", "", "1e3", "0x10", "1:30", "~", "2001-01-01", ".nan", ".inf", "-.inf", "!!int x", "=", "<<", "é", "\x85",
)  # fmt: skip

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63]),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)),
    max_leaves=10,
)


def check(folder: Path, text: str | bytes) -> None:
    """It is a recipe, or a RecipeError that says where."""
    path = folder / "recipe.yml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass"))
    try:
        assert isinstance(load_recipe(path), Recipe)
        return
    except RecipeError as refused:
        error = refused
    assert "recipe.yml" in error.where, error
    assert error.exit_code == 2
    assert error.fix
    assert len(str(error)) < 20_000 + 2 * len(text)


@FUZZ
@given(st.dictionaries(st.sampled_from(WORDS), values, max_size=6))
def test_any_document(tmp_path: Path, document: dict[str, Any]) -> None:
    check(tmp_path, yaml.safe_dump(document, allow_unicode=True))


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every key and item in a document."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in inside for found in [(*path, key), *places(value, (*path, key))]]


@FUZZ
@given(st.data())
def test_a_valid_recipe_with_something_else_in_one_place(tmp_path: Path, data: st.DataObject) -> None:
    document = yaml.safe_load(data.draw(st.sampled_from(VALID)))
    *way, last = data.draw(st.sampled_from(places(document)))
    holder = document
    for step in way:
        holder = holder[step]
    kind = data.draw(st.sampled_from(["value", "key", "gone"]))
    if kind == "value" or isinstance(holder, list):
        holder[last] = data.draw(values)
    else:
        value = holder.pop(last)
        if kind == "key":
            holder[data.draw(st.sampled_from(WORDS))] = value
    check(tmp_path, yaml.safe_dump(document, allow_unicode=True, sort_keys=False))


@FUZZ
@given(st.data())
def test_a_valid_recipe_with_other_characters(tmp_path: Path, data: st.DataObject) -> None:
    """Cut, inserted, repeated: mostly no YAML any more."""
    text = data.draw(st.sampled_from(VALID))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        until = data.draw(st.integers(at, min(len(text), at + 30)))
        signs = st.text("{}[]:-,&*!|>%@`'\"#?~ \t\n0aé\x00\x85", max_size=4)
        words = st.sampled_from([*WORDS, "&x ", "*x", "<<: *x"])
        text = text[:at] + data.draw(signs | words) + text[until:]
    check(tmp_path, text)


@FUZZ
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    check(tmp_path, content)


BOMB = "x: &a0 [y, y]\n" + "".join(f"x{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        BOMB.replace("x: ", "allow: ", 1) + "merge_method: *a39\n",
        "merge_method: linear\nmodels: [{model: a}]\nparameters:\n  b: &a0 [1, 1]\n"
        + "".join(f"  b{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
        + "  normalize: *a39\n",
        "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      weight: &a0 [1, 1]\n"
        + "".join(f"      w{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: " + "[" * 25 + "&a [1]" + ", *a]" * 25 + "}}]\n",
        "? &a0 [y, y]\n: 1\n" + "".join(f"? &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n: 1\n" for n in range(1, 40)),
        "merge_method: &a [*a]\n",
        "a: &a\n  a: *a\n",
        "sens: &a {preset: *a}\nmerge_method: linear\nmodels: [{model: a}]\n",
        "merge_method: linear\nmodels: &a [{model: a}, *a]\n",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: " + "9" * 10_000 + "}}]\n",
        "merge_method: linear\nmodels: [{model: " + "x" * 1_000_000 + ", wrong: 1}]\n",
        "merge_method: " + "x" * 100_000,
        "merge_method: linear\nmodels: [{model: ~nobody/x}, {model: \"a\\0b\"}]\n",
        "merge_method: linear\nmodels: [{model: \"\\e[2J\"}, {model: \"\\e[2J\"}]\n",
    ],
    ids=lambda text: text[:20] + str(len(text)),
)  # fmt: skip
def test_documents_that_grow_when_they_are_read(tmp_path: Path, text: str) -> None:
    """References to references are 3^40 values written out: they are never written out."""
    check(tmp_path, text)
