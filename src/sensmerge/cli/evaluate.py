"""`sensmerge evaluate MODEL --tasks …`: scores of one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .arguments import AsJson, Device
from .terminal import print_table


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder.")],
    tasks: Annotated[str, typer.Option(metavar="A,B,…", help="Comma-separated; see `sensmerge list tasks`.")],
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", metavar="DIR", help="Folder of the test items [<MODEL>/../test].")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N items of each task.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a model on tasks; the tiny family's chat, math and code so far."""
    from ..calibration.models import choose_device
    from ..evaluation.run import evaluate as run

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    scores = run(model, names, data_dir, limit=limit, device=choose_device(device))
    if as_json:
        print(json.dumps(json.loads(scores.to_json()), indent=2))
        return
    rows = [
        [name, score.metric, f"{score.value:.1f}", f"{score.stderr:.1f}", str(score.samples)]
        for name, score in scores.tasks.items()
    ]
    print_table(
        f"Scores of {model}",
        ["task", "metric", "%", "±", "items"],
        [*rows, ["average", "", f"{scores.average:.1f}", "", ""]],
    )
