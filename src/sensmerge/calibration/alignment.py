"""Distances between experts, eq. 4: on task j's samples, how far model i's logits stand from those of expert j.

Each model runs once over the samples; what is kept of a position is its last hidden state. Logits are formed from hidden states and
output heads, some tokens of the vocabulary at a time, and reduced to sums at once: scratch grows with tokens times hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..distances import Distance
from .heads import Head

# Logits of one model that exist at once, in bytes of float64.
SLICE_BYTES = 32 << 20


def compared_positions(mask: Sequence[int], positions: str) -> list[int]:
    """The positions of a sample at which logits are compared.

    `all`: every token; `loss`: those that predict a loss token; `last`: the one that predicts the first loss token, which is
    the end of the prompt (the first token of a sample without one).
    """
    if positions == "all":
        return list(range(len(mask)))
    predicting = [position - 1 for position, counts in enumerate(mask) if counts]
    return predicting if positions == "loss" else predicting[:1]


@torch.no_grad()
def mean_distances(
    model_TH: Sequence[Tensor], model: Head, expert_TH: Sequence[Tensor], expert: Head, distance: Distance
) -> list[float]:
    """For each sample the mean over its positions of the distance between two models' logits, from their hidden states.

    `model_TH[k]` and `expert_TH[k]` are [positions, hidden] of sample k. Where one model has more vocabulary rows, those that
    both have are compared. Cost: twice the output heads' products where the distance is one of probabilities; memory: SLICE_BYTES.
    """
    lengths = [len(each) for each in model_TH]
    ours, theirs = torch.cat(list(model_TH)), torch.cat(list(expert_TH))
    vocabulary = min(model.vocabulary, expert.vocabulary)
    step = max(1, SLICE_BYTES // (8 * len(ours)))
    slices = [(first, min(first + step, vocabulary)) for first in range(0, vocabulary, step)]
    normalisers: tuple[Tensor, Tensor] | None = None
    if distance.probabilities:
        normalisers = _normaliser(model, ours, slices), _normaliser(expert, theirs, slices)
    terms: tuple[Tensor, ...] = ()
    for first, last in slices:
        one, other = model.logits(ours, first, last).double(), expert.logits(theirs, first, last).double()
        if normalisers is not None:
            one, other = one - normalisers[0][:, None], other - normalisers[1][:, None]
        found = distance.terms(one, other)
        terms = found if not terms else tuple(a + b for a, b in zip(terms, found, strict=True))
    each = distance.finish(*terms)
    return [math.fsum(part.tolist()) / len(part) for part in each.split(lengths)]


def _normaliser(head: Head, hidden: Tensor, slices: Sequence[tuple[int, int]]) -> Tensor:
    """log Σ exp of the logits of every position, float64."""
    parts = [head.logits(hidden, first, last).double().logsumexp(dim=-1) for first, last in slices]
    return torch.stack(parts).logsumexp(dim=0)
