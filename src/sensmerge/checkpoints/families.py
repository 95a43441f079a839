"""What a tensor's name tells: its block, its role outside the blocks, its module inside one.

A block is the name up to and including its first all-digit component (`model.layers.7`); the stack is the longest such family.
Nothing here knows an architecture: only how Hugging Face checkpoints name things, which families.json lists.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, cast

from ..errors import IncompatibleModelsError
from ..records import Role

# Patterns and exceptions are data, so that a new architecture needs no code.
NAMING: Mapping[str, Any] = json.loads(files(__package__).joinpath("families.json").read_text(encoding="utf-8"))

# Names outside the blocks, and the parts of a name inside one; the most telling first.
_ROLES = tuple((role, re.compile(pattern)) for role, pattern in NAMING["roles"])
_MODULES = tuple((module, re.compile(pattern)) for module, pattern in NAMING["modules"])
_OPENING_NORMS = {module: re.compile(pattern) for module, pattern in NAMING["opening_norms"].items()}
_NORM_AFTER_ATTENTION = re.compile(r"^post_attention_layernorm\.")
_HEADS = re.compile(NAMING["heads"])
_EMBEDDINGS = re.compile(NAMING["embeddings"])


@dataclass(frozen=True)
class Grouping:
    """Which group each tensor belongs to: one of `layers` (in stack order) inside the blocks, a role outside."""

    layers: tuple[str, ...]
    roles: tuple[Role, ...]
    group_of: Mapping[str, str]


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts `layers.10` after `layers.9`; numbers are compared as digits, however long."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    bare = [part.lstrip("0") for part in parts]
    return tuple(
        (0, len(digits), digits) if _is_number(part) else (1, 0, part) for part, digits in zip(parts, bare, strict=True)
    )


def _stack_prefix(names: Iterable[str]) -> str | None:
    members: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        first = next((at for at, part in enumerate(parts) if _is_number(part)), None)
        if first is not None:
            members[".".join(parts[:first])].add(parts[first])
    return max(sorted(members), key=lambda prefix: len(members[prefix]), default=None)


def _block(name: str, prefix: str | None) -> str | None:
    if prefix is None or not name.startswith(f"{prefix}." if prefix else ""):
        return None
    number = name[len(prefix) + 1 if prefix else 0 :].split(".", 1)[0]
    return (f"{prefix}.{number}" if prefix else number) if _is_number(number) else None


@dataclass(frozen=True)
class Stack:
    """The blocks of a checkpoint: what stands before their numbers (None without blocks), and the numbers as written, in order."""

    prefix: str | None
    numbers: tuple[str, ...]

    def split(self, name: str) -> tuple[str, str] | None:
        """The block's number in a name and what follows it (with its dot); None for a name outside the blocks."""
        block = _block(name, self.prefix)
        if block is None:
            return None
        return block[len(self.prefix) + 1 if self.prefix else 0 :], name[len(block) :]

    def join(self, number: str, inner: str) -> str:
        """The name whose parts `split` gives."""
        return f"{self.prefix}.{number}{inner}" if self.prefix else f"{number}{inner}"


def stack_of(names: Iterable[str]) -> Stack:
    """The blocks of a checkpoint with these tensor names."""
    names = list(names)
    bare = Stack(_stack_prefix(names), ())
    numbers = {parts[0] for name in names if (parts := bare.split(name)) is not None}
    return Stack(bare.prefix, tuple(sorted(numbers, key=natural_key)))


def role_outside(name: str) -> Role:
    """The role of a tensor that lies in no block: embed, final_norm, lm_head or other."""
    return next((cast(Role, role) for role, pattern in _ROLES if pattern.search(name)), "other")


def _module(inner: str, siblings: set[str], block: str) -> str:
    """`attention` or `mlp` for the part of a name inside its block; the norm before a module belongs to it.

    What mixes the tokens of a state-space model (Mamba's `mixer`) stands where attention does and counts as it.
    """
    if _NORM_AFTER_ATTENTION.match(inner):
        # Where the MLP has a norm of its own, or attention none before it, this one closes attention instead.
        opened = {module for module, norm in _OPENING_NORMS.items() if any(norm.match(sibling) for sibling in siblings)}
        return "mlp" if opened == {"attention"} else "attention"
    found = next((module for module, pattern in _MODULES if pattern.search(inner)), None)
    if found is not None:
        return str(found)
    raise IncompatibleModelsError(
        f"cannot tell whether '{block}.{inner}' belongs to attention or to the MLP",
        where=f"tensor '{block}.{inner}'",
        why="`group: module` needs to know, and the name does not say",
        fix="use `group: block` or `group: tensor`",
    )


def group_tensors(names: Iterable[str], group: str = "block") -> Grouping:
    """The groups of a checkpoint's tensors at granularity `block`, `module` or `tensor`; from the names alone."""
    names = sorted(names, key=natural_key)
    prefix = _stack_prefix(names)
    inside = {name: block for name in names if (block := _block(name, prefix)) is not None}
    inner_names: dict[str, set[str]] = defaultdict(set)
    for name, block in inside.items():
        inner_names[block].add(name[len(block) + 1 :])
    group_of: dict[str, str] = {}
    for name in names:
        if name not in inside:
            group_of[name] = role_outside(name)
        elif group == "block":
            group_of[name] = inside[name]
        elif group == "tensor":
            group_of[name] = name
        else:
            block = inside[name]
            group_of[name] = f"{block}.{_module(name[len(block) + 1 :], inner_names[block], block)}"
    if "embed" not in group_of.values():
        # A tied matrix may be stored under the head's name alone; it is the embedding all the same.
        group_of = {name: "embed" if part == "lm_head" else part for name, part in group_of.items()}
    layers = sorted({group_of[name] for name in inside}, key=natural_key)
    roles: list[Role] = [role for role in ("embed", "final_norm", "lm_head", "other") if role in group_of.values()]
    return Grouping(tuple(layers), tuple(roles), group_of)


def head_of(names: Iterable[str]) -> str | None:
    """The matrix of the output head among the names of a checkpoint, if it is stored."""
    names = list(names)
    stack = stack_of(names)
    return next((name for name in sorted(names) if _HEADS.search(name) and stack.split(name) is None), None)


def embedding_of(names: Iterable[str]) -> str | None:
    """The matrix of the input embedding among the names of a checkpoint; None if no name, or more than one, is like one."""
    names = list(names)
    stack = stack_of(names)
    found = [name for name in names if _EMBEDDINGS.search(name) and stack.split(name) is None]
    return found[0] if len(found) == 1 else None


def tied_head(config: Mapping[str, object], names: Iterable[str]) -> str | None:
    """The name of an output head that config.json ties to the embedding although the checkpoint stores it, if any."""
    return head_of(names) if config.get("tie_word_embeddings", False) else None
