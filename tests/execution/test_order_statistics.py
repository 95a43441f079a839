"""Exact selection from histograms, against sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sensmerge.execution.order_statistics import Counters, Selection, count_coarse, count_fine


def select(values: Any, places: list[list[int]], counters: Counters, tile: int = 64) -> tuple[Any, list[int]]:
    """The engine's two passes over the rows of `values`, by two workers."""
    selection = Selection(len(values), counters)
    workers = (object(), object())
    pieces = [np.ascontiguousarray(values[:, at : at + tile]) for at in range(0, values.shape[1], tile)]
    for turn, piece in enumerate(pieces):
        counter = selection.counter(workers[turn % 2])
        count_coarse(piece.shape[1], piece, counter.coarse, counter.zeros)
    zeros = selection.zeros()
    selection.locate(places)
    for piece in reversed(pieces):
        counter = selection.counter(workers[0])
        count_fine(piece.shape[1], piece, selection.bins, counter.fine)
    return selection.values(), zeros


def hard(kind: str, n: int) -> Any:
    """Numbers that are hard to tell apart, or to order."""
    random = np.random.default_rng(len(kind))
    gauss = random.normal(size=(3, n)).astype(np.float32)
    return {
        "gauss": gauss,
        "ties": np.round(gauss * 4).astype(np.float32) / 4,
        "equal": np.full((3, n), 0.1, np.float32),
        "zeros": np.where(random.random((3, n)) < 0.9, 0, gauss).astype(np.float32),
        "none": np.zeros((3, n), np.float32),
        "neighbours": np.nextafter(np.float32(1), np.float32(2)) ** random.integers(0, 300, (3, n)).astype(np.float32),
        "subnormal": (gauss * 1e-41).astype(np.float32),
        "wide": np.exp(gauss * 20).astype(np.float32),
    }[kind]


@pytest.mark.parametrize("kind", ["gauss", "ties", "equal", "zeros", "none", "neighbours", "subnormal", "wide"])
@pytest.mark.parametrize("n", [1, 2, 257, 5000])
def test_every_place_is_exact(kind: str, n: int) -> None:
    values = hard(kind, n)
    wanted = sorted({0, n // 3, n // 2, n - 1})
    expected = np.sort(np.abs(values), axis=1)[:, wanted]
    counters = Counters()
    # Twice: what is counted once must be gone the next time.
    for _ in range(2):
        found, zeros = select(values, [wanted] * 3, counters)
        assert np.array_equal(found, expected)
        assert zeros == np.sum(values == 0, axis=1).tolist()


def test_past_the_end_is_infinity() -> None:
    assert select(hard("gauss", 10), [[10], [0], [9]], Counters())[0][0, 0] == np.inf
