"""The two sizes of the family, as recipes: everything that decides what is trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ..registry import unknown_name

VERSION = 4
"""Raised whenever data or training change what a family is: caches of older versions are then left alone."""


@dataclass(frozen=True)
class Stage:
    """One fine-tuning: `steps` of `rows` documents, learning rate `rate` at its peak."""

    steps: int
    rate: float
    rows: int = 48


@dataclass(frozen=True)
class Size:
    """The recipe of a family.

    The base takes `base_steps`, then, where `target` is given, chunks of `chunk_steps` until its loss on math answers is at
    most `target` (arithmetic comes in a phase transition, at a different step for every seed), at most `most_chunks`.
    """

    name: str
    layers: int
    base_steps: int
    base_rate: float
    question_share: float
    experts: dict[str, Stage]
    test_items: int
    target: float | None = None
    most_chunks: int = 0
    chunk_steps: int = 30
    chunk_rate: float = 2e-3
    chunk_question_share: float = 0.35
    base_decay: float = 0.1
    expert_decay: float = 0.01
    base_rows: int = 32
    base_width: int = 64
    hidden: int = 64
    heads: int = 4
    feed_forward: int = 192
    calibration_rows: int = 128
    vocabulary: int = 384
    threads: int = 1

    def fingerprint(self) -> str:
        """Twelve hex digits of a hash of the recipe and of VERSION."""
        text = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


SIZES: dict[str, Size] = {
    "small": Size(
        name="small",
        layers=4,
        base_steps=420,
        base_rate=4e-3,
        question_share=0.35,
        experts={"chat": Stage(180, 1.2e-3), "math": Stage(220, 1e-3), "code": Stage(80, 1e-3)},
        test_items=100,
    ),
    "standard": Size(
        name="standard",
        layers=6,
        base_steps=700,
        base_rate=4e-3,
        question_share=0.35,
        experts={"chat": Stage(400, 1.2e-3), "math": Stage(160, 8e-4), "code": Stage(200, 8e-4)},
        test_items=160,
        target=0.21,
        most_chunks=20,
    ),
}


def size_named(name: str) -> Size:
    """The size called `name` (raises RecipeError with the nearest name)."""
    if name not in SIZES:
        raise unknown_name("size of the family", name, SIZES, where="the zoo")
    return SIZES[name]
