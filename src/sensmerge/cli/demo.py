"""`sensmerge demo [DIR]`: the whole thing, on a family trained on the spot."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .arguments import AsJson
from .terminal import print_table


class Size(StrEnum):
    """How large a family to train."""

    SMALL = "small"
    STANDARD = "standard"


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where everything is written.")] = Path("demo"),
    size: Annotated[Size, typer.Option(help="small trains in about a minute, standard in a few.")] = Size.STANDARD,
    seed: Annotated[int, typer.Option(min=0, help="The family's seed.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds, from --seed on; the table then has mean ± sd.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Train a tiny family of models, calibrate, merge every way, evaluate, and print one table."""
    from ..experiments.tables import cells
    from ..zoo.demo import MARK, run_demo
    from .coefficients import show

    result = run_demo(folder, size.value, range(seed, seed + seeds))
    if as_json:
        print(json.dumps(json.loads((folder / MARK).read_text(encoding="utf-8")), indent=2, ensure_ascii=False))
        return
    for name in ("ta-paper", "calibrated"):
        show(result.coefficients[name])
        print()
    header, texts, bold = cells(result.table)
    starred = [
        [f"*{text}" if best else text for text, best in zip(row, marks, strict=True)]
        for row, marks in zip(texts, bold, strict=True)
    ]
    print_table(f"{result.table.title} (* best)", header, starred, bold=bold)
    first = folder / f"seed{seed}"
    print(f"recipes, models, scores and calibration are in {folder}; for example:")
    print(f"  sensmerge coefficients {first}/recipes/ta-paper.yml --profiles {first}/calibration --temperature 0.05")
