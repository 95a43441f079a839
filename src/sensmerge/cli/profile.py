"""`sensmerge profile MODEL --data FILE`: one expert's portable profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecipeError
from .arguments import AllowPickle, AsJson, Device, Memory
from .terminal import print_json, print_table


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, base+adapter.")],
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Samples of its task: a file, a folder or a data set of the hub.")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="X.json", help="The file [<model>.json].")] = None,
    without_samples: Annotated[
        bool, typer.Option("--without-samples", help="Leave out token ids and masks: only for rules that need none.")
    ] = False,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="The base, for --score task_vector.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="A column: prompt=question. May be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a data set of the hub.")] = None,
    samples: Annotated[int | None, typer.Option(help="How many rows are drawn [100].")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a sample [1024].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw [0].")] = None,
    template: Annotated[str | None, typer.Option(help="none or chat.")] = None,
    loss: Annotated[str | None, typer.Option(help="response or all.")] = None,
    score: Annotated[str | None, typer.Option(help="weight, task_vector or fisher.")] = None,
    group: Annotated[
        str | None, typer.Option(help="block, module or tensor; finer ones serve recipes with coarser ones.")
    ] = None,
    compute_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="eager, sdpa, flash_attention_2 or _3.")] = None,
    device: Device = "auto",
    memory: Memory = "auto",
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Measure one model alone; another recipe uses the file with `sens: {profile: X.json}`."""
    from ..pipeline.models import expert_names
    from ..pipeline.profiling import profile as measure
    from ..records import SensSettings, SensSource
    from ..sens_block import checked_setting

    given: dict[str, Any] = {
        "samples": samples,
        "max_length": max_length,
        "seed": seed,
        "template": template,
        "loss": loss,
        "score": score,
        "group": group,
        "compute_dtype": compute_dtype,
        "attn_implementation": attn_implementation,
    }
    changes = {
        key: checked_setting(key, value, f"--{key.replace('_', '-')}")
        for key, value in given.items()
        if value is not None
    }
    written = out or Path(f"{expert_names([model])[0]}.json")
    found = measure(
        model,
        SensSource(data, _fields(field or []), None, name, split, revision),
        written,
        base=base,
        settings=SensSettings(**changes),
        with_samples=not without_samples,
        device=device,
        memory=memory,
        allow_pickle=allow_pickle,
    )
    if as_json:
        facts = {"model": found.model, "samples": found.samples, "tokens": found.tokens, "truncated": found.truncated}
        print_json({**facts, "layers": found.layers, "sensitivity": found.sensitivity, "file": str(written)})
        return
    rows = [[layer, f"{total:.4g}"] for layer, total in zip(found.layers, found.sensitivity, strict=True)]
    print_table(f"Sensitivity of {found.model}, {found.samples} samples", ["layer", "sum"], rows)
    print(f"kept in {written}: use it with `sens: {{profile: {written}}}`")


def _fields(given: list[str]) -> dict[str, str]:
    from ..calibration.samples import FIELDS

    found: dict[str, str] = {}
    for each in given:
        ours, _, theirs = each.partition("=")
        if ours not in FIELDS or not theirs:
            raise RecipeError(
                f"'{each}' names no column",
                where="--field",
                why=f"it is OURS=THEIRS, where OURS is one of {', '.join(FIELDS)}",
                fix="--field prompt=question --field response=answer",
            )
        found[ours] = theirs
    return found
