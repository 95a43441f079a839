"""What adapter_config.json says, as PEFT 0.21 reads it: which keys matter to a merge, which do not, which are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import InputFileError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

# Keys that tell how an adapter was trained or where it came from: its tensors tell all that a merge needs of them.
_HARMLESS = {
    "auto_mapping", "peft_type", "peft_version", "task_type", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
    "modules_to_save", "bias", "lora_bias", "unsloth_fixed",
}  # fmt: skip
_UNDERSTOOD = {
    "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out", "init_lora_weights", "ensure_weight_tying",
}  # fmt: skip
# Keys that change what the tensors mean in a way that is not built here.
_REFUSED = {
    "use_dora": "DoRA scales each row of the merged weight by a learned magnitude",
    "use_qalora": "QALoRA pools the inputs of quantised layers",
    "target_parameters": "it adapts fused parameters, such as experts in one tensor",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it trains single rows of the embedding",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) works on a part of a text only: it has no merged weights",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes between adapters: it has no merged weights",
    "kasa_config": "KaSA changes the base when it is loaded",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA is a variant of its own",
    "megatron_config": "its layers are Megatron's",
}
# These start from factors whose product is zero; every other way takes something out of the base when it starts.
_PLAIN_STARTS = (None, True, False, "true", "gaussian", "eva", "orthogonal")
# What not even PEFT can merge: it acts on a part of a text, on quantised layers, or at random.
_NEVER_MERGED = {"alora_invocation_tokens", "use_qalora", "arrow_config", "monteclora_config", "megatron_config"}
_PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "XLORA",
    "POLY",
)
# PEFT repeats pissa's and olora's start when it loads them; these need data or a quantised base for that.
_STARTS_WITH_DATA = ("corda", "loftq", "lora_ga")

Remedy = Literal["merge", "convert", "leave"]


@dataclass(frozen=True)
class AdapterConfig:
    """The parts of adapter_config.json that decide the merged weights, and the base it names.

    `refused` are the settings that make it more than a plain LoRA, as half-sentences; `remedy` is what can be done about them.
    """

    path: Path
    base: str | None
    revision: str | None
    r: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    fan_in_fan_out: bool
    ties: bool
    refused: tuple[str, ...]
    remedy: Remedy

    def rank(self, module: str) -> int:
        """The rank of a module's factors, by the first pattern that matches the end of its name (PEFT's rule)."""
        return next((rank for pattern, rank in self.ranks.items() if _matches(pattern, module)), self.r)

    def scale(self, module: str) -> float:
        """What multiplies B·A: alpha / r, or alpha / √r for rsLoRA."""
        alpha = next((alpha for pattern, alpha in self.alphas.items() if _matches(pattern, module)), self.alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _damaged(path: Path, why: str) -> InputFileError:
    return InputFileError(
        "this adapter's config cannot be read",
        where=str(path),
        why=why,
        fix="give a folder with adapter_config.json and adapter_model.safetensors, as PEFT's `save_pretrained` writes it",
    )


def read_config(folder: Path) -> AdapterConfig:
    """adapter_config.json of `folder`; raises InputFileError for a damaged file."""
    path = folder / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(data, dict):
        raise _damaged(path, f"it should be a JSON object, found {type(data).__name__}")
    ranks = _pattern(data, "rank_pattern", path)
    for key, value in (("r", data.get("r", 8)), *((f"rank_pattern: {name}", rank) for name, rank in ranks.items())):
        if type(value) is not int or value < 1:
            raise _damaged(path, f"{key} is {value!r}; it must be a whole number from 1")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(data.get(key), str | None):
            raise _damaged(path, f"{key} is {data[key]!r}; it must be text")
    return AdapterConfig(
        path=path,
        base=data.get("base_model_name_or_path") or None,
        revision=data.get("revision") or None,
        r=data.get("r", 8),
        alpha=_number(data.get("lora_alpha", 8), "lora_alpha", path),
        rslora=bool(data.get("use_rslora")),
        ranks=ranks,
        alphas={name: _number(a, name, path) for name, a in _pattern(data, "alpha_pattern", path).items()},
        fan_in_fan_out=bool(data.get("fan_in_fan_out")),
        ties=bool(data.get("ensure_weight_tying")),
        refused=tuple(_refusals(data)),
        remedy=_remedy(data),
    )


def _refusals(data: Mapping[str, Any]) -> list[str]:
    """Everything that makes these settings more than a plain LoRA's."""
    kind = data.get("peft_type", "LORA")
    if kind != "LORA":
        return [f"its peft_type is {kind}, and only LORA has the form scale·B·A"]
    faults = [f"`{key}` is set: {why}" for key, why in _REFUSED.items() if data.get(key)]
    start = data.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
        faults.append(f"`init_lora_weights: {start}` changed the base when training began, so B·A adds to another base")
    unknown = sorted(data.keys() - _HARMLESS - _UNDERSTOOD - _REFUSED.keys())
    # A setting that is off in a later PEFT changes nothing.
    faults += [f"`{key}: {json.dumps(data[key])}` is not known here" for key in unknown if data[key]]
    return faults


def _remedy(data: Mapping[str, Any]) -> Remedy:
    if data.get("peft_type") in _PROMPTS or any(data.get(key) for key in _NEVER_MERGED):
        return "leave"
    return "convert" if str(data.get("init_lora_weights")).lower().startswith(_STARTS_WITH_DATA) else "merge"


def _pattern(data: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = data.get(key) or {}
    if not isinstance(found, dict):
        raise _damaged(path, f"{key} is {found!r}; it must map names of modules to numbers")
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise _damaged(path, f"{key} has {pattern!r}, which is no regular expression: {error}") from error
    return found


def _number(value: object, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _damaged(path, f"{key} is {value!r}; it must be a number")
    return float(value)
