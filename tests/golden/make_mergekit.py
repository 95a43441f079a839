"""Make the golden merges anew with mergekit: every recipe of `recipes/`, over the family of `family.py`.

Needed only when a recipe or the family changes. mergekit is no dependency of this project; the files in the repository were
made by 0.1.5. In an environment of its own:

    python -m venv mergekit-venv
    mergekit-venv/bin/pip install mergekit==0.1.5
    mergekit-venv/bin/python -m tests.golden.make_mergekit      # from the root of the repository

It writes float32.npz and bfloat16.npz beside itself. In each: an entry `about` (JSON: versions, the generator's parameters, a
hash of the inputs, each recipe's tensors and their shapes) and one flat array a recipe, its tensors in that order: float32, or
uint16 where the recipe writes bfloat16 (the bits).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.golden import family

HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """mergekit takes a recipe's relative paths from the current folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def flat(values: torch.Tensor) -> NDArray[Any]:
    """The numbers of a tensor in one row; the bits of bfloat16."""
    whole = values.reshape(-1)
    return whole.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else whole.float().numpy()


def make(dtype: str) -> None:
    """Write one family's file."""
    models = family.build(dtype)
    about: dict[str, Any] = {
        "mergekit": version("mergekit"),
        "torch": torch.__version__,
        "seed": family.SEEDS[dtype],
        "inputs": family.digest(models),
        "recipes": {},
    }
    arrays: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as name, inside(Path(name)):
        family.write(models, dtype, Path(name))
        for path in sorted((HERE / "recipes" / dtype).glob("*.yml")):
            config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
            options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
            run_merge(config, f"merged-{path.stem}", options)
            merged = dict(sorted(load_file(f"merged-{path.stem}/model.safetensors").items()))
            about["recipes"][path.stem] = {tensor: list(values.shape) for tensor, values in merged.items()}
            arrays[path.stem] = np.concatenate([flat(values) for values in merged.values()])
    np.savez_compressed(HERE / f"{dtype}.npz", about=np.array(json.dumps(about)), **arrays)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        # A process each: mergekit remembers the first family's files by their relative paths.
        for each in family.DTYPES:
            subprocess.run([sys.executable, "-m", "tests.golden.make_mergekit", each], check=True)
    else:
        torch.set_num_threads(1)
        make(sys.argv[1])
