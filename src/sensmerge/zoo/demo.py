"""The whole of Sens-Merging on the tiny family: train, calibrate, merge every way, evaluate, and one honest table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import progress
from ..errors import OutputError
from ..evaluation.run import evaluate
from ..experiments.tables import Row, Table, markdown
from ..methods import METHODS
from ..pipeline import merge, versions
from ..recipe import load_recipe
from ..records import Coefficients, Scores, write_atomically
from .documents import DOMAINS
from .family import Family, train_family
from .sizes import size_named
from .training import threads

MARK = "demo.json"


@dataclass(frozen=True)
class Variant:
    """One row of the demo: how it is called, and the part of its recipe below the models."""

    name: str
    method: str
    sens: bool
    merge_method: str
    settings: str


VARIANTS = (
    Variant("average", "Averaging", False, "linear", ""),
    Variant("average-paper", "Averaging", True, "linear", "sens: {preset: paper}\n"),
    Variant("ta", "Task Arithmetic, λ = 1", False, "task_arithmetic", "parameters: {lambda: 1.0}\n"),
    Variant(
        "ta-paper",
        "Task Arithmetic, λ = 1",
        True,
        "task_arithmetic",
        "parameters: {lambda: 1.0}\nsens: {preset: paper}\n",
    ),
    Variant(
        "ta-auto",
        "Task Arithmetic, λ auto",
        False,
        "task_arithmetic",
        "parameters: {lambda: auto}\nsens: {rule: uniform}\n",
    ),
    Variant(
        "ta-paper-auto",
        "Task Arithmetic, λ auto",
        True,
        "task_arithmetic",
        "parameters: {lambda: auto}\nsens: {preset: paper}\n",
    ),
    Variant("calibrated", "preset: calibrated", True, "task_arithmetic", "sens: {preset: calibrated}\n"),
)


@dataclass(frozen=True)
class DemoResult:
    """What a demo leaves: its folder, the table, and the coefficients of the first seed's merges by variant."""

    folder: Path
    table: Table
    coefficients: dict[str, Coefficients]


@dataclass(frozen=True)
class _Outcome:
    """One model's scores, with λ and spread where it is a merge."""

    scores: Scores
    scale: float | None = None
    coefficients: Coefficients | None = None


def recipe_text(variant: Variant, family: Family) -> str:
    """The YAML of one row: an ordinary recipe that `sensmerge merge` takes."""
    lines = [f"# {variant.method}{' + Sens' if variant.sens else ''}", f"merge_method: {variant.merge_method}"]
    lines += [f"base_model: {family.base}", "models:"]
    needs_data = "sens:" in variant.settings
    for domain in DOMAINS:
        lines.append(f"  - model: {family.experts[domain]}")
        if needs_data:
            lines.append(f"    sens: {{data: {family.calibration[domain]}}}")
    return "\n".join(lines) + "\n" + variant.settings


def _seed_outcomes(family: Family, folder: Path) -> dict[str, _Outcome]:
    """Scores of base, experts and every variant's merge; recipes, merges, scores and calibration are kept in `folder`."""
    outcomes = {
        name: _Outcome(evaluate(path, DOMAINS, family.test))
        for name, path in {"base": family.base, **family.experts}.items()
    }
    for variant in VARIANTS:
        path = folder / "recipes" / f"{variant.name}.yml"
        write_atomically(path, recipe_text(variant, family))
        out = folder / "models" / variant.name
        result = merge(load_recipe(path), out, profiles_dir=folder / "calibration", overwrite=True)
        scale = result.scale if METHODS.get(variant.merge_method, where=str(path)).adds else None
        outcomes[variant.name] = _Outcome(evaluate(out, DOMAINS, family.test), scale, result.coefficients)
    for name, outcome in outcomes.items():
        outcome.scores.save(folder / "scores" / f"{name}.json")
    return outcomes


def _range(numbers: Sequence[float] | None, form: str) -> str:
    """One cell for several seeds: from the smallest to the largest, one number if they are told alike."""
    return "–".join(dict.fromkeys(format(number, form) for number in (min(numbers), max(numbers)))) if numbers else ""


def _row_facts(method: str, sens: bool | None, outcomes: Sequence[_Outcome]) -> dict[str, Any]:
    """One row of demo.json: lists over the seeds; λ and spread are null where there are none."""
    scales = [outcome.scale for outcome in outcomes if outcome.scale is not None]
    spreads = [outcome.coefficients.spread for outcome in outcomes if outcome.coefficients is not None]
    return {
        "method": method,
        "sens": sens,
        **{domain: [outcome.scores.tasks[domain].value for outcome in outcomes] for domain in DOMAINS},
        "average": [outcome.scores.average for outcome in outcomes],
        "lambda": scales or None,
        "spread": spreads or None,
    }


def table_of(facts: Mapping[str, Any]) -> Table:
    """The demo's table from the contents of its demo.json: base and experts on top, then every variant."""
    seeds = facts["seeds"]
    told = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± sd over seeds {', '.join(map(str, seeds))}"
    rows = [
        Row(
            method=row["method"],
            sens=row["sens"],
            values={domain: row[domain] for domain in DOMAINS},
            compared=row["sens"] is not None,
            notes=(_range(row["lambda"], "g"), _range(row["spread"], ".2f")),
        )
        for row in facts["rows"]
    ]
    return Table(f"Tiny family '{facts['size']}', {told}, percent", DOMAINS, ("λ", "spread"), rows)


def _claim(folder: Path) -> None:
    """Refuse a folder that holds something other than an earlier demo."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(
            "the demo's folder is a file", where=str(folder), why="a file is in its place", fix="name another folder"
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise OutputError(
            "the demo's folder is not empty",
            where=str(folder),
            why="it was not made by an earlier demo, and nothing is overwritten",
            fix="sensmerge demo NEW_FOLDER",
        )


def run_demo(
    folder: Path, size: str = "standard", seeds: Sequence[int] = (0,), cache: Path | None = None
) -> DemoResult:
    """Train (or reuse) the family of each seed, calibrate, merge every way, evaluate; write everything into `folder`.

    Leaves seed<k>/{recipes,models,scores,calibration}, table.md and demo.json. Raises OutputError if `folder` holds anything else
    than an earlier demo. Cost on two quiet cores: the training (see `train_family`) and about a minute a seed.
    """
    _claim(folder)
    if not (folder / MARK).is_file():
        write_atomically(folder / MARK, json.dumps({"schema": 1, "finished": False}) + "\n")
    by_seed = []
    for seed in seeds:
        family = train_family(size, seed, cache)
        progress.message(f"family of seed {seed}: {family.folder}")
        # As many threads as the training used: models this small only lose by more, on a busy machine a great deal.
        with threads(size_named(size).threads):
            by_seed.append(_seed_outcomes(family, folder / f"seed{seed}"))
    rows = [_row_facts(name, None, [outcomes[name] for outcomes in by_seed]) for name in ("base", *DOMAINS)]
    rows += [
        _row_facts(variant.method, variant.sens, [outcomes[variant.name] for outcomes in by_seed])
        for variant in VARIANTS
    ]
    facts = {
        "schema": 1,
        "finished": True,
        "command": f"sensmerge demo {folder.name} --size {size} --seed {seeds[0]} --seeds {len(seeds)}",
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "size": size,
        "seeds": list(seeds),
        "rows": rows,
    }
    table = table_of(facts)
    write_atomically(folder / "table.md", markdown(table))
    write_atomically(folder / MARK, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    coefficients = {
        name: outcome.coefficients for name, outcome in by_seed[0].items() if outcome.coefficients is not None
    }
    return DemoResult(folder, table, coefficients)
