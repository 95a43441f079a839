"""What is summed over the elements of a parameter: the paper's |θ·g|, or |δ·g|, or g².

Gradients are overwritten: they are dropped afterwards. Sums in pairs keep the rounding of float32 small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .per_sample import Score


@dataclass(frozen=True)
class WeightScore:
    """Σ |θ_j g_j|: the paper's eq. 1."""

    def of(self, name: str, weight: Tensor, gradient: Tensor, first: int) -> Tensor:
        """See Score."""
        return gradient.mul_(weight).abs_().sum()


@dataclass(frozen=True)
class FisherScore:
    """Σ g_j²: the diagonal of one sample's empirical Fisher information."""

    def of(self, name: str, weight: Tensor, gradient: Tensor, first: int) -> Tensor:
        """See Score."""
        return gradient.square_().sum()


@dataclass(frozen=True)
class TaskVectorScore:
    """Σ |δ_j g_j| with δ = θ - θ_0; `rows(name, first, count)` gives rows of δ, float32 [count, columns], on any device."""

    rows: Callable[[str, int, int], Tensor]

    def of(self, name: str, weight: Tensor, gradient: Tensor, first: int) -> Tensor:
        """See Score."""
        delta = self.rows(name, first, len(gradient)).to(gradient.device)
        return gradient.mul_(delta.reshape(gradient.shape)).abs_().sum()


__all__ = ["FisherScore", "Score", "TaskVectorScore", "WeightScore"]
