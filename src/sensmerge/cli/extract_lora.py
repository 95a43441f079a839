"""`sensmerge extract-lora MODEL BASE -o DIR`: a PEFT adapter that makes the base into the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import AllowPickle, AsJson, Device
from .terminal import print_table

if TYPE_CHECKING:
    from ..pipeline.extracting import Extraction


def show(result: Extraction) -> None:
    """Print what each layer's factors keep, then what is stored in full."""
    layers = list(dict.fromkeys(each.layer for each in result.matrices))
    rows = []
    for layer in [*layers, "all"]:
        inside = [each for each in result.matrices if layer in (each.layer, "all")]
        total = math.fsum(each.norm**2 for each in inside)
        kept = math.fsum(each.energy * each.norm**2 for each in inside) / total
        error = math.sqrt(math.fsum((each.error * each.norm) ** 2 for each in inside) / total)
        ranks = sorted({each.rank for each in inside})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        rows.append([layer, str(len(inside)), shown, f"{100 * kept:.2f} %", f"{error:.4f}"])
    print_table(f"Adapter in {result.folder}", ["layer", "matrices", "rank", "kept energy", "error"], rows)
    print(f"error = |dW - BA| / |dW|; {result.parameters} parameters, {result.unchanged} tensor(s) did not change")
    if result.full:
        print(f"stored in full (modules_to_save): {', '.join(result.full)}")
    if result.biases:
        print(f"stored in full (bias: all): {', '.join(result.biases)}")


def extract_lora(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tuned or merged model.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model it was made from.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the adapter goes: absent or empty.")],
    rank: Annotated[int | None, typer.Option(metavar="R", help="The rank of every matrix, at most.")] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="SHARE", help="The least rank that keeps this share, e.g. 0.95.")
    ] = None,
    device: Device = "auto",
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Write what a model changed in its base as a PEFT LoRA adapter."""
    from dataclasses import asdict

    from ..pipeline.extracting import extract_lora as extract

    result = extract(model, base, out, rank=rank, energy=energy, device=device, allow_pickle=allow_pickle)
    if as_json:
        print(json.dumps(asdict(result), indent=2, default=str))
        return
    show(result)
