"""Where a model's parameters lie in its checkpoint: one tensor each, or several where transformers fuses them while loading."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import IncompatibleModelsError


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


def stored_names(model: Any, checkpoint: Collection[str]) -> dict[str, tuple[Stored, ...]]:
    """Each parameter's place in the checkpoint, whose tensor names are given; a tied parameter has one of its two names.

    The name may lack the base model's prefix, or have it in addition. Raises IncompatibleModelsError listing the parameters that
    the checkpoint stores in no known way.
    """
    known, prefix = set(checkpoint), f"{getattr(model, 'base_model_prefix', '')}."
    aliases: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    found: dict[str, tuple[Stored, ...]] = {}
    missing: list[str] = []
    for parameter, own in aliases.items():
        forms = [form for name in own for form in _forms(name, prefix)]
        whole = next((form for form in forms if form in known), None)
        if whole is not None:
            found[own[0]] = (Stored(whole),)
            continue
        parts = next((parts for form in forms if (parts := _fused(form, tuple(parameter.shape), known))), None)
        if parts is None:
            missing.append(own[0])
        else:
            found[own[0]] = parts
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise IncompatibleModelsError(
            "this architecture's parameters do not bear the names of its checkpoint",
            where=f"{', '.join(missing[:4])}{more} of {type(model).__name__}",
            why="transformers renames or fuses tensors of this family while loading, in a way that is not known here",
            fix="merge this family without a `sens:` block",
        )
    return found


def _forms(name: str, prefix: str) -> Iterator[str]:
    renamed = [name]
    for ours, theirs in _RENAMED:
        renamed += [name.replace(ours, theirs)] if ours in name else []
    for each in renamed:
        yield from (each, each.removeprefix(prefix), prefix + each)


def _fused(name: str, shape: tuple[int, ...], known: set[str]) -> tuple[Stored, ...] | None:
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
