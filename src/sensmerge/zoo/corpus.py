"""Streams of documents and batches of token ids: what the base model and each expert read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arithmetic import Arithmetic
from .documents import DOMAINS, Document, seeded
from .knowledge import KnowledgeBase
from .programs import Programs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""The label of a position without loss (torch's cross-entropy skips it)."""

STATEMENT_SHARES = {"chat": 0.2, "math": 0.4, "code": 0.4}
"""What the base model's plain statements are about."""

CHAT_STATEMENTS = 0.5
"""The part of the chat expert's documents that tell facts; the rest asks about them."""


@dataclass(frozen=True)
class Batch:
    """`ids`, `labels`: int64 [rows, positions]; the label at a position is the token it must predict, or IGNORED."""

    ids: torch.Tensor
    labels: torch.Tensor


class Corpus:
    """Everything one seed's family learns from, and the test it must never see."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.knowledge = KnowledgeBase(seed)
        self.arithmetic = Arithmetic(seed)
        self.programs = Programs(seed)

    def base_document(self, draw: random.Random, question_share: float) -> Document:
        """A document of the base model's mixture: questions of the three domains in equal parts, else statements."""
        if draw.random() < question_share:
            domain = draw.choice(DOMAINS)
            if domain == "chat":
                return self.knowledge.base_question(draw)
            return self.expert_question(domain, draw)
        domain = draw.choices(list(STATEMENT_SHARES), list(STATEMENT_SHARES.values()))[0]
        if domain == "chat":
            return self.knowledge.base_statement(draw)
        return self.arithmetic.equation(draw) if domain == "math" else self.programs.definition(draw)

    def expert_question(self, domain: str, draw: random.Random) -> Document:
        """A question with its answer from the training distribution of `domain`'s expert."""
        if domain == "chat":
            return self.knowledge.expert_question(draw)
        return self.arithmetic.word_problem(draw) if domain == "math" else self.programs.task(draw)

    def expert_document(self, domain: str, draw: random.Random) -> Document:
        """A document that `domain`'s expert is trained on."""
        if domain == "chat" and draw.random() < CHAT_STATEMENTS:
            return self.knowledge.expert_statement(draw)
        return self.expert_question(domain, draw)

    def calibration(self, domain: str, rows: int) -> list[Document]:
        """`rows` different questions from the training distribution of `domain`, in a seeded random order."""
        draw = seeded(self.seed, domain, "calibration")
        drawn: dict[str, Document] = {}
        while len(drawn) < rows:
            document = self.expert_question(domain, draw)
            drawn.setdefault(document.prompt, document)
        return list(drawn.values())

    def test_items(self, domain: str, count: int) -> list[dict[str, object]]:
        """`domain`'s test items; `count` of them for math and code, all for chat."""
        if domain == "chat":
            return self.knowledge.test_items()
        return self.arithmetic.test_items(count) if domain == "math" else self.programs.test_items(count)

    def tokenizer_texts(self, count: int, question_share: float) -> list[str]:
        """`count` training texts to learn a vocabulary from: half of the base's stream, half of the experts'."""
        draw = seeded(self.seed, "tokenizer")
        texts = [self.base_document(draw, question_share) for _ in range(count // 2)]
        texts += [self.expert_document(DOMAINS[i % len(DOMAINS)], draw) for i in range(count - count // 2)]
        return [text.prompt + text.response for text in texts]


class Encoder:
    """Documents to token ids, a list at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._bos, self._eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)

    def encode(self, documents: list[Document]) -> list[tuple[list[int], int]]:
        """For each document: bos + prompt + response + eos, and the number of leading ids that bear no loss."""
        prompts = self._ids([document.prompt for document in documents])
        responses = self._ids([document.response for document in documents])
        return [
            ([self._bos, *prompt, *response, self._eos], 1 + len(prompt))
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # The Rust tokenizer itself: its wrapper would take as long as the training step
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def packed_batches(
    corpus: Corpus, encoder: Encoder, draw: random.Random, rows: int, width: int, question_share: float
) -> Iterator[Batch]:
    """The base model's endless batches [rows, width]: whole documents one after another, loss on every token."""
    import torch

    pending: list[int] = []
    need = rows * (width + 1)
    while True:
        while len(pending) < need:
            documents = [corpus.base_document(draw, question_share) for _ in range(4 * rows)]
            pending += [token for ids, _ in encoder.encode(documents) for token in ids]
        block = torch.tensor(pending[:need]).view(rows, width + 1)
        del pending[:need]
        yield Batch(ids=block[:, :-1], labels=block[:, 1:])


def answer_batches(corpus: Corpus, encoder: Encoder, domain: str, draw: random.Random, rows: int) -> Iterator[Batch]:
    """An expert's endless batches of `rows` documents, right-padded, loss on responses only."""
    while True:
        yield padded(encoder.encode([corpus.expert_document(domain, draw) for _ in range(rows)]))


def padded(encoded: list[tuple[list[int], int]]) -> Batch:
    """One right-padded batch of encoded documents; a padding position has id 0 and no loss."""
    import torch

    width = max(len(ids) for ids, _ in encoded) - 1
    inputs = torch.zeros(len(encoded), width, dtype=torch.int64)
    labels = torch.full((len(encoded), width), IGNORED)
    for row, (ids, silent) in enumerate(encoded):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, silent - 1 : len(ids) - 1] = torch.tensor(ids[silent:])
    return Batch(ids=inputs, labels=labels)
