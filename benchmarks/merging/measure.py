"""One measurement in a process of its own: the floor, a merge by sensmerge, or a merge by mergekit. Prints one line of JSON.

Time is taken around the work alone, after imports and after a first tiny merge has loaded the kernels; memory is the peak of
resident memory during the work, less what the process held before it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Smaller and larger buffers are slower: these stay in the processor's cache.
FLOOR_CHUNK = 1 << 20


def status(field: str) -> int:
    """A number of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Wall and CPU seconds of `work`, and the bytes by which resident memory peaked above what was there before."""
    gc.collect()
    # Writing 5 sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    idle = status("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": status("VmHWM") - idle,
        "idle": idle,
    }


def warm(files: list[Path]) -> None:
    """Have the page cache hold the files."""
    buffer = bytearray(16 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def floor(inputs: list[Path], out: Path, output_bytes: int) -> None:
    """What cannot be undercut: every input byte read, an output of the right size allocated and written, one fsync; two threads."""
    descriptors = [os.open(path, os.O_RDONLY) for path in inputs]
    target = os.open(out, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    os.posix_fallocate(target, 0, output_bytes)
    sizes = [path.stat().st_size for path in inputs]
    pieces = iter(range(0, max(output_bytes, *sizes), FLOOR_CHUNK))
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(FLOOR_CHUNK))
        while True:
            with lock:
                start = next(pieces, None)
            if start is None:
                return
            for descriptor, size in zip(descriptors, sizes, strict=True):
                if start < size:
                    os.preadv(descriptor, [buffer[: min(FLOOR_CHUNK, size - start)]], start)
            if start < output_bytes:
                os.pwrite(target, buffer[: min(FLOOR_CHUNK, output_bytes - start)], start)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(target)
    for descriptor in (*descriptors, target):
        os.close(descriptor)


def tiny_merge(recipe: Path, folder: Path) -> None:
    """Merge the first two layers' worth of a tiny family with the same recipe, so that its kernels are loaded."""
    import numpy as np
    import yaml
    from safetensors.numpy import save_file

    import sensmerge

    data = yaml.safe_load(recipe.read_text())
    names = {data.get("base_model"), *(model["model"] for model in data["models"])} - {None}
    dtype = json.loads((recipe.parent / next(iter(names)) / "config.json").read_text())["torch_dtype"]
    random = np.random.default_rng(0)
    base = {f"model.layers.{layer}.w": random.normal(size=(64, 48)) for layer in range(2)}
    for name in sorted(names):
        (folder / name).mkdir(parents=True)
        tensors = {
            tensor: (values + 0.1 * random.normal(size=values.shape)).astype(np.float32)
            for tensor, values in base.items()
        }
        if dtype == "bfloat16":
            import torch
            from safetensors.torch import save_file as save_torch

            save_torch(
                {k: torch.from_numpy(v).bfloat16() for k, v in tensors.items()}, folder / name / "model.safetensors"
            )
        else:
            stored = {k: v.astype(np.dtype(dtype)) for k, v in tensors.items()}
            save_file(stored, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / recipe.name).write_text(recipe.read_text())
    sensmerge.merge(sensmerge.load_recipe(folder / recipe.name), folder / "out")


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("floor", "sensmerge", "mergekit"))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--inputs", nargs="+", required=True, help="model folders that the merge reads")
    parser.add_argument("--output-bytes", type=int, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    files = [
        recipe_file
        for name in arguments.inputs
        for recipe_file in (arguments.recipe.parent / name).glob("*.safetensors")
    ]
    scratch = Path(tempfile.mkdtemp(dir=arguments.recipe.parent))
    try:
        if arguments.what == "floor":
            warm(files)
            result = measured(lambda: floor(files, scratch / "out", arguments.output_bytes))
        elif arguments.what == "sensmerge":
            import sensmerge

            tiny_merge(arguments.recipe, scratch / "tiny")
            recipe = sensmerge.load_recipe(arguments.recipe)
            warm(files)

            def merge() -> None:
                sensmerge.merge(recipe, scratch / "out", jobs=arguments.jobs)

            result = measured(merge)
        else:
            import yaml
            from mergekit.config import MergeConfiguration
            from mergekit.merge import MergeOptions, run_merge

            config = MergeConfiguration.model_validate(yaml.safe_load(arguments.recipe.read_text()))
            warm(files)
            os.chdir(arguments.recipe.parent)
            options = MergeOptions(copy_tokenizer=False, random_seed=1, quiet=True, write_model_card=False)
            result = measured(lambda: run_merge(config, str(scratch / "out"), options))
    finally:
        shutil.rmtree(scratch)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
