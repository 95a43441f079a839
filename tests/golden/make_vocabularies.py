"""Make the golden merges of unlike vocabularies anew with mergekit; see make_mergekit.py for how it is installed and run.

It writes vocabularies.npz beside itself: for each recipe the tokens in the order of their ids (JSON), and the rows of the embedding
and of the head.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.golden.make_mergekit import HERE, inside
from tests.golden.vocabularies import EMBED, HEAD, RECIPES, write


def make() -> None:
    """Write the file."""
    arrays: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as name, inside(Path(name)):
        write(Path(name))
        for recipe, text in RECIPES.items():
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            run_merge(config, f"merged-{recipe}", MergeOptions(write_model_card=False, quiet=True))
            ids = AutoTokenizer.from_pretrained(f"merged-{recipe}").get_vocab()
            merged = load_file(f"merged-{recipe}/model.safetensors")
            arrays[f"{recipe}/tokens"] = np.array(json.dumps(sorted(ids, key=lambda token: ids[token])))
            for tensor in (EMBED, HEAD):
                arrays[f"{recipe}/{tensor}"] = merged[tensor].numpy()
    np.savez_compressed(HERE / "vocabularies.npz", **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make()
