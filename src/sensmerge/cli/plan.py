"""`sensmerge plan RECIPE`: what a merge would do, or every reason why it cannot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import AllowPickle, AsJson, Jobs, ProfilesDir, RandomSeed, RecipePath, ShardSize
from .terminal import parse_size, print_json, print_table, size_text

if TYPE_CHECKING:
    from ..pipeline import Outlook


def facts(found: Outlook) -> dict[str, Any]:
    """Everything that is known of the merge, for --json."""
    plan = found.plan
    return {
        "recipe": str(found.recipe),
        "out": None if found.assumed else str(found.out),
        "method": plan.method,
        "base": plan.base,
        "models": list(plan.models),
        "found": [asdict(model) for model in found.models],
        "parameters": dict(found.settings),
        "tensors": len(plan.tensors),
        "files": [file for file, _ in plan.shards],
        "bytes_read": plan.bytes_read,
        "bytes_read_again": found.cost.bytes_again,
        "bytes_written": plan.bytes_written,
        "peak_memory_bytes": found.cost.peak_bytes,
        "jobs": found.jobs,
        "scratch_bytes": found.scratch_bytes,
        "free_bytes": found.free_bytes,
        "calibration": [asdict(step) for step in found.calibration],
        "seconds": None if found.seconds is None else round(found.seconds, 1),
    }


def show(found: Outlook) -> None:
    """Print the outlook of a merge that can be done."""
    plan = found.plan
    rows = [
        [
            f"{each.model} (base)" if each.is_base else each.model,
            " + ".join(each.folders),
            each.dtype,
            _count(each.parameters),
        ]
        for each in found.models
    ]
    others = ", ".join(model for model in plan.models if model != plan.base)
    on = f" on {plan.base}" if plan.base else ""
    title = f"{plan.method} of {others}{on}: {len(plan.tensors)} tensors fit together"
    print_table(title, ["model", "found in", "dtype", "parameters"], rows, text_columns=3)
    if found.settings:
        print("parameters  " + ", ".join(f"{name} {_value(value)}" for name, value in found.settings.items()))
    again = f", and {size_text(found.cost.bytes_again)} of it once more" if found.cost.bytes_again else ""
    print(f"reads       {size_text(plan.bytes_read)}{again}")
    to, there = ("", "beside the recipe") if found.assumed else (f" to {found.out}", "there")
    print(f"writes      {size_text(plan.bytes_written)} in {len(plan.shards)} file(s){to}")
    print(
        f"disk        {size_text(found.scratch_bytes)} while it is written; {size_text(found.free_bytes)} are free {there}"
    )
    print(f"memory      about {size_text(found.cost.peak_bytes)} for the merge itself, with {found.jobs} thread(s)")
    print(f"time        {_time(found)}")
    if found.calibration:
        print()
        steps = [[step.name, step.state, step.source, str(step.samples or "")] for step in found.calibration]
        print_table("Calibration", ["what", "state", "from", "samples"], steps, text_columns=3)


def _time(found: Outlook) -> str:
    if found.seconds is None:
        return "not estimated: this method merges whole tensors"
    beside = "; calibration comes on top" if any("measure" in step.state for step in found.calibration) else ""
    return f"about {_duration(found.seconds)}, if all is read as fast as a sample was, and written as fast{beside}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _count(parameters: int) -> str:
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= scale:
            return f"{parameters / scale:.2f} {unit}"
    return str(parameters)


def plan(
    recipe: RecipePath,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder to write [one beside the recipe].")
    ] = None,
    profiles: ProfilesDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="OUT may be replaced.")] = False,
    shard_size: ShardSize = "5GB",
    jobs: Jobs = None,
    random_seed: RandomSeed = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Check everything that can be known before a merge, and say what it would do; nothing is written."""
    from ..pipeline import outlook
    from ..recipe import load_recipe

    found = outlook(
        load_recipe(recipe),
        out,
        profiles_dir=profiles,
        # Without OUT nobody said that a folder of that name is in the way.
        overwrite=overwrite or out is None,
        shard_bytes=parse_size(shard_size),
        jobs=jobs,
        seed=random_seed,
        allow_pickle=allow_pickle,
    )
    if as_json:
        print_json(facts(found))
    else:
        show(found)
