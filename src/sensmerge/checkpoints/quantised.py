"""Checkpoints whose weights are quantised, refused by name: by what config.json says, and by what the tensors are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import IncompatibleModelsError
from ..records import TensorSpec

# What a kind of quantisation calls its tensors.
_TENSORS = (
    ("gptq or awq", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|nested_absmax|quant_state\.\w+|SCB)$")),
    ("compressed-tensors", re.compile(r"\.(weight_packed|weight_global_scale|weight_zero_point)$")),
    ("fp8", re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|activation_scale)$")),
    ("mxfp4", re.compile(r"_(blocks|scales)$")),
)
_WEIGHT = re.compile(r"(^|\.)(weight|\w*_proj)$")
_SMALL = ("I8", "U8")

# The kinds that `from_pretrained` undoes, with the class that tells it to; others need the model they were made from.
_UNDONE = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def refuse_quantised(label: str, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> None:
    """Raise IncompatibleModelsError for a quantised checkpoint, naming how it was quantised and the first tensors that show it.

    `config` may lie: the tensors are looked at as well, by dtype (8-bit floats, weights of 8-bit integers) and by name.
    """
    method, found = _said(config), _shown(tensors)
    kind = method or next(iter(found), None)
    if kind is None:
        return
    names = next(iter(found.values()), [])
    why = "config.json has 'quantization_config'" if method else "config.json does not say so, but its tensors do"
    shown = f": {', '.join(names[:3])}{' …' if len(names) > 3 else ''}" if names else ""
    raise IncompatibleModelsError(
        f"'{label}' is a quantised checkpoint ({kind})",
        where=str(folder),
        why=f"{why}{shown}. Quantised weights cannot be added: a merge needs the numbers that they stand for",
        fix=f"use the unquantised model that it was made from (float32, float16 or bfloat16){_undoing(method, folder)}",
    )


def _undoing(method: str | None, folder: Path) -> str:
    """How `transformers` undoes a method that config.json names; nothing for others, which it cannot or does not know of."""
    if method == "bitsandbytes":
        return "; or load it with `from_pretrained`, call `model.dequantize()`, and `save_pretrained` the result"
    if method not in _UNDONE:
        return ""
    plain = folder.with_name(f"{folder.name}-plain")
    return (
        f'; or undo it: python -c "from transformers import AutoModelForCausalLM as M, {_UNDONE[method]} as Q;'
        f" M.from_pretrained('{folder}', quantization_config=Q(dequantize=True))"
        f".save_pretrained('{plain}', save_original_format=False)\""
    )


def _said(config: Mapping[str, Any]) -> str | None:
    """The method of a config's quantisation, in the names that `transformers` uses; None if it has none."""
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if found is None:
            continue
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
            method = "bitsandbytes"
        return str(method) if method else "of a kind that config.json does not name"
    return None


def _shown(tensors: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """The tensors that only a quantised model has, sorted, by kind; the most telling kind first."""
    found: dict[str, list[str]] = {}
    for kind, pattern in _TENSORS:
        names = sorted(name for name in tensors if pattern.search(name))
        packed = any(
            tensors[name].dtype in ("I32", "U8", "I8") or tensors[name].dtype.startswith("F8") for name in tensors
        )
        if names and packed:
            found[kind] = names
    eights = sorted(name for name, spec in tensors.items() if spec.dtype.startswith("F8"))
    if eights:
        found.setdefault("fp8", eights)
    integers = sorted(
        name for name, spec in tensors.items() if spec.dtype in _SMALL and len(spec.shape) > 1 and _WEIGHT.search(name)
    )
    if integers:
        found.setdefault("8-bit integers", integers)
    return found
