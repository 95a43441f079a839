"""How long the kernels take to compile on first use, and how much the cache holds: `python -m benchmarks.merging.compilation`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

from .__main__ import ROOT, machine
from .recipes import SETTINGS


def tiny_family(root: Path) -> None:
    """A base and three experts of two small tensors, float32."""
    random = np.random.default_rng(0)
    for name in ("base", "e1", "e2", "e3"):
        (root / name).mkdir()
        tensors = {f"model.layers.{layer}.w": random.normal(size=(64, 48)).astype(np.float32) for layer in range(2)}
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({"model_type": "llama"}))


def seconds(root: Path, recipe: Path, cache: Path) -> float:
    """Wall time of the whole command."""
    out = Path(tempfile.mkdtemp(dir=root)) / "out"
    started = time.perf_counter()
    command = [sys.executable, "-m", "sensmerge", "merge", str(recipe), str(out)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "NUMBA_CACHE_DIR": str(cache)})
    return time.perf_counter() - started


def main() -> None:
    """Each method on a tiny family, first with no cache and then with it."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny_family(root)
        for name, setting in SETTINGS.items():
            recipe = root / f"{name.replace(', ', '-')}.yml"
            recipe.write_text(yaml.safe_dump(setting.recipe(3)))
            with tempfile.TemporaryDirectory() as cache:
                cold = seconds(root, recipe, Path(cache))
                warm = min(seconds(root, recipe, Path(cache)) for _ in range(3))
                size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
            results[name] = {"cold_s": round(cold, 2), "warm_s": round(warm, 2), "cache_kib": round(size / 1024)}
            print(f"{name:18s} first run {cold:.2f} s, later {warm:.2f} s, cache {size / 1024:.0f} KiB", flush=True)
    record = {"command": "python -m benchmarks.merging.compilation", "machine": machine(), "results": results}
    (ROOT / "benchmarks" / "compilation.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
