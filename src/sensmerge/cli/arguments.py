"""Arguments that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _memory(value: str) -> str:
    if value not in ("auto", "resident", "streamed"):
        raise typer.BadParameter(f"'{value}' is none of auto, resident, streamed")
    return value


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a mergekit YAML file, with `sens:`.")]
ProfilesDir = Annotated[
    Path | None, typer.Option("--profiles", metavar="DIR", help="Where calibration is kept [<recipe>.sens/].")
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where models run.")]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="auto|resident|streamed",
        callback=_memory,
        help="Models whole in memory, or streamed a block at a time; auto: as they fit.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model*.bin where a model has no safetensors.")
]
ShardSize = Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Largest output file.")]
Jobs = Annotated[int | None, typer.Option("--jobs", metavar="N", min=1, max=256, help="Threads [one for each core].")]
RandomSeed = Annotated[
    int | None, typer.Option("--random-seed", metavar="N", help="Seed of a method that draws at random.")
]
