"""Distances between experts, eq. 4: on task j's samples, how far model i's logits stand from those of expert j."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .. import progress
from ..distances import Distance
from ..records import CalibrationSet
from .models import non_finite, out_of_memory_told

# Distances are computed in float64 on this many logits at a time (64 MB).
LOGITS_AT_ONCE = 1 << 23


def compared_positions(mask: Sequence[int], positions: str) -> list[int]:
    """The positions of a sample at which logits are compared.

    `all`: every token; `loss`: those that predict a loss token; `last`: the one that predicts the first loss token, which is
    the end of the prompt (the first token of a sample without one).
    """
    if positions == "all":
        return list(range(len(mask)))
    predicting = [position - 1 for position, counts in enumerate(mask) if counts]
    return predicting if positions == "loss" else predicting[:1]


def _mean_distance(model_TV: Tensor, expert_TV: Tensor, distance: Distance) -> float:
    rows = max(1, LOGITS_AT_ONCE // model_TV.shape[-1])
    parts = zip(model_TV.split(rows), expert_TV.split(rows), strict=True)
    return math.fsum(value for model, expert in parts for value in distance(model, expert).tolist()) / len(model_TV)


def _logits(model: Any, ids: Sequence[int], positions: Sequence[int], place: str) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad(), out_of_memory_told(place):
        logits_TV = model(input_ids=torch.tensor(ids, device=device)[None]).logits[0][list(positions)]
    if not torch.isfinite(logits_TV).all():
        raise non_finite(model, place, "a logit")
    return logits_TV


def pairwise_distances(
    load: Callable[[int], Any],
    names: Sequence[str],
    tasks: Sequence[CalibrationSet],
    distance: Distance,
    positions: str,
) -> list[list[list[float]]]:
    """`per_sample[i][j][k]`: the mean over positions of the distance of model i from expert j on sample k of task j.

    `load(i)` gives model i; at most two models are held at once. The diagonal is zero. Cost: for each of the K(K-1)/2 pairs, two
    forward passes over both tasks' samples.
    """
    experts = len(names)
    result = [[[0.0] * len(tasks[j].rows) for j in range(experts)] for _ in range(experts)]
    total = sum(len(tasks[a].rows) + len(tasks[b].rows) for a, b in combinations(range(experts), 2))
    held: dict[int, Any] = {}
    with progress.task("distances between experts", total) as advance:
        for first, second in combinations(range(experts), 2):
            for other in [index for index in held if index not in (first, second)]:
                del held[other]
            for index in (first, second):
                if index not in held:
                    held[index] = load(index)
            for task, other in ((first, second), (second, first)):
                samples = tasks[task]
                for k, (ids, mask) in enumerate(zip(samples.token_ids, samples.loss_mask, strict=True)):
                    at = compared_positions(mask, positions)
                    place = f"{{}}, sample {samples.rows[k]} of task {names[task]}"
                    expert_TV = _logits(held[task], ids, at, place.format(names[task]))
                    model_TV = _logits(held[other], ids, at, place.format(names[other]))
                    result[other][task][k] = _mean_distance(model_TV, expert_TV, distance)
                    advance(1)
    return result
