"""Gram matrices in float64, of a whole tensor, of each row or of each column: what all spherical methods reduce to.

`out[group, i * M + j]` is the inner product of vectors i and j for i <= j (the rest is never read). The M vectors are the rows of
x, with the base before them where `groups[0, 0]` is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..kernel import kernel
from ..method import Numbers


@kernel
def gram(n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, keys: Any, out: Any) -> None:
    """Adds a tile to out[0]."""
    lead = 1 if groups[0, 0] != 0.0 else 0
    vectors = x.shape[0] + lead
    lanes = np.empty(512, np.float64)
    for i in range(vectors):
        for j in range(i, vectors):
            for lane in range(512):
                lanes[lane] = 0.0
            for start in range(0, n, 512):
                stop = min(start + 512, n)
                a = base[start:stop] if i < lead else x[i - lead, start:stop]
                b = base[start:stop] if j < lead else x[j - lead, start:stop]
                for lane in range(stop - start):
                    lanes[lane] += np.float64(a[lane]) * np.float64(b[lane])
            out[0, i * vectors + j] += lanes.sum()


@kernel
def gram_of_rows(
    n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, keys: Any, out: Any
) -> None:
    """Sets out[r] for the whole rows r that lie in a tile; of x only."""
    vectors = x.shape[0]
    for line in range(n // columns):
        at = line * columns
        for i in range(vectors):
            for j in range(i, vectors):
                total = 0.0
                for e in range(at, at + columns):
                    total += np.float64(x[i, e]) * np.float64(x[j, e])
                out[first // columns + line, i * vectors + j] = total


@kernel
def gram_of_columns(
    n: int, first: int, columns: int, base: Any, x: Any, experts: Any, groups: Any, keys: Any, out: Any
) -> None:
    """Adds a tile to out[c] for the columns c; of x only."""
    vectors = x.shape[0]
    for i in range(vectors):
        for j in range(i, vectors):
            for e in range(n):
                out[(first + e) % columns, i * vectors + j] += np.float64(x[i, e]) * np.float64(x[j, e])


def symmetric(sums: Numbers, vectors: int) -> Numbers:
    """The Gram matrices float64 [groups, M, M] from the sums of a pass [groups, M·M]."""
    upper = sums.reshape(-1, vectors, vectors)
    return np.triu(upper) + np.triu(upper, 1).transpose(0, 2, 1)


def include_base(results: Sequence[Any], yes: bool) -> Numbers:
    """`groups` for the pass that makes a Gram matrix."""
    return np.array([[1.0 if yes else 0.0]])
