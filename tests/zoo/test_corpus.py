"""Streams and batches: reproducible, with the loss where it belongs."""

import itertools
import random

import pytest
import torch

from sensmerge.zoo.corpus import IGNORED, Corpus, Encoder, answer_batches, packed_batches, padded
from sensmerge.zoo.documents import DOMAINS, Document, question, seeded, statement
from sensmerge.zoo.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def corpus():
    return Corpus(0)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus.tokenizer_texts(1500, 0.35), 384)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer)


def test_the_one_prompt_format():
    assert question("Why?", "so") == Document(prompt="Q: Why?\nA:", response=" so")
    assert statement("It is.") == Document(prompt="", response="It is.")


def test_a_purpose_has_a_generator_of_its_own():
    random.seed(1)
    first = seeded(0, "a").random()
    random.seed(2)
    assert seeded(0, "a").random() == first
    assert len({seeded(seed, purpose).random() for seed in (0, 1) for purpose in ("a", "b")}) == 4
    assert first == 0.9327985644569078  # the same in every process and on every machine


@pytest.mark.parametrize("domain", DOMAINS)
def test_calibration_rows_are_different_reproducible_and_untested(corpus, domain):
    rows = corpus.calibration(domain, 128)
    prompts = {row.prompt for row in rows}
    assert len(prompts) == 128
    assert rows == Corpus(0).calibration(domain, 128)
    assert rows != Corpus(1).calibration(domain, 128)
    assert not prompts & {item["prompt"] for item in corpus.test_items(domain, 160)}


def test_the_tokenizer_is_reproducible_and_loses_nothing(corpus, tokenizer):
    again = train_tokenizer(corpus.tokenizer_texts(1500, 0.35), 384)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 384
    draw = seeded(5, "test of round trips")
    for domain in DOMAINS:
        for text in (corpus.expert_document(domain, draw) for _ in range(200)):
            ids = tokenizer(text.prompt + text.response)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text.prompt + text.response


def test_the_tokenizer_adds_bos_but_no_eos_and_splits_digits(tokenizer):
    assert tokenizer("a 137")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in tokenizer("a 137")["input_ids"]
    number = tokenizer(" 137", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in number] == [" ", "1", "3", "7"]


def test_a_prompt_and_its_response_are_encoded_as_their_whole(corpus, tokenizer, encoder):
    """The border between prompt and response is never inside a token, so calibration and training see the same ids."""
    draw = seeded(6, "test of borders")
    documents = [corpus.expert_document(domain, draw) for domain in DOMAINS for _ in range(200)]
    for text, (ids, silent) in zip(documents, encoder.encode(documents), strict=True):
        assert ids == [*tokenizer(text.prompt + text.response)["input_ids"], tokenizer.eos_token_id]
        assert silent == 1 + len(tokenizer(text.prompt, add_special_tokens=False)["input_ids"])


def test_padded_rows_bear_loss_on_the_response_and_its_end_only():
    batch = padded([([1, 10, 11, 12, 2], 3), ([1, 20, 2], 1)])
    assert batch.ids.tolist() == [[1, 10, 11, 12], [1, 20, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 12, 2], [20, 2, IGNORED, IGNORED]]


def test_packed_rows_are_whole_documents_one_after_another(corpus, encoder, tokenizer):
    batches = list(itertools.islice(packed_batches(corpus, encoder, seeded(0, "p"), 4, 32, 0.35), 3))
    again = list(itertools.islice(packed_batches(Corpus(0), encoder, seeded(0, "p"), 4, 32, 0.35), 3))
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.ids[:, 1:], one.labels[:, :-1])
        assert one.ids.shape == one.labels.shape == (4, 32)
    assert int(batches[0].ids[0, 0]) == tokenizer.bos_token_id


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_experts_batches(corpus, encoder, tokenizer, domain):
    batches = list(itertools.islice(answer_batches(corpus, encoder, domain, seeded(0, "a"), 16), 10))
    for batch in batches:
        assert batch.ids.shape[0] == 16
        ends = batch.labels == tokenizer.eos_token_id
        assert ends.sum(1).tolist() == [1] * 16


def test_the_base_reads_all_domains_and_nothing_of_the_experts_people(corpus):
    draw = seeded(0, "test of the mixture")
    documents = [corpus.base_document(draw, 0.35) for _ in range(4000)]
    asked = [text for text in documents if text.prompt]
    assert 0.3 < len(asked) / len(documents) < 0.4
    strangers = {fact.person for fact in corpus.knowledge.expert_facts}
    chat = {text.response for fact in corpus.knowledge.expert_facts for text in fact.statements()}
    assert strangers
    assert not chat & {text.response for text in documents}
