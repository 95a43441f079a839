"""`sensmerge calibrate RECIPE`: measure every expert, and how far the experts stand apart."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import progress
from .arguments import AllowPickle, AsJson, Device, Memory, ProfilesDir, RecipePath
from .terminal import print_json, print_table


def calibrate(
    recipe: RecipePath,
    until: Annotated[
        float | None,
        typer.Option(help="Draw samples until half the widest 95 % interval of K*sigma is at most this."),
    ] = None,
    start: Annotated[int | None, typer.Option(min=2, help="With --until: samples of the first round [16].")] = None,
    growth: Annotated[
        float, typer.Option(min=1.0, help="With --until: how many times as many samples in each round.")
    ] = 1.5,
    profiles: ProfilesDir = None,
    device: Device = "auto",
    memory: Memory = "auto",
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Measure how sensitive every layer is and how far the experts stand apart; kept in <recipe>.sens/."""
    from ..pipeline import calibrate as measure
    from ..pipeline.calibrating import profiles_folder
    from ..pipeline.enough import drawn_samples
    from ..recipe import load_recipe
    from ..sens_block import settings_of, with_settings

    written = load_recipe(recipe)
    loaded = with_settings(written, {"until": until, "samples": start})
    if settings_of(loaded).until is None and start is not None:
        raise typer.BadParameter("--start means something only with --until, or with `until:` in the recipe")
    folder = profiles or profiles_folder(loaded)
    found, alignment = measure(
        loaded, profiles_dir=profiles, device=device, memory=memory, growth=growth, allow_pickle=allow_pickle
    )
    drawn = drawn_samples(loaded, folder)
    if until is not None and settings_of(written).until != until and drawn is not None:
        progress.message(
            f"to merge with these samples, write `until: {until:g}` or `samples: {drawn.samples}` in the recipe's `sens:` block"
        )
    if as_json:
        print_json(
            {
                "profiles": [
                    {"model": p.model, "samples": p.samples, "tokens": p.tokens, "sensitivity": p.sensitivity}
                    for p in found
                ],
                "distances": None if alignment is None else alignment.distances,
                "rounds": None if drawn is None else drawn.rounds,
                "folder": str(folder),
            }
        )
        return
    rows = [[p.model, str(p.samples), str(p.tokens), f"{sum(p.sensitivity):.4g}"] for p in found]
    print_table("Sensitivity", ["model", "samples", "loss tokens", "sum over layers"], rows)
    if alignment is not None:
        print_table(
            "Distances (row: model; column: samples of the task)",
            ["", *alignment.models],
            [
                [name, *(f"{g:.4g}" for g in row)]
                for name, row in zip(alignment.models, alignment.distances, strict=True)
            ],
        )
    print(f"kept in {folder}")
