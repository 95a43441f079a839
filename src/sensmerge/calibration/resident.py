"""A model held whole in memory: one forward and one backward pass a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .activation_statistics import Observing, not_observed
from .batches import Batch, call_arguments
from .per_sample import Recorder, Sums
from .streamed import Keep
from .weights import Reached, at_head


class ResidentModel:
    """A causal language model whose weights are in memory."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def sums(
        self, recorder: Recorder, batches: Sequence[Batch], keep: Keep | None, advance: Callable[[int], None]
    ) -> list[Mapping[str, Tensor]]:
        """The per-sample sums of every batch; `keep(batch, hidden)` gets what the output head gets.

        Memory: the weights, one batch's activations, and a piece of one sample's gradient of one layer.
        """
        results: list[Mapping[str, Tensor]] = []
        for at, batch in enumerate(batches):
            sums, heard = Sums(batch), list[Tensor]()
            with recorder.recording(self.model, sums), at_head(self.model, heard.append, stop=False):
                logits = self.model(input_ids=batch.ids, **call_arguments(self.model, batch)).logits
                recorder.check_all_seen(self.model)
                batch.loss(logits).backward()
            if keep is not None:
                keep(at, heard[0])
            results.append(sums.by_name)
            advance(len(batch.lengths))
        return results

    @torch.no_grad()
    def hidden(
        self,
        batches: Sequence[Batch],
        keep: Keep,
        advance: Callable[[int], None],
        observing: Observing = not_observed,
    ) -> None:
        """Give `keep(batch, hidden)` what the output head gets for every batch, [S, T, H]; no logits are formed."""
        for at, batch in enumerate(batches):

            def take(hidden: Tensor, at: int = at) -> None:
                keep(at, hidden)

            with observing(self.model, batch), at_head(self.model, take, stop=True), suppress(Reached):
                self.model(input_ids=batch.ids, **call_arguments(self.model, batch))
            advance(len(batch.lengths))
