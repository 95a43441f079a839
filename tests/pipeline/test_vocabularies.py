"""Models of unlike vocabularies: refused with lines that work when pasted, merged token by token; the output agrees with itself."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import sensmerge as sm
from sensmerge.errors import IncompatibleModelsError, RecipeError, SensmergeError
from sensmerge.execution.run import execute
from sensmerge.pipeline import dry_run
from sensmerge.pipeline.models import open_models
from sensmerge.plan import make_plan
from sensmerge.progress import listening
from tests.builders import VOCABULARY, byte_tokenizer, llama_config

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = "a tale of <new> rows"


def model(
    folder: Path,
    seed: int,
    *,
    added: Sequence[str | AddedToken] = (),
    rows: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
) -> Path:
    """A random Llama with a byte tokenizer, `added` tokens behind its own, and as many rows as tokens unless told."""
    torch.manual_seed(seed)
    config = llama_config(vocab_size=rows or VOCABULARY + len(added), tie_word_embeddings=tied, pad_token_id=0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    if tokenizer:
        fast = byte_tokenizer()
        fast.add_tokens(list(added))
        fast.save_pretrained(folder)
    return folder


def recipe(folder: Path, models: Sequence[str], policy: str = "", *, base: str | None = "base", head: str = "") -> Path:
    """A recipe in `folder`; task arithmetic of half of each model on a base, else their mean."""
    entries = "".join(f"  - {{model: {name}, parameters: {{weight: 0.5}}}}\n" for name in models)
    method = "linear" if base is None else f"task_arithmetic\nbase_model: {base}"
    path = folder / "recipe.yml"
    path.write_text(f"merge_method: {method}\n{head}models:\n{entries}{policy}\nallow: [unrelated]\n")
    return path


def merged(path: Path, out: Path, **options: Any) -> dict[str, NDArray[np.float32]]:
    """The weights of the merge."""
    sm.merge(sm.load_recipe(path), out, **options)
    return weights(out)


def weights(folder: Path) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def ids_of(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def assert_loads(out: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """Config, matrices and tokenizer agree, and transformers loads the model without a word of warning."""
    with caplog.at_level(logging.WARNING):
        loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [record for record in caplog.records if "size" in record.getMessage().lower()]
    rows = json.loads((out / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.get_output_embeddings().weight.shape[0] == rows
    assert max(tokenizer.get_vocab().values()) < rows
    assert tokenizer.get_vocab() == ids_of(out)
    return loaded


def pasted(error: SensmergeError) -> list[str]:
    """The blocks of lines that a fix gives, as they are."""
    return [block.strip("\n") for block in re.findall(r"(?ms)^tokenizer:\n.*?(?=^\S|\Z)", error.fix)]


# ----------------------------------------------------------------------------------------------------------- refused


def test_without_a_policy_the_lines_to_paste_are_told_and_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model(tmp_path / "base", 0)
    model(tmp_path / "expert", 1, added=["<new>"])
    path = recipe(tmp_path, ["expert"])
    for action in (sm.merge, dry_run):
        with pytest.raises(IncompatibleModelsError, match="tokenizers of these models differ") as caught:
            action(sm.load_recipe(path), tmp_path / "out")
        assert "1 token(s) differ: '<new>' is missing in base, 259 in expert" in caught.value.why
        assert "base has 259 rows, expert 260" in caught.value.why
    assert not (tmp_path / "out").exists()
    blocks = pasted(caught.value)
    assert blocks == ["tokenizer:\n  source: base", "tokenizer:\n  source: union"]
    for block, rows in zip(blocks, (259, 260), strict=True):
        merged(recipe(tmp_path, ["expert"], block), tmp_path / "out", overwrite=True)
        loaded = assert_loads(tmp_path / "out", caplog)
        assert loaded.config.vocab_size == rows


def permuted(source: Path, folder: Path, seed: int) -> Path:
    """The same model with its tokens in another order: rows, ids and special ids move together."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    order = np.random.default_rng(seed).permutation(VOCABULARY)  # the new id of each old one
    back = torch.tensor(np.argsort(order))
    save_file(
        {n: t[back].contiguous() if n in (EMBED, HEAD) else t for n, t in tensors.items()}, folder / "model.safetensors"
    )
    data = json.loads((source / "tokenizer.json").read_text())
    data["model"]["vocab"] = {token: int(order[place]) for token, place in data["model"]["vocab"].items()}
    for entry in data["added_tokens"]:
        entry["id"] = int(order[entry["id"]])
    text = json.dumps(data["post_processor"]).replace('"ids": [1]', f'"ids": [{order[1]}]')
    data["post_processor"] = json.loads(text)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((source / "config.json").read_text())
    config |= {key: int(order[config[key]]) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("source", ["base", "union", "b"])
def test_copies_of_one_model_in_other_orders_of_tokens_are_that_model(
    tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Same size, other order: seen without a policy, and with one every text has the logits that it had."""
    model(tmp_path / "base", 0)
    for name, seed in (("b", 1), ("c", 2)):
        permuted(tmp_path / "base", tmp_path / name, seed)
    plain = recipe(tmp_path, ["base", "b", "c"], base=None)
    with pytest.raises(IncompatibleModelsError, match="differ") as caught:
        sm.merge(sm.load_recipe(plain), tmp_path / "out")
    assert "base, b, c" in caught.value.where
    policy = f"tokenizer: {{source: {source}}}"
    merged(recipe(tmp_path, ["base", "b", "c"], policy, base=None), tmp_path / "out")
    loaded, before = assert_loads(tmp_path / "out", caplog), AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer, old = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "base"))
    with torch.no_grad():
        ours = loaded(**tokenizer(TEXT, return_tensors="pt")).logits[0]
        theirs = before(**old(TEXT, return_tensors="pt")).logits[0]
    order = [tokenizer.get_vocab()[token] for token in sorted(old.get_vocab(), key=old.get_vocab().get)]
    torch.testing.assert_close(ours[:, order], theirs, atol=1e-4, rtol=1e-4)
    assert tokenizer.decode(loaded.config.eos_token_id) == old.decode(before.config.eos_token_id)
    donor = tmp_path / ("b" if source == "b" else "base")
    assert ids_of(tmp_path / "out") == ids_of(donor)


def test_rows_that_only_pad_are_seen_and_never_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One tokenizer, 264 against 272 rows: the lines that are told keep the rows of the base, whichever it is."""
    model(tmp_path / "short", 0, rows=264)
    model(tmp_path / "long", 1, rows=272)
    for base, other, rows in (("short", "long", 264), ("long", "short", 272)):
        with pytest.raises(IncompatibleModelsError) as caught:
            dry_run(sm.load_recipe(recipe(tmp_path, [other], base=base)), tmp_path / "out")
        assert "has 264 rows" in caught.value.why or "has 272 rows" in caught.value.why
        path = recipe(tmp_path, [other], pasted(caught.value)[0], base=base)
        found = merged(path, tmp_path / f"out-{base}")
        assert_loads(tmp_path / f"out-{base}", caplog)
        one, two = weights(tmp_path / base), weights(tmp_path / other)
        expected = one[EMBED].copy()
        # By position where both have the row; where only the base has it, the other's difference from it is nothing.
        expected[:264] += 0.5 * (two[EMBED][:264] - one[EMBED][:264])
        assert len(found[EMBED]) == rows
        np.testing.assert_allclose(found[EMBED], expected, atol=1e-6)


def test_all_models_that_differ_are_told_at_once(tmp_path: Path) -> None:
    model(tmp_path / "base", 0)
    model(tmp_path / "a", 1, added=["<a>"])
    model(tmp_path / "b", 2, added=["<b>", "<c>"])
    with pytest.raises(IncompatibleModelsError) as caught:
        dry_run(sm.load_recipe(recipe(tmp_path, ["a", "b"])), tmp_path / "out")
    assert "'<a>' is missing in base" in caught.value.why
    assert "2 token(s) differ: '<b>' is missing in base" in caught.value.why


def test_tokens_without_a_row_are_told_with_lines_that_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tokenizer may name more tokens than its matrices have rows."""
    model(tmp_path / "base", 0, added=["<more>"], rows=VOCABULARY)
    model(tmp_path / "expert", 1)
    with pytest.raises(IncompatibleModelsError) as caught:
        sm.merge(sm.load_recipe(recipe(tmp_path, ["expert"], "tokenizer: {source: base}")), tmp_path / "out")
    assert "'<more>'" in caught.value.why
    [block] = pasted(caught.value)
    found = merged(recipe(tmp_path, ["expert"], block), tmp_path / "out")
    assert_loads(tmp_path / "out", caplog)
    assert len(found[EMBED]) == 260
    assert not found[EMBED][259].any()
    # The same from a recipe without a policy: what it tells to paste works at once.
    with pytest.raises(IncompatibleModelsError) as caught:
        sm.merge(sm.load_recipe(recipe(tmp_path, ["expert"])), tmp_path / "again")
    for number, block in enumerate(pasted(caught.value)):
        merged(recipe(tmp_path, ["expert"], block), tmp_path / f"again-{number}")


class Heard:
    """Keeps the warnings that are told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def message(self, text: str) -> None:
        pass

    def task(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda steps: None)


def test_models_without_tokenizer_files(tmp_path: Path) -> None:
    """As many rows: taken as they are, and said where a policy needs to know; other rows: refused."""
    for name, seed, rows in (("base", 0, 259), ("same", 1, 259), ("more", 2, 260)):
        model(tmp_path / name, seed, rows=rows, tokenizer=False)
    plain = merged(recipe(tmp_path, ["same"]), tmp_path / "plain")
    policy = merged(recipe(tmp_path, ["same"], "tokenizer_source: base"), tmp_path / "policy")
    np.testing.assert_array_equal(plain[EMBED], policy[EMBED])
    for lines in ("", "tokenizer_source: base", "tokenizer: {source: union}"):
        with pytest.raises(IncompatibleModelsError) as caught:
            dry_run(sm.load_recipe(recipe(tmp_path, ["more"], lines)), tmp_path / "out")
        assert f"copy the models' own tokenizer files into {tmp_path}" in caught.value.fix
    byte_tokenizer().save_pretrained(tmp_path / "base")
    heard = Heard()
    with listening(heard):
        dry_run(sm.load_recipe(recipe(tmp_path, ["same"], "tokenizer_source: base")), tmp_path / "known")
    assert heard.warnings == ["'same' has no tokenizer files: its rows are taken to be the tokens of 'base'"]


def test_sens_with_unlike_vocabularies_is_refused_by_name(tmp_path: Path) -> None:
    model(tmp_path / "base", 0)
    model(tmp_path / "expert", 1, added=["<new>"])
    for lines in ("", "tokenizer: {source: base}\n"):
        path = recipe(tmp_path, ["expert"], lines + "sens: {rule: uniform}")
        with pytest.raises(RecipeError, match="unlike vocabularies is not supported yet") as caught:
            sm.merge(sm.load_recipe(path), tmp_path / "out")
    given = recipe(tmp_path, ["expert"], (pasted(caught.value) or ["tokenizer: {source: base}"])[0])
    merged(given, tmp_path / "out")
    same = recipe(tmp_path, ["base"], "tokenizer: {source: base}\nsens: {rule: uniform}", base=None)
    with pytest.raises(SensmergeError, match="needs a base"):
        sm.merge(sm.load_recipe(same), tmp_path / "same")


# ------------------------------------------------------------------------------------------------------------ merged


def test_base_and_model_keep_that_models_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """259 against 260 tokens, either way round."""
    model(tmp_path / "base", 0)
    model(tmp_path / "expert", 1, added=["<new>"])
    base, expert = weights(tmp_path / "base"), weights(tmp_path / "expert")
    found = merged(recipe(tmp_path, ["expert"], "tokenizer: {source: base}"), tmp_path / "base-out")
    assert_loads(tmp_path / "base-out", caplog)
    for name in base:
        np.testing.assert_allclose(found[name], 0.5 * (base[name] + expert[name][: len(base[name])]), atol=1e-6)
    assert (tmp_path / "base-out" / "tokenizer.json").read_bytes() == (
        tmp_path / "base" / "tokenizer.json"
    ).read_bytes()
    found = merged(recipe(tmp_path, ["expert"], "tokenizer_source: expert"), tmp_path / "out")
    assert_loads(tmp_path / "out", caplog)
    # The base has no such row: it is taken to have the only owner's, so the difference is nothing.
    np.testing.assert_array_equal(found[EMBED][259], expert[EMBED][259])
    np.testing.assert_array_equal(found[HEAD][259], expert[HEAD][259])
    np.testing.assert_allclose(found[EMBED][:259], 0.5 * (base[EMBED] + expert[EMBED][:259]), atol=1e-6)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "expert" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_union_keeps_all_tokens_in_an_order_that_does_not_depend_on_the_recipe(
    tmp_path: Path, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model(tmp_path / "base", 0, added=["<shared>"], tied=tied)
    model(tmp_path / "b", 1, added=[AddedToken("<b>", special=True), "<shared>"], tied=tied)
    model(tmp_path / "a", 2, added=["<a>", "<both>"], tied=tied)
    model(tmp_path / "c", 3, added=["<both>"], tied=tied)
    outs = []
    for number, order in enumerate((["b", "a", "c"], ["c", "a", "b"])):
        outs.append(tmp_path / f"out-{number}")
        merged(recipe(tmp_path, order, "tokenizer: {source: union}"), outs[-1])
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes(), file
    assert_loads(outs[0], caplog)
    ids = ids_of(outs[0])
    assert {token: ids[token] for token in ("<shared>", "<a>", "<both>", "<b>")} == {
        "<shared>": 259, "<a>": 260, "<both>": 261, "<b>": 262,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(outs[0])
    assert tokenizer("x<b><both>y", add_special_tokens=False)["input_ids"][1:3] == [262, 261]
    assert "<b>" not in tokenizer.decode([262], skip_special_tokens=True)
    assert "<a>" in tokenizer.decode([260], skip_special_tokens=True)
    found = weights(outs[0])
    one = {name: weights(tmp_path / name) for name in ("base", "a", "b", "c")}
    both = 0.5 * (one["a"][EMBED][260].astype(np.float64) + one["c"][EMBED][259])
    deltas = sum(0.5 * (row - both) for row in (one["a"][EMBED][260], one["c"][EMBED][259], both))
    np.testing.assert_allclose(found[EMBED][261], both + deltas, atol=1e-6)
    np.testing.assert_allclose(found[EMBED][262], one["b"][EMBED][259], atol=1e-6)
    assert (HEAD in found) is not tied


def test_plain_entries_of_another_vocabulary_join_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new token of the vocabulary itself, beside tokens that the donor added before: no id moves."""
    model(tmp_path / "base", 0, added=["<x>", "<y>"])
    model(tmp_path / "expert", 1, rows=260)
    data = json.loads((tmp_path / "expert" / "tokenizer.json").read_text())
    data["model"]["vocab"]["he"] = 259
    data["model"]["merges"] = [["h", "e"]]
    (tmp_path / "expert" / "tokenizer.json").write_text(json.dumps(data))
    merged(recipe(tmp_path, ["expert"], "tokenizer: {source: union}"), tmp_path / "out")
    assert_loads(tmp_path / "out", caplog)
    assert ids_of(tmp_path / "out") == {**ids_of(tmp_path / "base"), "he": 261}
    for folder in ("base", "out"):
        tokenizer = Tokenizer.from_file(str(tmp_path / folder / "tokenizer.json"))
        assert tokenizer.encode("<x>he<y>").ids[-1] == 260


def test_padding_to_a_multiple_fills_with_the_mean_of_the_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model(tmp_path / "base", 0)
    model(tmp_path / "expert", 1, added=["<new>"])
    policy = "tokenizer: {source: union, pad_to_multiple_of: 64}"
    found = merged(recipe(tmp_path, ["expert"], policy), tmp_path / "out")
    loaded = assert_loads(tmp_path / "out", caplog)
    assert loaded.config.vocab_size == 320
    for name in (EMBED, HEAD):
        np.testing.assert_allclose(found[name][260:], np.tile(found[name][:260].mean(0), (60, 1)), atol=1e-6)


RULES = """
tokenizer:
  source: base
  tokens:
    <new>: {source: expert}
    <zero>: {source: {kind: zero}}
    <like>: {source: {kind: model_token, model: expert, token: "</s>"}}
    <id>: {source: {kind: model_token, model: base, token_id: 5}}
    "<s>": {source: expert, force: true}
"""


def test_rules_for_tokens_add_and_override(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model(tmp_path / "base", 0)
    model(tmp_path / "expert", 1, added=[AddedToken("<new>", special=True), "<other>"])
    found = merged(recipe(tmp_path, ["expert"], RULES), tmp_path / "out")
    assert_loads(tmp_path / "out", caplog)
    base, expert = weights(tmp_path / "base"), weights(tmp_path / "expert")
    ids = ids_of(tmp_path / "out")
    assert [ids[token] for token in ("<new>", "<zero>", "<like>", "<id>")] == [259, 260, 261, 262]
    assert "<other>" not in ids
    for name in (EMBED, HEAD):
        np.testing.assert_array_equal(found[name][259], expert[name][259])
        assert not found[name][260].any()
        np.testing.assert_array_equal(found[name][261], expert[name][2])
        np.testing.assert_array_equal(found[name][262], base[name][5])
        np.testing.assert_array_equal(found[name][1], expert[name][1])
        np.testing.assert_allclose(found[name][2], 0.5 * (base[name][2] + expert[name][2]), atol=1e-6)
    flags = {
        entry["content"]: entry
        for entry in json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    }
    assert (flags["<new>"]["special"], flags["<zero>"]["special"]) == (True, False)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("<no>: {source: expert}", "needs token '<no>' of 'expert'"),
        ("<no>: {source: {kind: model_token, model: base, token: <no>}}", "needs token '<no>' of 'base'"),
        ("<no>: {source: {kind: model_token, model: base, token_id: 259}}", "needs row 259 of 'base'"),
    ],
)
def test_rules_that_cannot_hold_are_refused_before_anything_is_read(tmp_path: Path, rule: str, words: str) -> None:
    model(tmp_path / "base", 0)
    model(tmp_path / "expert", 1)
    path = recipe(tmp_path, ["expert"], f"tokenizer:\n  source: base\n  tokens:\n    {rule}")
    with pytest.raises(RecipeError) as caught:
        dry_run(sm.load_recipe(path), tmp_path / "out")
    assert words in caught.value.what
    assert caught.value.where.endswith(":8")


def test_bytes_depend_neither_on_threads_nor_on_pieces(tmp_path: Path) -> None:
    model(tmp_path / "base", 0, dtype=torch.bfloat16)
    model(tmp_path / "a", 1, added=["<a>", "<both>"], dtype=torch.bfloat16)
    model(tmp_path / "b", 2, added=["<both>"], dtype=torch.float16)
    path = recipe(tmp_path, ["a", "b"], "tokenizer: {source: union, pad_to_multiple_of: 7}", head="dtype: bfloat16\n")
    found = set()
    loaded = sm.load_recipe(path)
    with open_models(loaded) as models:
        plan = make_plan(loaded, models.readers, coefficients=None, scale=1.0, shard_bytes=10**9)
        for number, (jobs, chunk) in enumerate(((1, 1 << 20), (3, 1 << 20), (2, 4096), (1, 130))):
            folder = tmp_path / f"out-{number}"
            folder.mkdir()
            execute(plan, models.readers, folder, jobs=jobs, chunk_bytes=chunk)
            found.add((folder / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_dtypes_are_those_of_the_files(tmp_path: Path) -> None:
    """A mean is formed in float32, and written in the dtype that the base's file has."""
    model(tmp_path / "base", 0, dtype=torch.bfloat16)
    model(tmp_path / "a", 1, added=["<both>"], dtype=torch.bfloat16)
    model(tmp_path / "b", 2, added=["<both>"], dtype=torch.float16)
    merged(recipe(tmp_path, ["a", "b"], "tokenizer: {source: union}"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    a, b = (load_file(tmp_path / name / "model.safetensors")[EMBED][259].double() for name in "ab")
    mean = ((a + b) / 2).float()
    expected = (mean + 0.5 * (a.float() - mean) + 0.5 * (b.float() - mean)).bfloat16()
    torch.testing.assert_close(stored[EMBED][259], expected, atol=0, rtol=2**-7)


def test_slices_are_aligned_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model(tmp_path / "a", 0)
    permuted(tmp_path / "a", tmp_path / "b", 5)
    text = (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n"
        "- sources: [{model: b, layer_range: [1, 2]}]\n"
    )
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    with pytest.raises(IncompatibleModelsError, match="differ") as caught:
        sm.merge(sm.load_recipe(path), tmp_path / "out")
    path.write_text(text + pasted(caught.value)[0] + "\n")
    found = merged(path, tmp_path / "out")
    assert_loads(tmp_path / "out", caplog)
    for name, values in weights(tmp_path / "a").items():
        np.testing.assert_array_equal(found[name], values)


# ----------------------------------------------------------------------------------------------------- companions


def test_ids_of_special_tokens_follow_the_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """bos, eos and pad of the model whose tokens are kept; a special token that it lacks is null."""
    model(tmp_path / "base", 0, added=["<image>"])
    permuted_base = tmp_path / "plain"
    model(permuted_base, 1)
    permuted(permuted_base, tmp_path / "expert", 4)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "image_token_id": 259, "sep_token_id": 7}))
    (tmp_path / "base" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 7], "bos_token_id": 1, "temperature": 0.5, "do_sample": True})
    )
    (tmp_path / "expert" / "generation_config.json").unlink(missing_ok=True)
    merged(recipe(tmp_path, ["expert"], "tokenizer: {source: expert}"), tmp_path / "out")
    assert_loads(tmp_path / "out", caplog)
    ids, before = ids_of(tmp_path / "expert"), ids_of(tmp_path / "base")
    seventh = next(token for token, place in before.items() if place == 7)
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (out["bos_token_id"], out["eos_token_id"], out["pad_token_id"]) == (ids["<s>"], ids["</s>"], ids["<pad>"])
    assert out["sep_token_id"] == ids[seventh]
    assert out["image_token_id"] is None
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["bos_token_id"] == ids["<s>"]
    assert generation["eos_token_id"] == ids["</s>"]
    assert generation["temperature"] == 0.5


