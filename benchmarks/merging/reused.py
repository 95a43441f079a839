"""The same ratios where memory was used a moment ago: floor and merge in turn in one process.

`python -m benchmarks.merging.reused --work FOLDER`. In a process of its own a floor may write into page cache that the machine has
to find first; here the pages of the round before are free. Results go to benchmarks/merging-reused.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import yaml

import sensmerge

from . import family
from .__main__ import ROOT, machine
from .measure import floor, measured, warm
from .plot import BEGIN_REUSED, END_REUSED, fill, table_of_reused
from .recipes import SETTINGS, TARGETS


def main() -> None:
    """Measure the promised settings in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    folder = family.build(arguments.work, 26, "BF16", 3)
    output_bytes = family.parameters(26) * 2
    scratch = Path(tempfile.mkdtemp(dir=folder))
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in TARGETS}
    try:
        for turn in range(arguments.repeats + 1):
            for name in TARGETS:
                recipe = folder / f"{name.replace(', ', '-')}.yml"
                recipe.write_text(yaml.safe_dump(SETTINGS[name].recipe(3), sort_keys=False))
                inputs = [folder / model / "model.safetensors" for model in SETTINGS[name].inputs(3)]
                loaded = sensmerge.load_recipe(recipe)
                warm(inputs)
                below = measured(lambda inputs=inputs: floor(inputs, scratch / "floor", output_bytes))  # type: ignore[misc]
                (scratch / "floor").unlink()
                merge = measured(lambda loaded=loaded: sensmerge.merge(loaded, scratch / "out", jobs=2) and None)  # type: ignore[misc]
                shutil.rmtree(scratch / "out")
                # The first turn finds the memory, and loads the kernels.
                if turn:
                    rounds[name].append((below["wall"], merge["wall"]))
    finally:
        shutil.rmtree(scratch)
    results = {
        name: {
            "floor_s": round(statistics.median(each[0] for each in found), 3),
            "merge_s": round(statistics.median(each[1] for each in found), 3),
            "ratio_of_medians": round(
                statistics.median(each[1] for each in found) / statistics.median(each[0] for each in found), 3
            ),
            "ratio_of_fastest": round(min(each[1] for each in found) / min(each[0] for each in found), 3),
            "rounds": [[round(value, 3) for value in each] for each in found],
        }
        for name, found in rounds.items()
    }
    record = {
        "command": f"python -m benchmarks.merging.reused --work FOLDER --repeats {arguments.repeats}",
        "machine": machine(),
        "results": results,
    }
    kept = ROOT / "benchmarks" / "merging-reused.json"
    kept.write_text(json.dumps(record, indent=1) + "\n")
    fill(ROOT / "docs" / "benchmarks.md", BEGIN_REUSED, END_REUSED, table_of_reused(kept))
    for name, found in results.items():
        print(
            f"{name:18s} {found['ratio_of_medians']:.2f} x the floor (fastest over fastest {found['ratio_of_fastest']:.2f})"
        )


if __name__ == "__main__":
    main()
