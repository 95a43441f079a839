"""The tiny Llama family of the golden merges: a base and three experts, the same bits on every machine.

Every number comes from the raw 64-bit output of NumPy's PCG64, which NumPy promises never to change (NEP 19); torch takes
no part. Only this module and its caller's NumPy are needed, so that it runs beside mergekit as well as beside `sensmerge`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("float32", "bfloat16")
SEEDS: Mapping[str, int] = {"float32": 20, "bfloat16": 21}
MEMBERS = ("base", "math", "code", "chat")
SIZES: Mapping[str, float] = {"math": 0.05, "code": 0.1, "chat": 0.2}
"""The largest change that an expert makes to a weight."""

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 3, 8, 12, 16
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Tensors = dict[str, NDArray[np.float32]]


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, sorted by name."""
    half = HIDDEN // 2
    block = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (half, HIDDEN),
        "self_attn.v_proj": (half, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    named: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in block.items()
    }
    named |= {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    return dict(sorted(named.items()))


def to_dtype(values: NDArray[np.float64], dtype: str) -> NDArray[np.float32]:
    """`values` as the family's type can hold them, in float32. bfloat16 is cut off: any value is as good as another here."""
    whole = values.astype(np.float32)
    return whole if dtype == "float32" else from_bits(bits(whole))


def bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of bfloat16 values held in float32."""
    return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def from_bits(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 bits."""
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


class _Draws:
    """Uniform numbers in [0, 1)."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(key)

    def next(self) -> float:
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def signed(self, octaves: int) -> float:
        """A number in (-1, 1) whose magnitudes spread over some octaves."""
        return (2 * self.next() - 1) * 2.0 ** -int(octaves * self.next())


def build(dtype: str) -> dict[str, Tensors]:
    """The tensors of every member, by its name."""
    family: dict[str, Tensors] = {name: {} for name in MEMBERS}
    for place, (name, shape) in enumerate(shapes().items()):
        draws = _Draws(SEEDS[dtype], 0, place)
        count = int(np.prod(shape))
        norm = name.endswith("norm.weight")
        # Small enough for bfloat16's steps to leave every expert enough different changes.
        drawn = [0.3 + 0.2 * draws.signed(1) if norm else 0.25 * draws.signed(6) for _ in range(count)]
        base = to_dtype(np.array(drawn), dtype)
        family["base"][name] = base.reshape(shape)
        for number, (expert, size) in enumerate(SIZES.items(), start=1):
            family[expert][name] = _changed(base, size, _Draws(SEEDS[dtype], number, place), dtype).reshape(shape)
    return family


def _changed(base: NDArray[np.float32], size: float, draws: _Draws, dtype: str) -> NDArray[np.float32]:
    """`base` with every weight changed, no two of them by the same magnitude in float32.

    Where two magnitudes are equal at a threshold, mergekit keeps whichever its sort leaves first, and `sensmerge` keeps both.
    """
    changed, seen = base.copy(), {np.float32(0)}
    for place, value in enumerate(base):
        for _ in range(1000):
            changed[place] = to_dtype(np.array([float(value) + size * draws.signed(3)]), dtype)[0]
            magnitude = abs(changed[place] - value)
            if magnitude not in seen:
                break
        else:
            raise AssertionError("no change is left that another weight does not have")
        seen.add(magnitude)
    return changed


def digest(family: Mapping[str, Tensors]) -> str:
    """A hash of all tensors: a golden merge is compared only with what was made of the same bits."""
    total = hashlib.sha256()
    for member in MEMBERS:
        for name, values in sorted(family[member].items()):
            total.update(f"{member} {name} {values.shape}".encode() + values.astype("<f4").tobytes())
    return total.hexdigest()


def write(family: Mapping[str, Tensors], dtype: str, folder: Path) -> None:
    """A checkpoint folder for each member. Written by hand: NumPy has no bfloat16 for the safetensors library to write."""
    kind, stored = ("F32", "<f4") if dtype == "float32" else ("BF16", "<u2")
    for member, tensors in family.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name, values in sorted(tensors.items()):
            raw = (values if dtype == "float32" else bits(values)).astype(stored).tobytes()
            header[name] = {
                "dtype": kind,
                "shape": list(values.shape),
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / member).mkdir(parents=True)
        (folder / member / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        config = {**CONFIG, "torch_dtype": dtype}
        (folder / member / "config.json").write_text(json.dumps(config, indent=1) + "\n")
