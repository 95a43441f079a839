"""Jensen-Shannon divergence: symmetric and at most ln 2 (Lin, 1991)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def js(model_TV: Tensor, expert_TV: Tensor) -> Tensor:
    """JS(model, expert) per position, float64 [T], in nats."""
    model = model_TV.double().log_softmax(dim=-1)
    expert = expert_TV.double().log_softmax(dim=-1)
    middle = torch.logaddexp(model, expert) - math.log(2.0)
    both = model.exp() * (model - middle) + expert.exp() * (expert - middle)
    return 0.5 * both.sum(dim=-1).clamp(min=0.0)
