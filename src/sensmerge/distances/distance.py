"""What a distance between logits is: sums over the vocabulary, and a number made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """A distance between the logits of a model and of the task's own expert, at each of T positions.

    `terms(model, expert)` takes float64 [T, v], any slice of the vocabulary, and gives sums over it, each float64 [T]; the sums of
    all slices go to `finish`, which gives float64 [T]. So logits of a whole vocabulary need never exist. Where `probabilities`
    is set the slices are of log-probabilities instead of logits. `summary` says what is measured, and in what unit.
    """

    summary: str
    terms: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    finish: Callable[..., Tensor]
    probabilities: bool = False

    def __call__(self, model_TV: Tensor, expert_TV: Tensor) -> Tensor:
        """The distance from logits over the whole vocabulary, [T, V] of any float dtype: float64 [T]."""
        model, expert = model_TV.double(), expert_TV.double()
        if self.probabilities:
            model, expert = model.log_softmax(dim=-1), expert.log_softmax(dim=-1)
        return self.finish(*self.terms(model, expert))
