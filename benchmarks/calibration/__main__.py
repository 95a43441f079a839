"""Measures calibration: `python -m benchmarks.calibration --work FOLDER [--quick]`; results go to benchmarks/calibration.json.

Time is told over a plain batched forward and backward pass on the same weights in the same process, in turn (median of the rounds);
memory is the largest anonymous memory of the process, over the size of the weights. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .shapes import BILLION, SEVEN, SMALL, TINY, Shape, build, described, with_layers

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_RESULTS = ROOT / "benchmarks" / "calibration.json"
MIB = 2**20


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    packages = {name: version(name) for name in ("sensmerge", "torch", "transformers", "numpy")}
    cores = len(os.sched_getaffinity(0))
    return {"cpu": cpu, "cores": cores, "threads": 1, "python": platform.python_version(), **packages}


def child(what: str, folder: Path, dtype: str, samples: int, tokens: int, rounds: int = 1) -> dict[str, Any]:
    """One measurement in its own process."""
    command = [sys.executable, "-m", "benchmarks.calibration.measure", what, str(folder), "--dtype", dtype]
    command += ["--samples", str(samples), "--tokens", str(tokens), "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{what} {folder.name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def speed(work: Path, shape: Shape, rounds: int, samples: int, tokens: int) -> dict[str, Any]:
    """Our pass over the plain one."""
    found = child("compared", build(work, shape), "float32", samples, tokens, rounds)
    median = {
        kind: {key: round(statistics.median(each[key] for each in found[kind]), 4) for key in ("wall", "cpu")}
        for kind in ("plain", "sums")
    }
    ratio = round(median["sums"]["cpu"] / median["plain"]["cpu"], 3)
    print(f"speed: {shape.parameters / 1e6:.0f} M, {samples} x {tokens}: {ratio} x a plain pass's CPU time", flush=True)
    return {
        "shape": described(shape),
        "samples": samples,
        "tokens": tokens,
        "dtype": "float32",
        "ratio": ratio,
        **median,
    }


def memory(
    work: Path, what: str, shape: Shape, dtype: str, samples: int, tokens: int, *, modes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One calibration from the beginning, in each mode."""
    results = []
    for mode in modes:
        found = child(mode, build(work, shape), dtype, samples, tokens)
        weights = shape.parameters * (2 if dtype == "bfloat16" else 4)
        results.append(
            {
                "what": what,
                "mode": mode,
                "dtype": dtype,
                "shape": described(shape),
                "samples": samples,
                "tokens": tokens,
                "peak_mib": round(found["peak"] / MIB, 1),
                "imports_mib": round(found["imports"] / MIB, 1),
                "weights_mib": round(weights / MIB, 1),
                "peak_over_weights": round(found["peak"] / weights, 3),
                "wall": round(found["wall"], 3),
                "cpu": round(found["cpu"], 3),
            }
        )
        told = f"{results[-1]['peak_mib']:.0f} MiB for {results[-1]['weights_mib']:.0f} MiB of weights"
        size = f"{shape.layers} layers, vocabulary {shape.vocabulary}, {samples} x {tokens}"
        print(f"{what}, {mode}, {dtype}, {size}: {told}, {found['cpu']:.1f} s CPU", flush=True)
    return results


def extrapolated(points: list[dict[str, Any]], layers: int) -> dict[str, Any]:
    """The streamed peak of a model of so many layers, on the line through the two sizes that were measured."""
    first, last = points[0], points[-1]
    apart = last["shape"]["layers"] - first["shape"]["layers"]
    slope = (last["peak_mib"] - first["peak_mib"]) / apart
    peak = last["peak_mib"] + slope * (layers - last["shape"]["layers"])
    print(f"7 B: {peak:.0f} MiB at {layers} layers, extrapolated from {slope:+.1f} MiB a layer", flush=True)
    return {"layers": layers, "mib_a_layer": round(slope, 2), "peak_mib": round(peak, 1)}


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 8 GB free")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny shapes alone: a trial, whose results are not kept")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    arguments = parser.parse_args()
    work, quick = arguments.work, arguments.quick
    base = TINY if quick else SMALL
    both = ("resident", "streamed")
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.calibration --work FOLDER --rounds {arguments.rounds}",
        "machine": machine(),
        "speed": [speed(work, base, arguments.rounds, count, 128) for count in (1, 8)],
        "memory": [],
    }

    def add(what: str, shape: Shape, dtype: str = "float32", samples: int = 8, modes: tuple[str, ...] = both) -> None:
        record["memory"] += memory(work, what, shape, dtype, samples, 128, modes=modes)

    for samples in (8, 32):
        add("growth with samples", base, samples=samples)
    for layers in (base.layers // 2, 2 * base.layers):
        add("growth with layers", with_layers(base, layers))
    for vocabulary in (base.vocabulary // 2, 4 * base.vocabulary):
        add("growth with the vocabulary", replace(base, vocabulary=vocabulary))
    few, more = (1, 2) if quick else (2, 4)
    if not quick:
        add("1.1 B", BILLION, "bfloat16")
        add("1.1 B", BILLION, "float32", modes=("streamed",))
    seven = TINY if quick else SEVEN
    for layers in (few, more):
        add("7 B, a few layers", with_layers(seven, layers), "bfloat16", modes=("streamed",))
    record["extrapolation"] = extrapolated(record["memory"][-2:], seven.layers)
    if not quick:
        arguments.results.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
