"""From the names in an adapter file to what changes in each tensor of the base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...records import TensorSpec
from ..families import role_outside, stack_of
from ..formats import FLOATS
from .config import AdapterConfig

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<factor>A\.(?:(?P<a>[^.]+)\.)?weight|B\.(?:(?P<b>[^.]+)\.)?(?:weight|bias))$"
)
_KNOWN = {
    "lora_embedding_": "embedding LoRA",
    "lora_magnitude_vector": "DoRA",
    "original_module": "a copy of a module of the base",
}
# transformers' Conv1D stores a Linear's weight the other way round; where a matrix is square only the names tell.
_CONV1D_TYPES = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp")
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor: it may be `replaced`, then scale · B·A, or scale · `added`, comes on top.

    All but the scale are names in the adapter file. `flipped`: the tensor is a Conv1D's, which keeps the transpose.
    """

    replaced: str | None = None
    a: str | None = None
    b: str | None = None
    added: str | None = None
    scale: float = 1.0
    flipped: bool = False


class _Names:
    """Finds the base's name of an adapted tensor: the checkpoint may have been saved with or without what leads to its blocks."""

    def __init__(self, stored: Iterable[str], modules: Iterable[str]) -> None:
        self._stored = set(stored)
        ours, theirs = stack_of(self._stored).prefix, stack_of(f"{module}." for module in modules).prefix
        self._strip, self._add = "", ""
        if ours is not None and theirs is not None and ours != theirs:
            if theirs.endswith(f".{ours}") or not ours:
                self._strip = theirs[: len(theirs) - len(ours)]
            elif ours.endswith(f".{theirs}"):
                self._add = ours[: len(ours) - len(theirs)]

    def find(self, name: str) -> str | None:
        """The base's tensor; None if there is none."""
        moved = self._add + name.removeprefix(self._strip)
        return next((form for form in (name, moved) if form in self._stored), None)


