"""`sensmerge list methods|rules|presets|distances|tasks`: what can be chosen by name."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from .arguments import AsJson
from .terminal import print_json, print_table


class Kind(StrEnum):
    """What can be listed."""

    METHODS = "methods"
    RULES = "rules"
    PRESETS = "presets"
    DISTANCES = "distances"
    TASKS = "tasks"


def _described(kind: Kind) -> dict[str, str]:
    if kind is Kind.METHODS:
        from ..methods import METHODS

        return {name: METHODS.get(name, where="list").summary for name in METHODS.names()}
    if kind is Kind.RULES:
        from ..rules import RULES

        return {name: RULES.get(name, where="list").summary for name in RULES.names()}
    if kind is Kind.PRESETS:
        from ..rules.presets import PRESETS

        return {name: preset.summary for name, preset in PRESETS.items()}
    if kind is Kind.DISTANCES:
        from ..distances import DISTANCES

        return {name: (DISTANCES.get(name, where="list").__doc__ or "").split("\n")[0] for name in DISTANCES.names()}
    from ..evaluation.tasks import TASKS

    return {name: TASKS.get(name, where="list").metric for name in TASKS.names()}


def listing(kind: Annotated[Kind, typer.Argument(help="What to list.")], as_json: AsJson = False) -> None:
    """List what can be chosen by name."""
    found = _described(kind)
    if as_json:
        print_json(found)
        return
    print_table(
        kind.value, ["name", "what it is"], [[name, summary] for name, summary in found.items()], text_columns=2
    )
