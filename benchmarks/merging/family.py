"""A family to merge: the tensor shapes of a Llama of half a billion parameters (at 26 layers), filled with random numbers.

Experts are the base plus noise of a hundredth of its spread and more: smaller differences vanish in bfloat16.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 1280, 20, 4, 3456, 32000
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SPREAD = 0.02


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor."""
    narrow = HIDDEN // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": (narrow, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": (narrow, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def parameters(layers: int) -> int:
    """Number of parameters."""
    return sum(int(np.prod(shape)) for shape in shapes(layers).values())


def _stored(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype != "BF16":
        return values.astype(np.float16 if dtype == "F16" else np.float32).tobytes()
    bits = values.view(np.uint32)
    return (
        ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        .astype(np.uint16)
        .tobytes()
    )


def _numbers(name: str, model: int, count: int) -> NDArray[np.float32]:
    return np.random.default_rng([zlib.crc32(name.encode()), model]).standard_normal(count, dtype=np.float32)


def config(layers: int, dtype: str) -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "torch_dtype": DTYPES[dtype],
    }


def write_model(folder: Path, model: int, layers: int, dtype: str) -> None:
    """Model 0 is the base, the others are experts; nothing is done if the folder is complete."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    item = 4 if dtype == "F32" else 2
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes(layers).items():
        size = int(np.prod(shape)) * item
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes(layers).items():
            count = int(np.prod(shape))
            values = _numbers(name, 0, count) * np.float32(SPREAD)
            if model:
                values += _numbers(name, model, count) * np.float32(SPREAD * 0.03 * model)
            file.write(_stored(values, dtype))
    # Written last: it marks the folder as complete.
    (folder / "config.json").write_text(json.dumps(config(layers, dtype), indent=2))


def build(root: Path, layers: int, dtype: str, experts: int) -> Path:
    """The folder with base, e1, e2, …; made once."""
    folder = root / f"{dtype.lower()}-{layers}"
    write_model(folder / "base", 0, layers, dtype)
    for model in range(1, experts + 1):
        write_model(folder / f"e{model}", model, layers, dtype)
    return folder
