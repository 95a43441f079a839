"""What every domain of the zoo is made of: a text the models read, split into a prompt and the part they must produce."""

from __future__ import annotations

import random
from dataclasses import dataclass

DOMAINS = ("chat", "math", "code")


@dataclass(frozen=True)
class Document:
    """One training text. The loss of fine-tuning covers `response` and the end token; a plain statement has no prompt."""

    prompt: str
    response: str


def question(text: str, answer: str) -> Document:
    """A question in the family's one prompt format; the response starts with the space that follows `A:`."""
    return Document(prompt=f"Q: {text}\nA:", response=f" {answer}")


def statement(text: str) -> Document:
    """A text that is learnt as a whole."""
    return Document(prompt="", response=text)


def seeded(seed: int, *purpose: str) -> random.Random:
    """A generator of its own for one purpose: the same in every process, independent of all other purposes and of global state."""
    return random.Random("/".join([str(seed), *purpose]))
