"""config.json of models side by side: which differences change what is computed, and which are only said.

What a merged model computes is its weights and its config together; weights that were trained under another rope_theta are not
weights of this model. Keys and exceptions stand in configs.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.resources import files
from typing import Any

from .source import Checkpoint

KEYS: Mapping[str, Any] = json.loads(files(__package__).joinpath("configs.json").read_text(encoding="utf-8"))

ABSENT = "absent"
# Characters of a value in a message: a list of labels may have thousands.
SHOWN = 120


@dataclass(frozen=True)
class Difference:
    """One key on which the configs of models disagree: (model's label, value) of each, `absent` where it is not written.

    `matters` says whether it changes the mathematics.
    """

    key: str
    values: tuple[tuple[str, Any], ...]
    matters: bool

    @property
    def name(self) -> str:
        """The name by which `allow:` switches it off: the key without the part of the config that it lies in."""
        return self.key.rpartition(".")[2]

    def told(self) -> str:
        """`rope_theta: 10000.0 in base, a; 500000.0 in b`."""
        texts: dict[str, list[str]] = {}
        for label, value in self.values:
            text = value if value is ABSENT else json.dumps(value)
            texts.setdefault(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…", []).append(label)
        return f"{self.key}: " + "; ".join(f"{text} in {', '.join(labels)}" for text, labels in texts.items())


def _is_one_of(key: str, patterns: Sequence[str]) -> bool:
    """Whether a key, or its last part, is like one of some patterns."""
    return any(fnmatchcase(key, each) or fnmatchcase(key.rpartition(".")[2], each) for each in patterns)


def normal_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as flat keys, one name for each thing: the text model's part (`text_config`) at the top, `vision_config.x` beside.

    `rope_parameters` of transformers 5 becomes what older files say: rope_theta, rope_scaling, partial_rotary_factor.
    """
    flat: dict[str, Any] = {}
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key, value in part.items():
            if part is text and key in ("model_type", "architectures"):
                flat[f"text_config.{key}"] = value
            elif isinstance(value, Mapping) and key.endswith("_config"):
                if key != "text_config":
                    flat |= {f"{key}.{inner}": found for inner, found in normal_config(value).items()}
            else:
                flat[KEYS["same"].get(key, key)] = value
    _settle_rope(flat)
    heads, width = flat.get("num_attention_heads"), flat.get("hidden_size")
    if "head_dim" in flat and flat["head_dim"] is None and isinstance(heads, int) and isinstance(width, int) and heads:
        flat["head_dim"] = width // heads
    if "num_key_value_heads" in flat and flat["num_key_value_heads"] is None:
        flat["num_key_value_heads"] = heads
    return flat


def _settle_rope(flat: dict[str, Any]) -> None:
    """Write all that a flat config says of rotary positions as older files do, in place."""
    scaling = flat.get("rope_scaling")
    # transformers 5 takes the one for the other.
    taken = "rope_scaling" if isinstance(scaling, Mapping) and "rope_theta" in scaling else "rope_parameters"
    found = flat.pop(taken, None)
    if isinstance(found, Mapping):
        nested = {kind: each for kind, each in found.items() if isinstance(each, Mapping)}
        for kind, each in (nested or {"": found}).items():
            theta = {"": "rope_theta", "full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
            rest = dict(each)
            if "rope_theta" in rest:
                flat[theta.get(kind, f"rope_theta.{kind}")] = rest.pop("rope_theta")
            if "partial_rotary_factor" in rest:
                flat["partial_rotary_factor"] = rest.pop("partial_rotary_factor")
            flat["rope_scaling" if kind in ("", "full_attention") else f"rope_scaling.{kind}"] = rest
    for key in [key for key in flat if key.startswith("rope_scaling")]:
        if isinstance(flat[key], Mapping):
            flat[key] = _scaling(flat[key])


def _scaling(written: Mapping[str, Any]) -> dict[str, Any] | None:
    """How rotary positions are scaled, None for not at all; older files say `type` for `rope_type`."""
    rest = {("rope_type" if key == "type" else key): value for key, value in written.items() if value is not None}
    kind = rest.pop("rope_type", "default")
    return None if kind == "default" else {"rope_type": kind, **{key: rest[key] for key in sorted(rest)}}


def defaults_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with everything that its family fills in, from the config class of `transformers`; empty for an unknown family.

    Cost: `transformers` is imported, which takes seconds; so this is asked only where a key is missing that matters.
    """
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return {}
    try:
        filled = CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(config))).to_dict()
    except (
        Exception
    ):  # what a config class raises for values it does not like is its own; the config is then compared as written
        return {}
    return dict(json.loads(json.dumps(filled, default=str)))


def differences(
    models: Sequence[Checkpoint], *, stacked: bool = False, allowed: frozenset[str] = frozenset()
) -> list[Difference]:
    """Every key on which the models' configs disagree, sorted by name, those that change the mathematics first.

    A key that one file lacks is compared with the family's default if it changes the mathematics; otherwise it is not compared.
    `stacked`: the models may have unlike numbers of layers. Keys whose names are `allowed` are told as they are written.
    """
    compared = _Compared(models)
    found = []
    for key in compared.keys:
        if _is_one_of(key, KEYS["ignored"]) or (stacked and _is_one_of(key, KEYS["lengths_of_layers"])):
            continue
        values = compared.written(key)
        if not _is_one_of(key, KEYS["mathematics"]):
            if not _agree([value for value in values if value is not ABSENT]):
                found.append(Difference(key, tuple(zip(compared.labels, values, strict=True)), False))
        elif not _agree(values) and not compared.switched_off(key):
            # Two files of one family may say one thing in two ways, or leave out what is the default.
            values = values if key.rpartition(".")[2] in allowed else compared.meant(key)
            if not _agree(values):
                found.append(Difference(key, tuple(zip(compared.labels, values, strict=True)), True))
    return sorted(found, key=lambda each: (not each.matters, each.key))


class _Compared:
    """The configs of some models: what they say of a key, and what their families make of it."""

    def __init__(self, models: Sequence[Checkpoint]) -> None:
        self.labels = [model.label for model in models]
        self._models = models
        self._written = [normal_config(model.config) for model in models]
        self.keys = sorted({key for config in self._written for key in config})

    def written(self, key: str) -> list[Any]:
        """The key's value in each file."""
        return [config.get(key, ABSENT) for config in self._written]

    @cached_property
    def _filled(self) -> list[dict[str, Any]]:
        return [normal_config(defaults_of(model.config)) for model in self._models]

    def meant(self, key: str) -> list[Any]:
        """The key's value in each config that the family has completed; as written where the family is not known."""
        pairs = zip(self._filled, self.written(key), strict=True)
        return [filled.get(key, ABSENT) if filled else value for filled, value in pairs]

    def switched_off(self, key: str) -> bool:
        """Whether every file switches off what the key is about."""
        switch = KEYS["switches"].get(key)
        return switch is not None and all(value is False for value in self.written(switch))


def _agree(values: Sequence[Any]) -> bool:
    """Whether all values are one: numbers by value, absent as null."""
    plain = [None if value is ABSENT else value for value in values]
    return all(value == plain[0] and isinstance(value, bool) == isinstance(plain[0], bool) for value in plain)
