"""Random Llamas of given shapes on disk, bfloat16, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; `layers` may be fewer than a real model has."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32000

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape."""
        narrow = self.hidden // self.heads * self.key_value_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "lm_head.weight", (self.vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for name, rows, columns in (
                ("self_attn.q_proj", self.hidden, self.hidden),
                ("self_attn.k_proj", narrow, self.hidden),
                ("self_attn.v_proj", narrow, self.hidden),
                ("self_attn.o_proj", self.hidden, self.hidden),
                ("mlp.gate_proj", self.inner, self.hidden),
                ("mlp.up_proj", self.inner, self.hidden),
                ("mlp.down_proj", self.hidden, self.inner),
            ):
                yield f"{prefix}{name}.weight", (rows, columns)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}{name}.weight", (self.hidden,)

    @property
    def parameters(self) -> int:
        """How many numbers they are."""
        return sum(int(torch.Size(shape).numel()) for _, shape in self.weights())


# TinyLlama's shape, 1.1 B parameters; Llama 2's, 7 B; and a small one to compare speeds with.
BILLION = Shape(hidden=2048, inner=5632, layers=22, heads=32, key_value_heads=4)
SEVEN = Shape(hidden=4096, inner=11008, layers=32, heads=32, key_value_heads=32)
SMALL = Shape(hidden=768, inner=2048, layers=12, heads=12, key_value_heads=12)
TINY = Shape(hidden=128, inner=352, layers=4, heads=4, key_value_heads=2, vocabulary=2048)


def build(work: Path, shape: Shape, dtype: str = "bfloat16") -> Path:
    """The folder of a random model of this shape, one shard a block; made once."""
    folder = work / f"llama-{shape.hidden}x{shape.layers}-{shape.vocabulary}-{dtype}"
    done = folder / "model.safetensors.index.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    weight_map: dict[str, str] = {}

    def write() -> None:
        for file, tensors in files.items():
            save_file(tensors, folder / file, metadata={"format": "pt"})
        files.clear()

    for name, size in shape.weights():
        part = name.split(".")[2] if ".layers." in name else "outside"
        file = f"model-{part}.safetensors"
        if file not in files:
            write()
        values = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.02
        files.setdefault(file, {})[name] = values.to(getattr(torch, dtype))
        weight_map[name] = file
    write()
    done.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def described(shape: Shape) -> dict[str, int]:
    """For the record."""
    return {**asdict(shape), "parameters": shape.parameters}


def with_layers(shape: Shape, layers: int) -> Shape:
    """The same shape with another number of blocks."""
    return replace(shape, layers=layers)
