"""Tokenizers that this project did not write: real sentencepiece and byte-level vocabularies, read, told apart and united."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import sensmerge as sm
from sensmerge.checkpoints.vocabulary.token_map import token_map
from sensmerge.errors import IncompatibleModelsError
from tests.builders import llama_config

DATA = os.environ.get("SENSMERGE_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="SENSMERGE_DATA names no folder with real tokenizers")
EMBED = "model.embed_tokens.weight"


def model(folder: Path, tokenizer: str, rows: int, seed: int) -> Path:
    """A tiny model with the files of a real tokenizer."""
    assert DATA is not None
    torch.manual_seed(seed)
    config = llama_config(vocab_size=rows, hidden_size=4, intermediate_size=4, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in (Path(DATA) / "tokenizers" / tokenizer).iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def write_gpt2_json(folder: Path) -> Tokenizer:
    """A tokenizer.json from GPT-2's vocab.json and merges.txt, as the tokenizers library reads them."""
    made = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    return made


def recipe(folder: Path, base: str, expert: str, policy: str = "") -> Path:
    path = folder / "recipe.yml"
    path.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {expert}}}]\n{policy}\nallow: [unrelated]\n"
    )
    return path


def test_a_checkpoint_with_one_token_more_and_nothing_but_sentencepiece(tmp_path: Path) -> None:
    """32001 rows against 32000, as in many fine-tunes of Llama 2: tokenizer.model and added_tokens.json are all there is."""
    base, expert = model(tmp_path / "base", "llama2", 32000, 0), model(tmp_path / "expert", "llama2", 32001, 1)
    (expert / "added_tokens.json").write_text('{"[PAD]": 32000}')
    found = token_map(expert)
    assert found is not None
    assert len(found.ids) == 32001
    assert [found.ids[token] for token in ("<unk>", "<s>", "</s>", "<0x00>", "[PAD]")] == [0, 1, 2, 3, 32000]
    with pytest.raises(IncompatibleModelsError) as caught:
        sm.merge(sm.load_recipe(recipe(tmp_path, "base", "expert")), tmp_path / "out")
    assert "1 token(s) differ: '[PAD]' is missing in base, 32000 in expert" in caught.value.why
    # A union needs a tokenizer.json, so only the line that works is told.
    [lines] = re.findall(r"(?m)^tokenizer:\n  source: \w+$", caught.value.fix)
    assert lines.endswith("base")
    sm.merge(sm.load_recipe(recipe(tmp_path, "base", "expert", lines)), tmp_path / "out")
    np.testing.assert_allclose(
        load_file(tmp_path / "out" / "model.safetensors")[EMBED],
        load_file(expert / "model.safetensors")[EMBED][:32000],
        atol=1e-6,
    )
    with pytest.raises(IncompatibleModelsError, match="cannot be added") as caught:
        sm.merge(sm.load_recipe(recipe(tmp_path, "base", "expert", "tokenizer_source: union")), tmp_path / "union")
    assert str(base) in caught.value.fix
    sm.merge(sm.load_recipe(recipe(tmp_path, "base", "expert", "tokenizer_source: expert")), tmp_path / "expert-out")
    assert json.loads((tmp_path / "expert-out" / "config.json").read_text())["vocab_size"] == 32001
    assert (tmp_path / "expert-out" / "added_tokens.json").exists()


def test_two_vocabularies_of_one_size_are_told_apart(tmp_path: Path) -> None:
    model(tmp_path / "base", "llama2", 32000, 0)
    model(tmp_path / "expert", "mistral-v0.1", 32000, 1)
    with pytest.raises(IncompatibleModelsError, match="differ") as caught:
        sm.merge(sm.load_recipe(recipe(tmp_path, "base", "expert")), tmp_path / "out")
    assert re.search(r"\d{4,} token\(s\) differ: ", caught.value.why)


def test_a_union_of_real_tokenizers_loads_and_encodes_as_before(tmp_path: Path) -> None:
    """GPT-2 with Llama 2's pieces behind: ids stay, texts become the same ids, and rows are those of their owners."""
    base, expert = model(tmp_path / "base", "gpt2", 50304, 0), model(tmp_path / "expert", "llama2", 32000, 1)
    before = write_gpt2_json(base)
    sm.merge(sm.load_recipe(recipe(tmp_path, "base", "expert", "tokenizer: {source: union}")), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids, ours, theirs = tokenizer.get_vocab(), before.get_vocab(), token_map(expert)
    assert theirs is not None
    assert ids.keys() == ours.keys() | theirs.ids.keys()
    assert all(ids[token] == place for token, place in ours.items())
    text = "The merged model's tokenizer — déjà vu, 你好, 12345\n\n\tdef f(x): return x"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == before.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("x</s>y", add_special_tokens=False)["input_ids"][1] == ids["</s>"]
    found = load_file(tmp_path / "out" / "model.safetensors")[EMBED]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(found) == len(ids) == loaded.config.vocab_size
    row = load_file(expert / "model.safetensors")[EMBED][theirs.ids["▁the"]]
    np.testing.assert_array_equal(found[ids["▁the"]], row)
