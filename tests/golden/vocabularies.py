"""Three tiny models of unlike vocabularies and the recipes over them, the same on every machine. Nothing here uses `sensmerge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.builders import BOS, EOS, PAD, SPECIAL, llama_config

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# The tokens beside the bytes' own, and whether those stand in the other order.
MODELS = {"base": ((), False), "a": (("<a>", "<both>"), False), "b": (("<both>", "<b>", "<like>"), True)}

_WITH_BASE = """
merge_method: task_arithmetic
allow: [unrelated]
base_model: base
models: [{model: a, parameters: {weight: 0.75}}, {model: b, parameters: {weight: 0.5}}]
dtype: float32
"""
_WITHOUT = """
merge_method: linear
models: [{model: a, parameters: {weight: 0.75}}, {model: b, parameters: {weight: 0.5}}, {model: base, parameters: {weight: 1}}]
dtype: float32
"""
RECIPES = {
    "union": _WITH_BASE + "tokenizer: {source: union}",
    "union-of-equals": _WITHOUT + "tokenizer: {source: union}",
    "older": _WITH_BASE + "tokenizer_source: union",
    "base": _WITH_BASE + "tokenizer: {source: base}",
    "model": _WITH_BASE + "tokenizer: {source: b}",
    "padded": _WITH_BASE + "tokenizer: {source: union, pad_to_multiple_of: 64}",
    "rules": _WITH_BASE
    + """
tokenizer:
  source: union
  tokens:
    <both>: {source: b}
    <new>: {source: {kind: zero}}
    <twin>: {source: {kind: model_token, model: b, token: <both>}}
    <third>: {source: {kind: model_token, model: a, token_id: 3}}
    "<s>": {source: b, force: true}
    "</s>": {source: {kind: zero}}
""",
}


def tokenizer(added: Sequence[str], backwards: bool) -> PreTrainedTokenizerFast:
    """One token a byte, in one of two orders, and the added ones behind."""
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=backwards)]
    made = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(vocabulary)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    fast.add_tokens([AddedToken(token) for token in added])
    return fast


def write(folder: Path) -> None:
    """Every model, in a folder of its own; each weight follows from its place and its model's."""
    for number, (name, (added, backwards)) in enumerate(MODELS.items()):
        fast = tokenizer(added, backwards)
        config = llama_config(
            vocab_size=len(fast), hidden_size=4, intermediate_size=4, num_hidden_layers=1, pad_token_id=0
        )
        model = LlamaForCausalLM(config)
        for part, parameter in enumerate(model.parameters()):
            places = torch.arange(parameter.numel()) * (7919 + 2 * number) + 104729 * part + 31 * number
            parameter.data = ((places % 1021 - 510) / 512).reshape(parameter.shape)
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
