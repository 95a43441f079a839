"""The rows that mergekit gives each token of unlike vocabularies: its own merges, made by make_vocabularies.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import sensmerge as sm
from tests.golden.vocabularies import EMBED, HEAD, RECIPES, write

GOLDEN = Path(__file__).with_name("vocabularies.npz")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabularies")
    write(folder)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_every_token_has_the_row_that_mergekit_gives_it(family: Path, tmp_path: Path, name: str) -> None:
    """The same tokens and as many rows; a union's new tokens may stand in another order, so rows are compared by token."""
    (family / f"{name}.yml").write_text(RECIPES[name])
    sm.merge(sm.load_recipe(family / f"{name}.yml"), tmp_path / "out")
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    found = load_file(tmp_path / "out" / "model.safetensors")
    with np.load(GOLDEN) as golden:
        tokens = json.loads(str(golden[f"{name}/tokens"]))
        assert set(tokens) == set(ids)
        order = [ids[token] for token in tokens]
        for tensor in (EMBED, HEAD):
            theirs = golden[f"{name}/{tensor}"]
            assert found[tensor].shape == theirs.shape
            np.testing.assert_allclose(found[tensor][order], theirs[: len(tokens)], atol=2e-6)
            np.testing.assert_allclose(found[tensor][len(tokens) :], theirs[len(tokens) :], atol=2e-6)
