"""Kullback-Leibler divergence of the model's prediction from the expert's."""

from __future__ import annotations

from torch import Tensor

from .distance import Distance


def _terms(model: Tensor, expert: Tensor) -> tuple[Tensor, ...]:
    return ((expert.exp() * (expert - model)).sum(dim=-1),)


kl = Distance(
    "KL(expert ‖ model), in nats: what is lost by predicting the expert's tokens with the model",
    _terms,
    lambda divergence: divergence.clamp(min=0.0),
    probabilities=True,
)
