"""`sensmerge merge RECIPE OUT`: everything from a recipe to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import AllowPickle, AsJson, Device, Jobs, Memory, ProfilesDir, RandomSeed, RecipePath, ShardSize
from .plan import facts
from .plan import show as show_plan
from .terminal import parse_size, print_json, size_text


def merge(
    recipe: RecipePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; absent or empty.")],
    profiles: ProfilesDir = None,
    device: Device = "auto",
    memory: Memory = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the merge is complete.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted merge into OUT has left.")
    ] = False,
    shard_size: ShardSize = "5GB",
    jobs: Jobs = None,
    random_seed: RandomSeed = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Merge models; calibrates first if the recipe has a `sens:` block and was not calibrated before."""
    from .. import pipeline
    from ..methods import METHODS
    from ..recipe import load_recipe

    loaded = load_recipe(recipe)
    shard_bytes = parse_size(shard_size)
    if dry_run:
        found = pipeline.outlook(
            loaded,
            out,
            profiles_dir=profiles,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            jobs=jobs,
            seed=random_seed,
            allow_pickle=allow_pickle,
        )
        if as_json:
            print_json(facts(found))
        else:
            show_plan(found)
        return
    result = pipeline.merge(
        loaded,
        out,
        profiles_dir=profiles,
        device=device,
        memory=memory,
        overwrite=overwrite,
        restart=restart,
        shard_bytes=shard_bytes,
        jobs=jobs,
        seed=random_seed,
        allow_pickle=allow_pickle,
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
    if not result.written:
        print(f"complete already: {out}")
        return
    scale = f", lambda = {result.scale:g}" if has_scale else ""
    print(f"merged into {out}: {size_text(result.plan.bytes_written)} in {result.seconds:.1f} s{scale}")
