"""Where a model's parameters lie in its checkpoint: one tensor each, or several where transformers fuses them while loading."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints.source import Checkpoint
from ..errors import IncompatibleModelsError, InputFileError


@dataclass(frozen=True)
class Stored:
    """Where a parameter, or a part of it, lies in the checkpoint: the tensor's name, and which part of the parameter it is."""

    name: str
    part: tuple[int | slice, ...] = ()


# By parameter name: the tensors of the checkpoint that make it, one but for weights that transformers fuses while loading.
Names = Mapping[str, tuple[Stored, ...]]

# transformers' name for what checkpoints call otherwise: (in the model, in the checkpoint).
_RENAMED = ((".mlp.", ".block_sparse_moe."), ("lm_head.", "embed_out."))
# The weights of a layer's experts, fused into one [experts, rows, columns], and what their parts are called: one after the other
# along the rows. Mixtral's names come last.
_FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


# Tensors of old checkpoints that models compute from their config: masks and frequencies of positions.
_RECOMPUTED = (r"rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$")


def stored_names(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[Stored, ...]]:
    """Each parameter's place in the checkpoint; a tied parameter has one of its two names.

    A tensor's name may lack the base model's prefix, or have it in addition. No weight is invented and none ignored: raises
    InputFileError listing what is missing, unknown to the model or of another shape (but buffers that the model computes);
    IncompatibleModelsError where parameters and tensors are left that may belong together in a way that is not known here.
    """
    known, prefix = checkpoint.tensors, f"{getattr(model, 'base_model_prefix', '')}."
    aliases: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    found: dict[str, tuple[Stored, ...]] = {}
    missing, unlike = list[str](), list[str]()
    used = {form for name, _ in model.named_buffers() for form in _forms(name, prefix)}
    for parameter, own in aliases.items():
        forms = [form for name in own for form in _forms(name, prefix)]
        used |= set(forms)
        whole = next((form for form in forms if form in known), None)
        fused = (_fused(form, tuple(parameter.shape), known) for form in forms)
        parts = (Stored(whole),) if whole is not None else next((parts for parts in fused if parts), None)
        if parts is None:
            missing.append(own[0])
            continue
        found[own[0]] = parts
        for each in parts:
            used.add(each.name)
            needed, stored = list(parameter[each.part].shape), list(known[each.name].shape)
            if needed != stored:
                unlike.append(f"'{each.name}' is {stored}, the model needs {needed}")
    ignored = [*_RECOMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    unknown = [name for name in known if name not in used and not any(re.search(each, name) for each in ignored)]
    _refuse(model, checkpoint, missing, unknown, unlike)
    return found


def _refuse(
    model: Any, checkpoint: Checkpoint, missing: Sequence[str], unknown: Sequence[str], unlike: Sequence[str]
) -> None:
    """Raise the error for a checkpoint that is not what its model needs, if there is anything to raise."""
    if missing and unknown:
        raise IncompatibleModelsError(
            "this architecture's parameters do not bear the names of its checkpoint",
            where=str(checkpoint.path),
            why=f"{type(model).__name__} needs {_listed(missing)}; the checkpoint has {_listed(unknown)} instead: transformers"
            " renames or fuses tensors of this family while loading, in a way that is not known here",
            fix="merge this family without a `sens:` block",
        )
    faults = [f"{_listed(missing)} missing"] if missing else []
    faults += [f"{_listed(unknown)} not known to {type(model).__name__}"] if unknown else []
    faults += [_listed(unlike)] if unlike else []
    if faults:
        raise InputFileError(
            "this checkpoint does not hold what its architecture needs",
            where=str(checkpoint.path),
            why="; ".join(faults),
            fix="download or save the model again; config.json and the weights must belong together",
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _forms(name: str, prefix: str) -> Iterator[str]:
    renamed = [name]
    for ours, theirs in _RENAMED:
        renamed += [name.replace(ours, theirs)] if ours in name else []
    for each in renamed:
        yield from (each, each.removeprefix(prefix), prefix + each)


def _fused(name: str, shape: tuple[int, ...], known: Collection[str]) -> tuple[Stored, ...] | None:
    """The experts' own tensors that make a fused weight, if all of them are there."""
    stem, _, last = name.rpartition(".")
    if last not in _FUSED or len(shape) != 3:
        return None
    for parts in _FUSED[last]:
        rows = shape[1] // len(parts)
        stored = tuple(
            Stored(f"{stem}.{expert}.{part}.weight", (expert, slice(at * rows, (at + 1) * rows)))
            for expert in range(shape[0])
            for at, part in enumerate(parts)
        )
        if all(each.name in known for each in stored):
            return stored
    return None
