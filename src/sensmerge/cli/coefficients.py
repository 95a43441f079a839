"""`sensmerge coefficients RECIPE`: the coefficients, from kept profiles, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from .. import progress
from .arguments import AllowPickle, AsJson, Device, Memory, ProfilesDir, RecipePath
from .terminal import print_table

if TYPE_CHECKING:
    from ..records import Coefficients


def _cell(value: float, between: Sequence[float] | None) -> str:
    """A number with half the width of its 95 % interval, where one is known."""
    return f"{value:.4f}" if between is None else f"{value:.4f} ±{(between[1] - between[0]) / 2:.4f}"


def show(result: Coefficients) -> None:
    """Print what multiplies each expert's task vector in each layer, then what it was made from: α, τ, and the spread."""
    scale = "auto" if result.lambda_ is None else f"{result.lambda_:g}"
    applied = 1.0 if result.lambda_ is None else result.lambda_
    known = result.intervals
    experts = range(len(result.models))
    rows = [
        [layer, *(_cell(result.weights[i][at], None if known is None else known.weights[i][at]) for i in experts)]
        for at, layer in enumerate(result.layers)
    ]
    rows += [
        [f"({role})", *(f"{applied * w * result.total * s:.4f}" for s, w in zip(sigma, result.w, strict=True))]
        for role, sigma in result.other.items()
    ]
    title = f"Coefficients: preset {result.preset}, rule {result.rule}, T = {result.temperature:g}, lambda = {scale}"
    print_table(title, ["layer", *result.models], rows)
    factors = [
        [layer, *(_cell(result.alpha[i][at], None if known is None else known.alpha[i][at]) for i in experts)]
        for at, layer in enumerate(result.layers)
    ]
    factors.append(["tau", *(_cell(result.tau[i], None if known is None else known.tau[i]) for i in experts)])
    print_table("Made from alpha (by layer, eq. 3) and tau (eq. 5)", ["layer", *result.models], factors)
    print(f"spread max|K*sigma - 1| = {result.spread:.4f}")
    uncertainty = result.uncertainty()
    if uncertainty is not None:
        print(uncertainty)


def coefficients(
    recipe: RecipePath,
    temperature: Annotated[float | None, typer.Option(help="T of the softmax (eq. 6).")] = None,
    rule: Annotated[str | None, typer.Option(help="Coefficient rule; see `sensmerge list rules`.")] = None,
    total: Annotated[str | None, typer.Option(help="Sum of the coefficients: K or a number.")] = None,
    axis: Annotated[str | None, typer.Option(help="Sum of distances in eq. 5: row or column.")] = None,
    direction: Annotated[str | None, typer.Option(help="distance or similarity.")] = None,
    other: Annotated[
        str | None, typer.Option(help="Tensors outside the blocks: block_mean, own_group, base, uniform.")
    ] = None,
    profiles: ProfilesDir = None,
    device: Device = "auto",
    memory: Memory = "auto",
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Show the coefficients of a recipe; measures only what was not measured before."""
    from ..pipeline import weigh
    from ..recipe import load_recipe
    from ..sens_block import with_settings

    changes = {
        "rule": rule,
        "total": total,
        "axis": axis,
        "direction": direction,
        "other": other,
        "temperature": temperature,
    }
    loaded = with_settings(load_recipe(recipe), changes)
    result = weigh(loaded, profiles_dir=profiles, device=device, memory=memory, allow_pickle=allow_pickle)
    for warning in result.warnings:
        progress.warning(warning)
    if as_json:
        print(json.dumps(json.loads(result.to_json()), indent=2))
        return
    show(result)
