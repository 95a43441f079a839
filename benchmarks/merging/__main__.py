"""Measures merging against the floor, and draws it: `python -m benchmarks.merging`.

Each round of a setting is the floor and then the merge, each in a process of its own; the ratio of the medians is what is told.
Results go to benchmarks/merging.json with the machine's description, the plot to docs/merging.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from . import family
from .plot import BEGIN, END, draw, fill, table
from .recipes import COMPARED, SETTINGS, TARGETS, Setting

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_RESULTS = ROOT / "benchmarks" / "merging.json"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    memory = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    packages = {name: version(name) for name in ("sensmerge", "numpy", "numba", "llvmlite")}
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **packages,
    }


def child(python: str, what: str, setting: Setting, recipe: Path, experts: int, output_bytes: int) -> dict[str, float]:
    """One measurement in its own process."""
    script = str(Path(__file__).with_name("measure.py"))
    command = [
        python,
        script,
        what,
        str(recipe),
        "--output-bytes",
        str(output_bytes),
        "--inputs",
        *setting.inputs(experts),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "2" if what == "mergekit" else "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{what} {setting.method}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and every round."""
    median = {key: round(statistics.median(each[key] for each in rounds), 4) for key in ("wall", "cpu", "peak", "idle")}
    return {**median, "rounds": [{"wall": round(each["wall"], 4), "cpu": round(each["cpu"], 4)} for each in rounds]}


def measure(
    name: str, folder: Path, layers: int, dtype: str, experts: int, repeats: int, mergekit: str | None
) -> dict[str, Any]:
    """A setting on one family: floor and merge in turn."""
    setting = SETTINGS[name]
    recipe = folder / f"{name.replace(', ', '-')}.yml"
    recipe.write_text(yaml.safe_dump(setting.recipe(experts), sort_keys=False))
    output_bytes = family.parameters(layers) * (4 if dtype == "F32" else 2)
    floors, merges = [], []
    for _ in range(repeats):
        floors.append(child(sys.executable, "floor", setting, recipe, experts, output_bytes))
        merges.append(child(sys.executable, "sensmerge", setting, recipe, experts, output_bytes))
    floor, merge = summary(floors), summary(merges)
    result = {
        "setting": name,
        "dtype": dtype,
        "layers": layers,
        "parameters": family.parameters(layers),
        "experts": experts,
        "floor": floor,
        "sensmerge": merge,
        "wall_over_floor": round(merge["wall"] / floor["wall"], 3),
        "cpu_over_floor": round(merge["cpu"] / floor["cpu"], 3),
        "peak_mib": round(merge["peak"] / 2**20, 1),
    }
    if mergekit and name in COMPARED:
        theirs = summary([child(mergekit, "mergekit", setting, recipe, experts, output_bytes)])
        result["mergekit"] = theirs
        result["mergekit_wall_over_floor"] = round(theirs["wall"] / floor["wall"], 3)
        result["mergekit_cpu_over_floor"] = round(theirs["cpu"] / floor["cpu"], 3)
        result["mergekit_peak_mib"] = round(theirs["peak"] / 2**20, 1)
    told = f"{result['wall_over_floor']:.2f} x the floor's wall, {result['cpu_over_floor']:.2f} x its CPU"
    target = f" (target {TARGETS[name]})" if name in TARGETS else ""
    theirs = f"; mergekit {result['mergekit_wall_over_floor']:.1f} x" if "mergekit" in result else ""
    where = f"{name:18s} {dtype} {layers:3d} layers {experts} experts"
    print(f"{where}: {told}{target}, peak {result['peak_mib']:.0f} MiB{theirs}", flush=True)
    return result


def main() -> None:
    """Measure, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure, with 30 GB free")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=sorted(SETTINGS), help="only these settings")
    parser.add_argument("--layers", nargs="+", type=int, default=[26, 13], help="26 is half a billion parameters")
    parser.add_argument("--quick", action="store_true", help="the first size in bfloat16 alone")
    parser.add_argument("--mergekit", metavar="PYTHON", help="a Python that has mergekit, to compare with")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "merging.svg")
    arguments = parser.parse_args()
    names = arguments.only or list(SETTINGS)
    promised = [name for name in names if name in TARGETS]
    others = [name for name in names if name not in TARGETS]
    small, few, many = arguments.layers[0], min(2, arguments.repeats), arguments.repeats
    plans = [(name, small, "BF16", 3, many, arguments.mergekit) for name in promised]
    if not arguments.quick:
        plans += [(name, small, dtype, 3, few, None) for dtype in ("F16", "F32") for name in promised]
        plans += [(name, small, "BF16", 6, few, None) for name in promised]
    plans += [(name, small, "BF16", 3, few, None) for name in others]
    if not arguments.quick:
        plans += [(name, layers, "BF16", 3, few, None) for layers in arguments.layers[1:] for name in names]
    # As it would be typed elsewhere: without the places of this machine.
    command = "python -m benchmarks.merging --work FOLDER"
    command += f" --layers {' '.join(map(str, arguments.layers))} --repeats {many}"
    command += (" --quick" if arguments.quick else "") + (" --mergekit PYTHON" if arguments.mergekit else "")
    results = []
    for name, layers, dtype, experts, repeats, mergekit in plans:
        folder = family.build(arguments.work, layers, dtype, experts)
        results.append(measure(name, folder, layers, dtype, experts, repeats, mergekit))
        record = {
            "command": command,
            "machine": machine(),
            "mergekit": bool(arguments.mergekit),
            "results": results,
        }
        arguments.results.write_text(json.dumps(record, indent=1) + "\n")
    draw(arguments.results, arguments.plot)
    if arguments.results == DEFAULT_RESULTS:
        fill(ROOT / "docs" / "benchmarks.md", BEGIN, END, table(arguments.results))


if __name__ == "__main__":
    main()
