"""Small architectures of our own that do what no rule knows, saved and loaded like any other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from tests.calibration.families import VOCABULARY


class SkipConfig(PretrainedConfig):
    model_type = "sensmerge_test_skip"

    def __init__(self, vocab_size: int = VOCABULARY, hidden_size: int = 8, num_hidden_layers: int = 2, **rest: Any):
        super().__init__(**rest)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers


class SkipBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, size)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        return hidden + torch.tanh(self.up(hidden + embedded))


class SkipForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """Every block gets the embedding again, beside its input."""

    config_class = SkipConfig

    def __init__(self, config: SkipConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SkipBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any) -> CausalLMOutput:
        embedded = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden, embedded)
        return CausalLMOutput(logits=self.head(hidden))


class LouderConfig(LlamaConfig):  # type: ignore[misc]
    model_type = "sensmerge_test_louder"


class LouderForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama that changes its logits as nothing in its config says."""

    config_class = LouderConfig

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        output.logits = output.logits * 3.0
        return output


for _config, _model in ((SkipConfig, SkipForCausalLM), (LouderConfig, LouderForCausalLM)):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
