"""The paper's distance, eq. 4: the Euclidean norm of the difference of the logits."""

from __future__ import annotations

from torch import Tensor


def l2(model_TV: Tensor, expert_TV: Tensor) -> Tensor:
    """‖model - expert‖₂ per position, float64 [T], in logits."""
    return (model_TV.double() - expert_TV.double()).norm(dim=-1)
