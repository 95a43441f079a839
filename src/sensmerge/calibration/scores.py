"""What is summed over the elements of a parameter: the paper's |θ·g|, or |δ·g|, or g²."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .per_sample import Score


@dataclass(frozen=True)
class WeightScore:
    """Σ |θ_j g_j|: the paper's eq. 1."""

    def of(self, name: str, weight: Tensor, gradient: Tensor, first: int) -> Tensor:
        """See Score."""
        return torch.linalg.vector_norm(gradient.mul_(weight), 1)


@dataclass(frozen=True)
class FisherScore:
    """Σ g_j²: the diagonal of one sample's empirical Fisher information."""

    def of(self, name: str, weight: Tensor, gradient: Tensor, first: int) -> Tensor:
        """See Score."""
        return torch.linalg.vector_norm(gradient, 2).double().square()


@dataclass(frozen=True)
class TaskVectorScore:
    """Σ |δ_j g_j| with δ = θ - θ_0; `rows(name, first, count)` gives rows of δ, float32 [count, columns], on any device."""

    rows: Callable[[str, int, int], Tensor]

    def of(self, name: str, weight: Tensor, gradient: Tensor, first: int) -> Tensor:
        """See Score."""
        delta = self.rows(name, first, len(gradient)).to(gradient.device)
        return torch.linalg.vector_norm(gradient.mul_(delta.reshape(gradient.shape)), 1)


__all__ = ["FisherScore", "Score", "TaskVectorScore", "WeightScore"]
