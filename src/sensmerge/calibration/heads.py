"""From a model's last hidden states to its logits, some tokens of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import IncompatibleModelsError

# Logits formed this way differ from the model's own by rounding in its dtype alone.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Head:
    """The output head of a model: logits = squeeze(scale · (hidden · Wᵀ + b)).

    `rows(first, last)` reads W[first:last], [v, H]; `vocabulary` is the number of its rows. `scale` and the soft cap are what the
    family does to its logits (Granite, Cohere; Gemma 2).
    """

    vocabulary: int
    rows: Callable[[int, int], Tensor]
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden_TH: Tensor, first: int, last: int) -> Tensor:
        """The logits of tokens `first` to `last` (not included), float32 [T, v]."""
        logits = hidden_TH.float() @ self.rows(first, last).float().t()
        if self.bias is not None:
            logits = logits + self.bias[first:last].float()
        logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def logit_changes(config: Mapping[str, Any]) -> dict[str, float | None]:
    """`scale` and `soft_cap` of a Head, as config.json names them."""
    text = config.get("text_config")
    known = {**config, **(text if isinstance(text, Mapping) else {})}
    scale = 1.0
    if known.get("logits_scaling"):
        scale /= float(known["logits_scaling"])
    if known.get("logit_scale") and known.get("model_type") in ("cohere", "cohere2"):
        scale *= float(known["logit_scale"])
    cap = known.get("final_logit_softcapping")
    return {"scale": scale, "soft_cap": None if not cap else float(cap)}


def check_head(head: Head, hidden_TH: Tensor, logits_TV: Tensor, *, label: str) -> None:
    """The head gives the model's own logits; raises IncompatibleModelsError for a family that changes them in another way."""
    ours, theirs = head.logits(hidden_TH, 0, head.vocabulary), logits_TV.float()[:, : head.vocabulary]
    size = theirs.abs().amax().clamp(min=1e-6)
    if not (ours - theirs).abs().amax() <= TOLERANCE * size:
        raise IncompatibleModelsError(
            f"the logits of '{label}' are not what its output head gives",
            where=f"model '{label}'",
            why="this family changes its logits in a way that distances between experts (eq. 4) do not know",
            fix="use a rule that needs no distances: `sens: {rule: alpha_only}`",
        )
