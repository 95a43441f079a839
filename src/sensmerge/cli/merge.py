"""`sensmerge merge RECIPE OUT`: everything from a recipe to a model folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RecipeError
from .arguments import AsJson, Device, Memory, ProfilesDir, RecipePath
from .terminal import print_json

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes in `5GB`, `200MB`, `1GiB` or a plain number. Raises RecipeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(
            f"'{text}' is no size",
            where="--shard-size",
            why="a number with KB, MB, GB, MiB or GiB is needed",
            fix="--shard-size 5GB",
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def merge(
    recipe: RecipePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; absent or empty.")],
    profiles: ProfilesDir = None,
    device: Device = "auto",
    memory: Memory = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the merge is complete.")] = False,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Largest output file.")] = "5GB",
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", min=1, max=256, help="Threads [one for each core].")
    ] = None,
    random_seed: Annotated[
        int | None, typer.Option("--random-seed", metavar="N", help="Seed of a method that draws at random.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge models; calibrates first if the recipe has a `sens:` block and was not calibrated before."""
    from .. import pipeline
    from ..methods import METHODS
    from ..recipe import load_recipe

    loaded = load_recipe(recipe)
    shard_bytes = parse_size(shard_size)
    if dry_run:
        plan = pipeline.dry_run(loaded, out, overwrite=overwrite, shard_bytes=shard_bytes, seed=random_seed)
        facts = {
            "method": plan.method,
            "base": plan.base,
            "models": list(plan.models),
            "tensors": len(plan.tensors),
            "files": [file for file, _ in plan.shards],
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
        }
        if as_json:
            print_json(facts)
            return
        others = ", ".join(model for model in plan.models if model != plan.base)
        on = f" on {plan.base}" if plan.base else ""
        print(f"{plan.method} of {others}{on}: {len(plan.tensors)} tensors fit together")
        print(
            f"reads {_size(plan.bytes_read)}, writes {_size(plan.bytes_written)} in {len(plan.shards)} file(s) to {out}"
        )
        return
    result = pipeline.merge(
        loaded,
        out,
        profiles_dir=profiles,
        device=device,
        memory=memory,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        jobs=jobs,
        seed=random_seed,
    )
    has_scale = METHODS.get(result.plan.method, where="merge_method").adds
    if as_json:
        print_json(
            {
                "folder": str(result.folder),
                "lambda": result.scale if has_scale else None,
                "spread": None if result.coefficients is None else result.coefficients.spread,
                "warnings": [] if result.coefficients is None else result.coefficients.warnings,
                "files": dict(result.hashes),
                "bytes_written": result.plan.bytes_written,
                "seconds": round(result.seconds, 3),
            }
        )
        return
    if result.coefficients is not None:
        from .coefficients import show

        show(result.coefficients)
    scale = f", lambda = {result.scale:g}" if has_scale else ""
    print(f"merged into {out}: {_size(result.plan.bytes_written)} in {result.seconds:.1f} s{scale}")
