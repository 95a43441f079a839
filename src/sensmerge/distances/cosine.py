"""Cosine distance: blind to the length of the logit vector."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


def cosine(model_TV: Tensor, expert_TV: Tensor) -> Tensor:
    """1 - cos(model, expert) per position, float64 [T], between 0 and 2."""
    return (1.0 - cosine_similarity(model_TV.double(), expert_TV.double(), dim=-1)).clamp(min=0.0)
