"""`sensmerge check DIR`: whether a merged model is what its recipe makes of its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import AllowPickle, AsJson, Device
from .terminal import print_json, print_table, size_text


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `sensmerge merge` wrote.")],
    full: Annotated[bool, typer.Option("--full", help="Recompute every tensor.")] = False,
    sample: Annotated[float, typer.Option(metavar="SHARE", help="Share of the tensors to recompute.")] = 0.01,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Which tensors are drawn [another each time].")] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="The recipe [DIR/sensmerge.yml].")] = None,
    models_in: Annotated[
        list[Path] | None,
        typer.Option("--models-in", metavar="DIR", help="Where relative paths of models are tried first; repeatable."),
    ] = None,
    outputs_only: Annotated[
        bool, typer.Option("--outputs-only", help="Check the files' hashes alone; the inputs need not be there.")
    ] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", metavar="N", min=1, max=256, help="Threads.")] = None,
    device: Device = "auto",
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Check a merged model: hashes of its files, identity of its inputs, and a part of its tensors computed again."""
    from ..pipeline.verifying import check as run

    result = run(
        folder,
        sample=sample,
        full=full,
        seed=seed,
        outputs_only=outputs_only,
        models_in=models_in or (),
        recipe=recipe,
        allow_pickle=allow_pickle,
        jobs=jobs,
        device=device,
    )
    if as_json:
        print_json(
            {
                "folder": str(result.folder),
                "files": list(result.files),
                "bytes_hashed": result.bytes_hashed,
                "inputs": dict(result.inputs),
                "recomputed": list(result.tensors),
                "tensors": result.of,
                "seed": None if full or outputs_only else result.seed,
                "seconds": round(result.seconds, 3),
            }
        )
        return
    skipped = "not checked (--outputs-only)"
    drawn = "every one" if full else f"drawn with --seed {result.seed}"
    rows = [
        ["files", f"{len(result.files)} have the hashes of merge.json ({size_text(result.bytes_hashed)})"],
        ["inputs", skipped if outputs_only else f"{len(result.inputs)} are the models that were merged"],
        [
            "tensors",
            skipped if outputs_only else f"{len(result.tensors)} of {result.of} merged again, {drawn}: the same bits",
        ],
    ]
    print_table(f"{folder} is sound", ["what", "found"], rows, text_columns=2)
