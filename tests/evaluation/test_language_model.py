"""Log-likelihoods and greedy text, against plain transformers, one sequence at a time."""

import json
import math
import shutil

import pytest
import torch

from sensmerge.errors import InputFileError
from sensmerge.evaluation import language_model
from sensmerge.evaluation.language_model import LanguageModel

PROMPTS = [
    "Q: Where does Ada live?\nA:",
    "Q: 1\nA:",
    "Q: Write f(xs): sort the list, then return the sum. f([5, 8, 4]) = 17\nA:",
    "def f(x):\n    return",
    "Q: Where does Ada live?\nA:",
]
CONTINUATIONS = [
    " Paris",
    " 13 + 12 = 25",
    " return sum(sorted(xs))",
    " x",
    " a rather long answer, longer than its prompt",
]
PAIRS = list(zip(PROMPTS, CONTINUATIONS, strict=True))


@pytest.fixture(scope="module")
def model(random_model):
    return LanguageModel.load(random_model)


def plain_log_likelihood(model, prompt, continuation):
    """The definition, unbatched: log p(continuation | bos + prompt)."""
    tokenizer = model.tokenizer
    prompt_ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    text_ids = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model.model(input_ids=torch.tensor([prompt_ids + text_ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt_ids) + i - 1, token]) for i, token in enumerate(text_ids))


def plain_generation(model, prompt, max_new_tokens):
    """transformers' own greedy search, unbatched."""
    encoded = model.tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        produced = model.model.generate(
            encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
        )
    return model.tokenizer.decode(produced[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def test_log_likelihoods_are_those_of_plain_transformers(model):
    expected = [plain_log_likelihood(model, *pair) for pair in PAIRS]
    assert len({round(value, 3) for value in expected}) == len(PAIRS)
    assert model.log_likelihoods(PAIRS) == pytest.approx(expected, abs=1e-4)


def test_log_likelihoods_do_not_depend_on_the_batch(model):
    together = model.log_likelihoods(PAIRS)
    alone = [model.log_likelihoods([pair])[0] for pair in PAIRS]
    assert together == pytest.approx(alone, abs=1e-4)
    assert model.log_likelihoods(PAIRS[::-1]) == pytest.approx(together[::-1], abs=1e-4)


def test_small_batches_change_nothing(model, monkeypatch):
    together = model.log_likelihoods(PAIRS)
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 1)
    assert model.log_likelihoods(PAIRS) == pytest.approx(together, abs=1e-4)
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 2 * 60 * 512)
    assert model.log_likelihoods(PAIRS) == pytest.approx(together, abs=1e-4)


def test_probabilities_of_all_next_tokens_sum_to_one(model):
    vocabulary = range(model.model.config.vocab_size)
    rows = [(model.encode_prompt(PROMPTS[0]), [token]) for token in vocabulary]
    with torch.inference_mode():
        total = sum(math.exp(value) for value in model._continuation_sums(rows))
    assert total == pytest.approx(1, abs=1e-4)


def test_an_empty_continuation_has_log_likelihood_zero(model):
    assert model.log_likelihoods([(PROMPTS[0], "")]) == [0.0]
    assert model.log_likelihoods([]) == []


def test_generation_is_that_of_plain_transformers(model):
    expected = [plain_generation(model, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert model.generate(PROMPTS, 12) == expected


def test_generation_does_not_depend_on_the_batch(model):
    together = model.generate(PROMPTS, 12)
    assert together == [model.generate([prompt], 12)[0] for prompt in PROMPTS]
    assert together[::-1] == model.generate(PROMPTS[::-1], 12)


def test_generation_stops_at_the_end_token(random_model):
    model = LanguageModel.load(random_model)
    free = model.generate(PROMPTS, 12)
    tokens = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in free]
    stop = tokens[0][2]
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(stop)
    assert model.tokenizer.eos_token_id == stop
    stopped = model.generate(PROMPTS, 12)
    assert free[0].startswith(stopped[0])
    assert len(stopped[0]) < len(free[0])
    assert stopped == [model.generate([prompt], 12)[0] for prompt in PROMPTS]


def test_at_most_max_new_tokens(model):
    for count in (1, 3):
        for text in model.generate(PROMPTS, count):
            assert len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) <= count


def test_a_prompt_begins_with_bos_only_if_the_tokenizer_says_so(model, random_model, tmp_path):
    assert model.encode_prompt("x")[0] == model.tokenizer.bos_token_id
    assert model.tokenizer.bos_token_id not in model.encode_continuation("x")
    bare = shutil.copytree(random_model, tmp_path / "bare")
    tokenizer = json.loads((bare / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer))
    without = LanguageModel.load(bare)
    assert without.encode_prompt("Q: x") == without.encode_continuation("Q: x") == model.encode_continuation("Q: x")


def test_a_prompt_never_ends_with_eos(model, random_model, tmp_path):
    ending = shutil.copytree(random_model, tmp_path / "ending")
    tokenizer = json.loads((ending / "tokenizer.json").read_text())
    processor = tokenizer["post_processor"]
    processor["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (ending / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = LanguageModel.load(ending)
    assert loaded.tokenizer("Q: x")["input_ids"][-1] == 2
    assert loaded.encode_prompt("Q: x") == model.encode_prompt("Q: x")


def test_loading_names_what_is_wrong(random_model, tmp_path):
    with pytest.raises(InputFileError, match="cannot load"):
        LanguageModel.load(tmp_path / "nowhere")
    broken = shutil.copytree(random_model, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(InputFileError, match="cannot load"):
        LanguageModel.load(broken)