def template_in(folder: Path) -> str:
    return str(AutoTokenizer.from_pretrained(folder).chat_template).strip()


def test_chat_templates(tmp_path: Path) -> None:
    """The recipe's own, a built-in one, and the most frequent; written to where the donor keeps one."""
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        model(tmp_path / name, seed)
    for name in "ab":
        (tmp_path / name / "chat_template.jinja").write_text("{{ messages[0].content }}!\n")
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "{{ old }}"}))
    for lines, expected in (
        ("", "{{ old }}"),
        ("chat_template: auto", "{{ messages[0].content }}!"),
        (
            'chat_template: "{% for m in messages %}{{ m.content }}{% endfor %}"',
            "{% for m in messages %}{{ m.content }}{% endfor %}",
        ),
        ("tokenizer: {source: union}\nchat_template: auto", "{{ messages[0].content }}!"),
        ("tokenizer_source: a\nchat_template: '{{ new }}'", "{{ new }}"),
    ):
        merged(recipe(tmp_path, ["a", "b"], lines), tmp_path / "out", overwrite=True)
        assert template_in(tmp_path / "out") == expected, lines
        assert (tmp_path / "out" / "chat_template.jinja").exists() is ("source: a" in lines or "_source: a" in lines)
    merged(recipe(tmp_path, ["a", "b"], "chat_template: chatml"), tmp_path / "out", overwrite=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_id_far_beyond_all_rows_is_refused(tmp_path: Path) -> None:
    """With a rule for its row too: the merged model would be a thousand times as large, all of it padding."""
    model(tmp_path / "base", 0)
    model(tmp_path / "expert", 1)
    file = tmp_path / "base" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 1 << 30, "content": "<far>"})
    file.write_text(json.dumps(data))
    for rule in ("", ", tokens: {<far>: {source: {kind: zero}}}"):
        with pytest.raises(IncompatibleModelsError, match="'<far>' has an id far beyond"):
            dry_run(
                sm.load_recipe(recipe(tmp_path, ["expert"], f"tokenizer: {{source: base{rule}}}")), tmp_path / "out"
            )
