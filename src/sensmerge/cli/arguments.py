"""Arguments that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a mergekit YAML file, with `sens:`.")]
ProfilesDir = Annotated[
    Path | None, typer.Option("--profiles", metavar="DIR", help="Where calibration is kept [<recipe>.sens/].")
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where models run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model*.bin where a model has no safetensors.")
]
