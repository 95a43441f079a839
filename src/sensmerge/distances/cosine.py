"""Cosine distance: blind to the length of the logit vector."""

from __future__ import annotations

import torch
from torch import Tensor

from .distance import Distance


def _terms(model: Tensor, expert: Tensor) -> tuple[Tensor, ...]:
    return (model * expert).sum(dim=-1), model.square().sum(dim=-1), expert.square().sum(dim=-1)


def _finish(product: Tensor, model: Tensor, expert: Tensor) -> Tensor:
    # A model is at no distance from itself: √(a·a) is exactly a, √a·√a need not be.
    norms = torch.sqrt(model * expert)
    return (1.0 - product / norms.clamp(min=1e-300)).clamp(min=0.0)


cosine = Distance("1 - cos(model, expert), between 0 and 2", _terms, _finish)
