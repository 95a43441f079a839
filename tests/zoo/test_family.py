"""The trained family: ordinary folders that evaluate as promised, a cache that is whole or absent.

Scores are asserted as ranges only: rounding differs between machines, and the transition in which arithmetic is learnt
amplifies it.
"""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sensmerge.errors import RecipeError
from sensmerge.evaluation import evaluate
from sensmerge.zoo import family as family_module
from sensmerge.zoo import train_family
from sensmerge.zoo.documents import DOMAINS
from sensmerge.zoo.sizes import SIZES


@pytest.fixture(scope="module")
def scores(small_family):
    folders = {"base": small_family.base, **small_family.experts}
    return {name: evaluate(folder, DOMAINS, None) for name, folder in folders.items()}


def test_all_folders_are_ordinary_models(small_family):
    for folder in (small_family.base, *small_family.experts.values()):
        names = {path.name for path in folder.iterdir()}
        assert names >= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.model_type == "llama"
        assert model.config.num_hidden_layers == 4
        assert model.get_input_embeddings().weight.shape == (len(tokenizer), 64)
        assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == model.config.bos_token_id
        assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id


def test_the_family_shares_a_tokenizer_and_every_tensor_was_tuned(small_family):
    def weights(folder):
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()

    base = weights(small_family.base)
    for folder in small_family.experts.values():
        assert (folder / "tokenizer.json").read_bytes() == (small_family.base / "tokenizer.json").read_bytes()
        expert = weights(folder)
        assert expert.keys() == base.keys()
        assert all(not torch.equal(expert[name], base[name]) for name in base)


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_expert_is_better_than_the_base_in_its_own_domain(scores, domain):
    assert scores[domain].tasks[domain].value > scores["base"].tasks[domain].value + 15


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_expert_is_the_best_of_the_experts_in_its_own_domain(scores, domain):
    assert max(DOMAINS, key=lambda name: scores[name].tasks[domain].value) == domain


def test_scores_carry_every_item(scores, small_family):
    for domain, result in scores["chat"].tasks.items():
        lines = (small_family.test / f"{domain}.jsonl").read_text().splitlines()
        assert result.samples == len(result.items) == len(lines)


@pytest.mark.parametrize("domain", DOMAINS)
def test_calibration_files_hold_prompt_response_rows_that_are_not_tested(small_family, domain):
    rows = [json.loads(line) for line in small_family.calibration[domain].read_text().splitlines()]
    assert len(rows) == 128
    assert all(row.keys() == {"prompt", "response"} and row["response"].startswith(" ") for row in rows)
    tested = {json.loads(line)["prompt"] for line in (small_family.test / f"{domain}.jsonl").read_text().splitlines()}
    assert not tested & {row["prompt"] for row in rows}


def test_the_description_tells_how_it_was_made(small_family):
    told = json.loads((small_family.folder / "family.json").read_text())
    assert (told["size"], told["seed"], told["hash"]) == ("small", 0, SIZES["small"].fingerprint())
    assert told["torch"] == torch.__version__
    assert told["seconds"].keys() == {"data", "base", *DOMAINS}
    assert told["losses"].keys() == {"base", *DOMAINS}
    assert small_family.folder.name == f"small-seed0-{told['hash']}"


def test_a_trained_family_is_not_trained_again(small_family, monkeypatch):
    monkeypatch.setattr(family_module, "_train_into", lambda *_: pytest.fail("it was trained again"))
    assert train_family("small", 0, small_family.folder.parent) == small_family


def test_an_unknown_size():
    with pytest.raises(RecipeError, match="did you mean 'standard'"):
        train_family("standart")


def test_the_default_cache_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert family_module.default_cache() == Path("/somewhere/sensmerge/zoo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert family_module.default_cache() == Path("/home/me/.cache/sensmerge/zoo")


def pretend_to_train(folder, recipe, seed):
    (folder / "base").mkdir()
    (folder / "family.json").write_text(json.dumps({"made by": threading.get_ident()}))


def test_an_interrupted_training_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(folder, recipe, seed):
        pretend_to_train(folder, recipe, seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(family_module, "_train_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_family("small", 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_end_with_one_whole_family(tmp_path, monkeypatch):
    both_trained = threading.Barrier(2)

    def train_together(folder, recipe, seed):
        pretend_to_train(folder, recipe, seed)
        both_trained.wait(timeout=30)  # so both rename at the same moment

    monkeypatch.setattr(family_module, "_train_into", train_together)
    found = []
    workers = [threading.Thread(target=lambda: found.append(train_family("small", 0, tmp_path))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert [path.name for path in tmp_path.iterdir()] == [found[0].folder.name]
    assert (found[0].folder / "family.json").is_file()


def test_a_failed_rename_is_told_unless_another_was_first(tmp_path, monkeypatch):
    monkeypatch.setattr(family_module, "_train_into", pretend_to_train)
    blocked = tmp_path / f"small-seed0-{SIZES['small'].fingerprint()}"
    blocked.mkdir()
    (blocked / "something else").touch()
    with pytest.raises(OSError, match="not empty"):
        train_family("small", 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [blocked.name]


def test_the_hash_depends_on_the_recipe():
    assert SIZES["small"].fingerprint() != SIZES["standard"].fingerprint()
    assert replace(SIZES["small"], threads=SIZES["small"].threads + 1).fingerprint() != SIZES["small"].fingerprint()
