"""Small things on disk for tests: checkpoints, tokenizers, models, files. Nothing here uses `sensmerge`."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

# A pool of threads costs more than a tiny model's arithmetic, above all on a busy machine.
torch.set_num_threads(1)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL = (PAD, BOS, EOS)
VOCABULARY = len(SPECIAL) + 256

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def as_tensor(values: Tensor | NDArray[Any]) -> Tensor:
    """A contiguous torch tensor of its own from an array or a tensor (bfloat16 only from a tensor)."""
    return values.detach().clone().contiguous() if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


def write_config(folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """config.json; that of a nameless Llama if none is given."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} if config is None else dict(config)
    (folder / "config.json").write_text(json.dumps(data))


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A checkpoint folder written by the safetensors library: config.json and a file, or `shards` files."""
    write_config(folder, config)
    whole = {name: as_tensor(values) for name, values in tensors.items()}
    if shards == 1:
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: whole[name] for name in list(whole)[number::shards]}
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file by hand: `header` is text, bytes or something to dump; `length` lies about its length."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def byte_ids(text: str) -> list[int]:
    """The ids that `byte_tokenizer` gives a text, without special tokens: one for each UTF-8 byte."""
    order = {symbol: place for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    symbols = _byte_symbols()
    return [len(SPECIAL) + order[symbols[byte]] for byte in text.encode()]


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, written out from its definition."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + place) for place, byte in enumerate(others)}


def byte_tokenizer(
    *, bos: bool = True, adds_bos: bool = True, eos: bool = True, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte. `bos`/`eos`: has it such a token; `adds_bos`: puts it before a text."""
    vocabulary = {token: place for place, token in enumerate(SPECIAL)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos and adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
        )
    named = {"pad_token": PAD} | ({"bos_token": BOS} if bos else {}) | ({"eos_token": EOS} if eos else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    if chat_template is not None:
        fast.chat_template = chat_template
    return fast


def llama_config(**changes: Any) -> LlamaConfig:
    """A Llama of two layers and 16 channels over `VOCABULARY` tokens."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": SPECIAL.index(BOS),
        "eos_token_id": SPECIAL.index(EOS),
    }
    return LlamaConfig(**(values | changes))


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama in evaluation mode, float32; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2 (tied head) of two layers in evaluation mode."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def tiny_mixtral(seed: int = 0) -> MixtralForCausalLM:
    """A random Mixtral of two layers and two experts in evaluation mode."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(config).eval()
