"""`sensmerge init BASE MODEL…`: a recipe to start from, written from what the models are."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SensmergeError
from .arguments import AllowPickle, AsJson
from .plan import facts
from .plan import show as show_plan
from .terminal import print_json


def init(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the others were fine-tuned from.")],
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models, or folders with a LoRA adapter on BASE.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The recipe to write.")] = Path(
        "recipe.yml"
    ),
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Merge method; see `sensmerge list methods`.")
    ] = "task_arithmetic",
    sens: Annotated[
        bool, typer.Option("--sens", help="Measure coefficients; the data's lines are left to you.")
    ] = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe for these models, and say what it would do."""
    from .. import progress
    from ..pipeline import outlook
    from ..pipeline.drafting import allow, draft

    written = draft(base, models, output, method=method, sens=sens, allow_pickle=allow_pickle)
    print(f"{written.path} is written", file=sys.stderr)
    while True:
        try:
            # What is left to fill in cannot be planned: this is the merge without it.
            with progress.listening(None):
                outlook(replace(written.recipe, sens=None), allow_pickle=allow_pickle, timed=False)
            break
        except SensmergeError as error:
            again = allow(written, error)
            if again is None:
                raise
            written = again
    # Once more for all to hear: each note is told once.
    found = outlook(replace(written.recipe, sens=None), allow_pickle=allow_pickle)
    next_command = f"sensmerge {'plan' if written.to_fill_in else 'merge'} {shlex.quote(str(written.path))}"
    next_command += ("" if written.to_fill_in else " OUT") + (" --allow-pickle" if allow_pickle else "")
    if as_json:
        print_json(
            {
                "recipe": str(written.path),
                "to_fill_in": list(written.to_fill_in),
                "next": next_command,
                "plan": facts(found),
            }
        )
        return
    show_plan(found)
    if written.recipe.allow:
        print(f"switched off in {written.path}, for the reasons beside it: {', '.join(sorted(written.recipe.allow))}")
    if written.to_fill_in:
        numbers = ", ".join(str(number) for number in written.to_fill_in)
        print(f"fill in the data of each model in {written.path}, lines {numbers}; then: {next_command}")
    else:
        print(f"next: {next_command}")
