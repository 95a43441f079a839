"""`sensmerge diff A B`: two models side by side, by layer, by role, as a whole, or tensor by tensor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import AllowPickle, AsJson
from .terminal import print_json, print_table

if TYPE_CHECKING:
    from ..pipeline.comparing import Comparison, Diff

BAR = 12
_SHOWN = 8


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model: whatever a recipe may name.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="Compare the task vectors A - BASE and B - BASE too.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", metavar="N", min=1, max=256, help="Threads.")] = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models tensor by tensor: norms, angle, signs, equal elements."""
    from ..pipeline.comparing import diff as run

    found = run(a, b, base=base, allow_pickle=allow_pickle, jobs=jobs)
    if as_json:
        print_json(_facts(found))
        return
    listed = {**(found.tensors if tensors else found.groups), "whole model": found.whole}
    _print_figures(found, listed)
    _print_words(found)


def _facts(found: Diff) -> dict[str, object]:
    return {
        "a": found.a,
        "b": found.b,
        "base": found.base,
        "same_weights": found.same_weights,
        "whole": found.whole.figures,
        "groups": {name: each.figures for name, each in found.groups.items()},
        "tensors": {name: each.figures for name, each in found.tensors.items()},
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "shapes": {name: [list(ours), list(theirs)] for name, (ours, theirs) in found.shapes.items()},
        "dtypes": {name: list(pair) for name, pair in found.dtypes.items()},
        "bytes_differ": list(found.bytes_differ),
        "config": {key: list(pair) for key, pair in found.config.items()},
        "not_in_base": list(found.no_base),
    }


def _print_figures(found: Diff, listed: Mapping[str, Comparison]) -> None:
    columns = {"|A|": "norm_a", "|B|": "norm_b", "|A-B|": "difference", "relative": "relative", "cosine": "cosine"}
    columns |= {"signs": "signs", "equal": "equal", "max": "largest"}
    if found.base is not None:
        columns |= {"|A-base|": "task_norm_a", "|B-base|": "task_norm_b", "task cos": "task_cosine"}
        columns |= {"task signs": "task_signs"}
    widest = max((float(each.figures["relative"] or 0) for each in listed.values()), default=0.0)
    # A terminal that knows no blocks shows number signs.
    block = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    rows = []
    for name, each in listed.items():
        share = float(each.figures["relative"] or 0) / widest if widest else 0.0
        bar = block * (max(1, round(BAR * share)) if share else 0)
        rows.append([name, bar, *(_number(key, each.figures.get(key)) for key in columns.values())])
    beside = "" if found.base is None else f", base {found.base}"
    print_table(f"A = {found.a}, B = {found.b}{beside}", ["", "relative", *columns], rows, text_columns=2)


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in ("signs", "equal", "task_signs"):
        return f"{100 * value:.2f} %"
    return f"{value:.6f}" if key in ("cosine", "task_cosine") else f"{value:.4g}"


def _print_words(found: Diff) -> None:
    """Everything that is no figure, each kind with its first names."""
    whole = found.whole.figures
    if found.same_weights:
        print("every tensor is the same")
    for model, key in ((found.a, "nonfinite_a"), (found.b, "nonfinite_b"), (found.base, "nonfinite_base")):
        if whole.get(key):
            names = [name for name, each in found.tensors.items() if each.figures.get(key)]
            _tell(f"{whole[key]} elements of {model} are NaN or infinite, and left out", names)
    _tell(f"only in {found.a}", list(found.only_a))
    _tell(f"only in {found.b}", list(found.only_b))
    _tell("of unlike shapes, not compared", [f"{n} {list(x)} and {list(y)}" for n, (x, y) in found.shapes.items()])
    _tell("of unlike dtypes", [f"{name} {x} and {y}" for name, (x, y) in found.dtypes.items()])
    _tell("not floating point, and unlike", list(found.bytes_differ))
    _tell(f"not in {found.base} in this shape, so without task vectors", list(found.no_base))
    _tell("of unlike values in config.json", [f"{key}: {x} and {y}" for key, (x, y) in found.config.items()])


def _tell(what: str, names: list[str]) -> None:
    if names:
        more = f"; and {len(names) - _SHOWN} more (--json lists all)" if len(names) > _SHOWN else ""
        print(f"{what}: {'; '.join(names[:_SHOWN])}{more}")
