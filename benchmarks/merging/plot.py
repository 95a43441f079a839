"""Draws benchmarks/merging.json: wall time over the floor, and peak memory, by method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .recipes import TARGETS

BEGIN, END = "<!-- from benchmarks/merging.json -->", "<!-- end -->"
BEGIN_REUSED, END_REUSED = "<!-- from benchmarks/merging-reused.json -->", "<!-- end of reused -->"


def table(results: Path) -> str:
    """Markdown: one row for each setting, size, dtype and number of experts that was measured."""
    order = ("BF16", "F16", "F32")
    found = json.loads(results.read_text())["results"]
    found.sort(
        key=lambda each: (
            order.index(each["dtype"]),
            each["experts"],
            -each["parameters"],
            each["setting"] not in TARGETS,
        )
    )
    rows = [
        "| setting | dtype | parameters | experts | wall over floor | promised | CPU over floor | peak, MiB | floor, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in found:
        target = TARGETS.get(each["setting"])
        rows.append(
            f"| {each['setting']} | {each['dtype']} | {each['parameters'] / 1e9:.2f} B | {each['experts']} |"
            f" {each['wall_over_floor']:.2f} | {'' if target is None else f'{target:g}'} | {each['cpu_over_floor']:.2f} |"
            f" {each['peak_mib']:.0f} | {each['floor']['wall']:.2f} |"
        )
    theirs = [each for each in found if "mergekit" in each]
    if theirs:
        rows += ["", "mergekit on the same family, once each:", ""]
        rows += ["| setting | wall over floor | CPU over floor | peak, MiB |", "|---|---:|---:|---:|"]
        rows += [
            f"| {each['setting']} | {each['mergekit_wall_over_floor']:.1f} | {each['mergekit_cpu_over_floor']:.1f} |"
            f" {each['mergekit_peak_mib']:.0f} |"
            for each in theirs
        ]
    return "\n".join(rows)


def table_of_reused(results: Path) -> str:
    """Markdown: the promised settings, with floor and merge in turn in one process."""
    rows = [
        "| setting | floor, s | merge, s | medians | fastest over fastest | promised |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, each in json.loads(results.read_text())["results"].items():
        rows.append(
            f"| {name} | {each['floor_s']:.2f} | {each['merge_s']:.2f} | {each['ratio_of_medians']:.2f} |"
            f" {each['ratio_of_fastest']:.2f} | {TARGETS[name]:g} |"
        )
    return "\n".join(rows)


def fill(page: Path, begin: str, end: str, text: str) -> None:
    """Put a table between its marks in a page."""
    old = page.read_text(encoding="utf-8")
    page.write_text(f"{old[: old.index(begin) + len(begin)]}\n{text}\n{old[old.index(end) :]}", encoding="utf-8")


def draw(results: Path, out: Path) -> None:
    """Two panels of horizontal bars: time over the floor at two sizes (and mergekit's), and memory above an idle process."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sensmerge"
    from matplotlib import pyplot

    record = json.loads(results.read_text())
    found = [each for each in record["results"] if each["dtype"] == "BF16" and each["experts"] == 3]
    sizes = sorted({each["parameters"] for each in found})
    names = list(dict.fromkeys(each["setting"] for each in found))
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(11, 0.36 * len(names) + 1.8), sharey=True)
    high = 0.8 / (len(sizes) + 1)
    for number, size in enumerate(sizes):
        rows: list[Any] = [
            next((e for e in found if e["setting"] == n and e["parameters"] == size), None) for n in names
        ]
        places = [place + number * high for place, row in enumerate(rows) if row]
        label = f"sensmerge, {size / 1e9:.1f} B parameters"
        time.barh(places, [row["wall_over_floor"] for row in rows if row], high, label=label)
        memory.barh(places, [row["peak_mib"] for row in rows if row], high, label=label)
    theirs = [
        (place, each) for place, n in enumerate(names) for each in found if each["setting"] == n and "mergekit" in each
    ]
    if theirs:
        places = [place + len(sizes) * high for place, _ in theirs]
        label = f"mergekit, {theirs[0][1]['parameters'] / 1e9:.1f} B parameters"
        time.barh(places, [each["mergekit_wall_over_floor"] for _, each in theirs], high, label=label, color="0.6")
        memory.barh(places, [each["mergekit_peak_mib"] for _, each in theirs], high, label=label, color="0.6")
    for place, name in enumerate(names):
        if name in TARGETS:
            time.plot([TARGETS[name]] * 2, [place - high / 2, place + 0.8 - high], color="black", lw=1.5)
    time.axvline(1, color="0.3", lw=0.8, ls=":")
    time.set_xscale("log")
    memory.set_xscale("log")
    time.set_yticks([place + high / 2 for place in range(len(names))], names)
    time.invert_yaxis()
    time.set_xlabel("wall time over the floor (black: what is promised)")
    memory.set_xlabel("peak memory above an idle process, MiB")
    time.legend(fontsize=7, loc="lower right")
    machine = record["machine"]
    figure.suptitle(f"Merging three experts in bfloat16, {machine['cores']} cores ({machine['cpu']})", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
