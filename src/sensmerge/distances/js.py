"""Jensen-Shannon divergence: symmetric and at most ln 2 (Lin, 1991)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .distance import Distance


def _terms(model: Tensor, expert: Tensor) -> tuple[Tensor, ...]:
    middle = torch.logaddexp(model, expert) - math.log(2.0)
    both = model.exp() * (model - middle) + expert.exp() * (expert - middle)
    return (both.sum(dim=-1),)


js = Distance("JS(model, expert), in nats", _terms, lambda both: 0.5 * both.clamp(min=0.0), probabilities=True)
