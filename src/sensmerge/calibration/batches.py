"""Samples side by side: which go together, how a model is called with them, and their loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..records import CalibrationSet


@dataclass(frozen=True)
class Batch:
    """Samples side by side: token ids, padded on the right, each sample's real length, and where its logits carry a loss.

    `ids` is [S, T] int64; `predicting[s]` are the positions of sample s that predict a loss token.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    predicting: tuple[Tensor, ...]

    @property
    def real(self) -> Tensor:
        """The attention mask, [S, T]: 1 for real tokens."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        return (torch.arange(self.ids.shape[1], device=self.ids.device)[None] < lengths[:, None]).long()

    def slice(self, first: int, last: int) -> Batch:
        """Samples from `first` up to `last`."""
        return Batch(self.ids[first:last], self.lengths[first:last], self.predicting[first:last])

    def loss(self, logits_STV: Tensor) -> Tensor:
        """The sum over samples of each one's mean next-token cross entropy (nats) over its loss tokens."""
        samples = torch.cat([torch.full_like(at, sample) for sample, at in enumerate(self.predicting)])
        places = torch.cat(self.predicting)
        share = torch.cat([torch.full((len(at),), 1.0 / len(at), device=at.device) for at in self.predicting])
        each = functional.cross_entropy(
            logits_STV[samples, places].float(), self.ids[samples, places + 1], reduction="none"
        )
        return (each * share).sum()


def call_arguments(model: Any, batch: Batch) -> dict[str, Any]:
    """What a model is called with beside its input: each sample has its own positions, so that no layer mixes samples."""
    known = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"attention_mask": batch.real, "use_cache": False}
    if "position_ids" in known:
        places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        arguments["position_ids"] = places[None].expand_as(batch.ids).contiguous()
    return arguments


def batch_of(samples: CalibrationSet, places: Sequence[int], device: str) -> Batch:
    """The samples at `places`, side by side."""
    longest = max(len(samples.token_ids[at]) for at in places)
    ids = torch.zeros(len(places), longest, dtype=torch.long)
    predicting = []
    for row, at in enumerate(places):
        ids[row, : len(samples.token_ids[at])] = torch.tensor(samples.token_ids[at])
        predicting.append(torch.tensor([place - 1 for place, counts in enumerate(samples.loss_mask[at]) if counts]))
    return Batch(
        ids.to(device),
        tuple(len(samples.token_ids[at]) for at in places),
        tuple(each.to(device) for each in predicting),
    )


def by_length(samples: CalibrationSet, places: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """`places`, samples of like length together, in batches of at most `tokens` padded tokens (or one sample).

    The longest come first, so that a batch that does not fit the memory is met at the beginning.
    """
    group: list[int] = []
    for at in sorted(places, key=lambda place: (-len(samples.token_ids[place]), place)):
        if group and (len(group) + 1) * len(samples.token_ids[group[0]]) > tokens:
            yield group
            group = []
        group.append(at)
    if group:
        yield group
