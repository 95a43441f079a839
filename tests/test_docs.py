"""Figures in the documentation come from committed records, and what the documentation names exists."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest

from sensmerge.experiments.tables import markdown
from sensmerge.methods import METHODS
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


@pytest.mark.parametrize(
    "page", [*sorted(path.name for path in (ROOT / "docs").glob("*.md")), "README.md", "CONTRIBUTING.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
