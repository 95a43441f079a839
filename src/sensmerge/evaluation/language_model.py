"""A causal language model as tasks see it: log-likelihoods of continuations, and greedy text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.models import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS_AT_ONCE = 2**26
"""At most this many logits (256 MiB of float32) stand in memory in one batch."""

SEQUENCES_AT_ONCE = 256


class LanguageModel:
    """A model and its tokenizer on one device. Results do not depend on what else is in the batch, up to rounding."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self._vocabulary = int(model.config.get_text_config().vocab_size)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
        """The model in a local folder; nothing is downloaded and no code from the folder runs.

        Raises InputFileError if transformers cannot load it, or would have to invent a weight.
        """
        return cls(load_model(folder, device, dtype), load_tokenizer(folder))

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, begun with bos if the tokenizer itself adds it; never ended with eos."""
        bare, bos = self.encode_continuation(text), self.tokenizer.bos_token_id
        begins = bos is not None and list(self.tokenizer(text)["input_ids"])[:1] == [bos] != bare[:1]
        return [bos, *bare] if begins else bare

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    @torch.inference_mode()
    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """For each (prompt, continuation): the sum of log-probabilities (nats) of the continuation's tokens."""
        encoded = [(self.encode_prompt(prompt), self.encode_continuation(text)) for prompt, text in pairs]
        sums = [0.0] * len(pairs)
        for chosen in self._batches([len(prompt) + len(text) for prompt, text in encoded]):
            rows = [encoded[index] for index in chosen]
            for index, value in zip(chosen, self._continuation_sums(rows), strict=True):
                sums[index] = value
        return sums

    def _continuation_sums(self, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        """One right-padded batch: causal attention never looks at what stands behind, so padding changes nothing."""
        ids, mask = self._padded([[*prompt, *text] for prompt, text in rows], left=False)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        sums = []
        for row, (prompt, text) in enumerate(rows):
            predicting = logits[row, len(prompt) - 1 : len(prompt) + len(text) - 1].float().log_softmax(-1)
            targets = torch.tensor(text, device=ids.device).unsqueeze(-1)
            sums.append(float(predicting.gather(-1, targets).double().sum()))
        return sums

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, advance: Callable[[int], None] = lambda steps: None
    ) -> list[str]:
        """The greedy continuation of each prompt up to eos or `max_new_tokens` tokens, without special tokens."""
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        texts = [""] * len(prompts)
        for chosen in self._batches([len(ids) + max_new_tokens for ids in encoded]):
            produced = self._greedy([encoded[index] for index in chosen], max_new_tokens)
            for index, tokens in zip(chosen, produced, strict=True):
                texts[index] = self.tokenizer.decode(tokens, skip_special_tokens=True)
            advance(len(chosen))
        return texts

    def _greedy(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """One left-padded batch, token by token with a cache; padding is masked and takes no positions."""
        ids, mask = self._padded(prompts, left=True)
        eos = self.tokenizer.eos_token_id
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        going = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)
        produced: list[list[int]] = [[] for _ in prompts]
        cache = None
        for _ in range(max_new_tokens):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, chosen = output.past_key_values, output.logits[:, -1].argmax(-1)
            going &= chosen != eos if eos is not None else going
            for row, (token, alive) in enumerate(zip(chosen.tolist(), going.tolist(), strict=True)):
                if alive:
                    produced[row].append(token)
            if not bool(going.any()):
                break
            ids, positions = chosen.unsqueeze(-1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        return produced

    def _padded(self, rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 ids and mask [rows, longest]; padding has id 0 and mask 0."""
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[index, place] = torch.tensor(row)
            mask[index, place] = 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices in batches of similar length, within the memory limit of logits; the longest come first."""
        waiting = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        while waiting:
            longest = max(1, lengths[waiting[0]])
            count = max(1, min(SEQUENCES_AT_ONCE, LOGITS_AT_ONCE // (longest * self._vocabulary)))
            yield waiting[:count]
            waiting = waiting[count:]
