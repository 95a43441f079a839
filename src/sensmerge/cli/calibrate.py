"""`sensmerge calibrate RECIPE`: measure every expert, and how far the experts stand apart."""

from __future__ import annotations

from .arguments import AsJson, Device, Memory, ProfilesDir, RecipePath
from .terminal import print_json, print_table


def calibrate(
    recipe: RecipePath,
    profiles: ProfilesDir = None,
    device: Device = "auto",
    memory: Memory = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure how sensitive every layer is and how far the experts stand apart; kept in <recipe>.sens/."""
    from ..pipeline import calibrate as measure
    from ..pipeline.calibrating import profiles_folder
    from ..recipe import load_recipe

    loaded = load_recipe(recipe)
    found, alignment = measure(loaded, profiles_dir=profiles, device=device, memory=memory)
    folder = profiles or profiles_folder(loaded)
    if as_json:
        print_json(
            {
                "profiles": [
                    {"model": p.model, "samples": p.samples, "tokens": p.tokens, "sensitivity": p.sensitivity}
                    for p in found
                ],
                "distances": None if alignment is None else alignment.distances,
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