class Changes:
    """What an adapter changes, by tensor of the base, and every fault that was found on the way.

    `twins` are full tensors for the two ends of a tied matrix, which must be equal. Of the faults `misfits` says that some
    cannot be helped on this base, `unties` that two ends of one matrix part; `rows` is the size of another vocabulary, if not 0.
    """

    def __init__(
        self,
        adapter: Mapping[str, TensorSpec],
        base: Mapping[str, TensorSpec],
        base_config: Mapping[str, Any],
        config: AdapterConfig,
    ) -> None:
        self._adapter, self._base, self._base_config, self._config = adapter, base, base_config, config
        self.by_tensor: dict[str, Change] = {}
        self.twins: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.misfits, self.unties, self.rows = False, False, 0
        self._factors: dict[str, dict[str, str]] = {}
        self._full: dict[str, str] = {}
        self._sort()
        self._names = _Names(base, [*self._factors, *self._full])
        tied = self._tied_full()
        for module, name in self._full.items():
            if name not in tied:
                self._replace(module, name)
        for module, parts in self._factors.items():
            self._adapt(module, parts)

    def _sort(self) -> None:
        """Tell factors from full tensors; what is neither is a fault."""
        for name, spec in self._adapter.items():
            bare = name.removeprefix(_PREFIX)
            found = _FACTOR.match(bare)
            if spec.dtype not in FLOATS:
                self._misfit(f"'{name}' has dtype {spec.dtype}")
            elif found is not None:
                module = found["module"].removesuffix(".base_layer")
                part = f"{found['factor'][0]}.{found['factor'].rpartition('.')[2]}"
                if part in self._factors.setdefault(module, {}):
                    self._misfit(f"'{name}': the file holds more than one adapter")
                self._factors[module][part] = name
            elif "lora_" in bare or "original_module" in bare:
                what = next((what for key, what in _KNOWN.items() if key in bare), "not a LoRA's")
                self.faults.append(f"'{name}' is {what}, which is not supported")
                self.misfits |= what == "not a LoRA's"
            else:
                full = re.sub(r"\.modules_to_save(\.default)?\.", ".", bare.replace(".base_layer.", "."))
                if full in self._full:
                    self._misfit(f"'{name}': the file holds this tensor twice")
                self._full[full] = name

    def _tied_full(self) -> set[str]:
        """Full tensors for an embedding and the head that is tied to it; returns the names that are dealt with here."""
        if not _is_tied(self._base_config, self._base):
            return set()
        heads = [name for name in self._full if role_outside(name) == "lm_head"]
        embeddings = [name for name in self._full if _is_token_embedding(name)]
        adapted = [module for module in self._factors if role_outside(f"{module}.") == "lm_head"]
        if adapted:
            self.unties = True
            self.faults.append(f"it adapts '{adapted[0]}', which the base ties to the embedding")
            for module in adapted:
                del self._factors[module]
            return {self._full[name] for name in (*heads, *embeddings)}
        if not (heads or embeddings):
            return set()
        if len(heads) == len(embeddings) == 1:
            self.twins.append((self._full[embeddings[0]], self._full[heads[0]]))
        elif not self._config.ties:
            self.unties = True
            self.faults.append(
                f"it replaces '{(embeddings or heads)[0]}' alone, which the base ties to its other end; PEFT keeps that as it was"
            )
        source = self._full[(embeddings or heads)[0]]
        for stored in self._base:
            if _is_token_embedding(stored) or role_outside(stored) == "lm_head":
                self._check_shape(source, self._adapter[source].shape, stored)
                self.by_tensor[stored] = Change(replaced=source)
        return {self._full[name] for name in (*heads, *embeddings)}

    def _replace(self, full: str, name: str) -> None:
        stored = self._names.find(full)
        if stored is None:
            self._misfit(f"'{name}' has no counterpart in the base")
        elif stored in self.by_tensor:
            self._misfit(f"'{name}': '{stored}' of the base is changed twice")
        else:
            self._check_shape(name, self._adapter[name].shape, stored)
            self.by_tensor[stored] = Change(replaced=name)

    def _adapt(self, module: str, parts: Mapping[str, str]) -> None:
        shown = next(iter(parts.values()))
        missing = {"A.weight", "B.weight"} - parts.keys()
        if missing:
            self._misfit(f"'{shown}' lacks its other factor")
            return
        stored = self._names.find(f"{module}.weight")
        if stored is None:
            self._misfit(f"'{shown}' has no counterpart in the base")
            return
        before = self.by_tensor.get(stored, Change())
        if before.a is not None:
            self._misfit(f"'{shown}': '{stored}' of the base is changed twice")
            return
        a, b = parts["A.weight"], parts["B.weight"]
        flipped = self._fit(module, a, b, stored)
        scale = self._config.scale(module)
        if flipped is not None:
            self.by_tensor[stored] = Change(before.replaced, a, b, None, scale, flipped)
        if "B.bias" in parts:
            self._add_bias(parts["B.bias"], f"{module}.bias", scale)

    def _fit(self, module: str, a: str, b: str, stored: str) -> bool | None:
        """Whether the factors give the stored matrix the other way round; None, and a fault, if they do not give it at all."""
        shape, rank = self._base[stored].shape, self._config.rank(module)
        a_shape, b_shape = self._adapter[a].shape, self._adapter[b].shape
        if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1]:
            self._misfit(f"'{a}' {list(a_shape)} and '{b}' {list(b_shape)} are no two factors")
            return None
        if a_shape[0] != rank:
            self._misfit(f"'{a}' has rank {a_shape[0]}, adapter_config.json says {rank}")
            return None
        forms = [((b_shape[0], a_shape[1]), False), ((a_shape[1], b_shape[0]), True)]
        fitting = [flipped for form, flipped in forms if form == shape]
        if not fitting or self._base[stored].dtype not in FLOATS:
            kind = f"{self._base[stored].dtype} {list(shape)}"
            self._misfit(f"'{a}' and '{b}' give {list(forms[0][0])}, '{stored}' of the base is {kind}")
            return None
        if len(fitting) == 1:
            return fitting[0]
        known = self._base_config.get("model_type") in _CONV1D_TYPES or self._config.fan_in_fan_out
        return known and module.rpartition(".")[2] in _CONV1D_MODULES

    def _add_bias(self, name: str, full: str, scale: float) -> None:
        stored = self._names.find(full)
        if stored is None:
            self._misfit(f"'{name}' has no counterpart in the base")
            return
        self._check_shape(name, self._adapter[name].shape, stored)
        before = self.by_tensor.get(stored, Change())
        self.by_tensor[stored] = Change(before.replaced, None, None, name, scale)

    def _misfit(self, fault: str) -> None:
        self.misfits = True
        self.faults.append(fault)

    def _check_shape(self, name: str, shape: tuple[int, ...], stored: str) -> None:
        spec = self._base[stored]
        if shape == spec.shape and spec.dtype in FLOATS:
            return
        fault = f"'{name}' is {list(shape)}, '{stored}' of the base is {spec.dtype} {list(spec.shape)}"
        ends = _is_token_embedding(stored) or role_outside(stored) == "lm_head"
        if ends and len(shape) == 2 and shape[1:] == spec.shape[1:]:
            self.rows = shape[0]
            self.faults.append(fault)
        else:
            self._misfit(fault)


def _is_token_embedding(name: str) -> bool:
    return (
        role_outside(name) == "embed"
        and re.search(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$", name) is not None
    )


def _is_tied(config: Mapping[str, Any], stored: Iterable[str]) -> bool:
    """Whether the model's head is its embedding."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    kinds = config.get("architectures") or ()
    return any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds) and not any(
        role_outside(name) == "lm_head" for name in stored
    )
