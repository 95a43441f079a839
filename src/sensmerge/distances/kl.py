"""Kullback-Leibler divergence of the model's prediction from the expert's."""

from __future__ import annotations

from torch import Tensor


def kl(model_TV: Tensor, expert_TV: Tensor) -> Tensor:
    """KL(expert ‖ model) per position, float64 [T], in nats: what is lost by predicting the expert's tokens with the model."""
    expert = expert_TV.double().log_softmax(dim=-1)
    model = model_TV.double().log_softmax(dim=-1)
    return (expert.exp() * (expert - model)).sum(dim=-1).clamp(min=0.0)
