"""Figures in the documentation come from committed records, and what the documentation names exists."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

import pytest
from benchmarks.merging import plot

from sensmerge.experiments.tables import markdown
from sensmerge.methods import METHODS
from sensmerge.recipe import TOP_LEVEL, UNSUPPORTED
from sensmerge.records import SensSettings
from sensmerge.rules import RULES
from sensmerge.rules.presets import PRESETS
from sensmerge.sens_block import CHOICES
from sensmerge.zoo.demo import table_of
from tests.conftest import ROOT


def test_the_table_of_the_family_is_its_record() -> None:
    facts = json.loads((ROOT / "benchmarks" / "quality" / "demo-standard.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert markdown(table_of(facts)) in page
    assert facts["command"] in page
    assert facts["seeds"] == [0, 1, 2, 3, 4]


def test_the_recipe_page_lists_every_key_and_choice() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for name in [field.name for field in fields(SensSettings)] + RULES.names() + list(PRESETS):
        assert f"`{name}`" in page, name
    for choices in CHOICES.values():
        for choice in choices:
            assert f"`{choice}`" in page, choice


def test_the_recipe_page_has_a_row_for_every_method() -> None:
    """With all its parameters and their defaults."""
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.split("\n") if line.startswith("| `")}
    for name in METHODS.names():
        method = METHODS.get(name, where="docs")
        for option in method.options:
            default = "required" if option.default is None else str(option.default).lower()
            default = f"{option.default:g}" if isinstance(option.default, float) else default
            shown = f"*`{option.name}`* {default}" if option.per_model else f"`{option.name}` {default}"
            assert shown in rows[name], (name, option.name)
        assert ("`lambda`" in rows[name]) is method.adds


def test_the_methods_page_has_a_section_for_every_method() -> None:
    """With all its parameters, and whether `sens:` works with it."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE))
    assert sorted(sections) == METHODS.names()
    for name, section in sections.items():
        method = METHODS.get(name, where="docs")
        for option in method.options:
            shown = f"*`{option.name}`*" if option.per_model else f" `{option.name}`"
            assert shown in section, (name, option.name)
        assert ("`lambda`" in section) is method.adds, name
        assert ("`sens:`: yes" in section) is method.takes_sens, name
        assert ("`sens:`: no" in section) is not method.takes_sens, name


def test_the_python_of_the_methods_page_runs() -> None:
    """But for the examples of methods, which tests/methods/test_plugin.py installs."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(?!# my_methods/)(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert (found["mask"].shape, found["mask"].dtype) == ((4, 6), bool)
    assert 0 < found["mask"].sum() < 24


def test_the_mergekit_page_names_every_key_and_method() -> None:
    page = (ROOT / "docs" / "mergekit.md").read_text(encoding="utf-8")
    for key in (*TOP_LEVEL, *UNSUPPORTED):
        assert re.search(rf"`{key}[`:]", page), key
    for name in METHODS.names():
        assert f"`{name}`" in page, name
        for option in METHODS.get(name, where="docs").options:
            assert re.search(rf"`{option.name}[`:]", page), option.name


@pytest.mark.parametrize(
    "page", [*sorted(path.name for path in (ROOT / "docs").glob("*.md")), "README.md", "CONTRIBUTING.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_benchmark_tables_are_those_of_the_records() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for begin, end, expected in (
        (plot.BEGIN, plot.END, plot.table(ROOT / "benchmarks" / "merging.json")),
        (plot.BEGIN_REUSED, plot.END_REUSED, plot.table_of_reused(ROOT / "benchmarks" / "merging-reused.json")),
    ):
        assert page[page.index(begin) + len(begin) : page.index(end)].strip() == expected
