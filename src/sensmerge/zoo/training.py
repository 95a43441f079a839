"""Training loops for the family: a fixed number of steps, or chunks until a target loss is reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .corpus import IGNORED, Batch

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

WARM_UP = 20
FINAL_RATE = 0.1
CLIP = 1.0
BETAS = (0.9, 0.98)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block torch computes with `count` threads; their number changes rounding, and with it what is learnt."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def new_model(layers: int, hidden: int, heads: int, feed_forward: int, vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A randomly initialised model; torch's global generator is left as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",  # at 64 positions of 16 dimensions faster than the fused kernel, which pays for its set-up
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model


def cosine(step: int, steps: int, rate: float) -> float:
    """The learning rate at `step` of `steps`: a short linear warm-up, then a half cosine down to a tenth of `rate`."""
    if step < WARM_UP:
        return rate * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """The mean next-token loss over the labelled positions; the head is computed at those positions only."""
    import torch

    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    chosen = batch.labels != IGNORED
    if not bool(chosen.all()):
        return torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), batch.labels[chosen])
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), batch.labels.flatten())


class Trainer:
    """One optimiser on one model: AdamW with clipped gradients."""

    def __init__(self, model: LlamaForCausalLM, decay: float) -> None:
        import torch

        self.model = model
        # `run` sets the learning rate before every step
        self._optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, betas=BETAS, weight_decay=decay, fused=True)

    def run(
        self, batches: Iterator[Batch], steps: int, rate: Callable[[int], float], advance: Callable[[int], None]
    ) -> list[float]:
        """Take `steps` steps, the s-th with learning rate `rate(s)`; the losses, one a step."""
        import torch

        losses = []
        self.model.train()
        for step in range(steps):
            for group in self._optimiser.param_groups:
                group["lr"] = rate(step)
            loss = batch_loss(self.model, next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self._optimiser.step()
            self._optimiser.zero_grad()
            losses.append(loss.item())
            advance(1)
        self.model.eval()
        return losses
