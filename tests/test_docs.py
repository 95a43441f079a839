"""Figures in the documentation come from committed records, and what the documentation names exists."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest

from sensmerge.experiments.tables import markdown
from sensmerge.recipe import CHOICES
from sensmerge.records import SensSettings
from sensmerge.rules import RULES
from sensmerge.rules.presets import PRESETS
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


@pytest.mark.parametrize(
    "page", [*sorted(path.name for path in (ROOT / "docs").glob("*.md")), "README.md", "CONTRIBUTING.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
