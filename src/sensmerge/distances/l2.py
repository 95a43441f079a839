"""The paper's distance, eq. 4: the Euclidean norm of the difference of the logits."""

from __future__ import annotations

from torch import Tensor

from .distance import Distance


def _terms(model: Tensor, expert: Tensor) -> tuple[Tensor, ...]:
    return ((model - expert).square().sum(dim=-1),)


l2 = Distance("‖model - expert‖₂, in logits", _terms, lambda squares: squares.sqrt())
