"""Which module of transformers' model each stored tensor belongs to: known without a weight, from the config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.source import Checkpoint
from ..errors import IncompatibleModelsError, InputFileError
from .naming import stored_names


@dataclass(frozen=True)
class Skeleton:
    """An architecture without its weights.

    `places` has for each stored tensor its module and the parameter's name in it, `twins` the second name of a parameter that has
    two (a tied head); `matrices` are the modules that are Linear or Conv1D, `conv1d` those that keep their weight as [in, out].
    """

    places: Mapping[str, tuple[str, str]]
    twins: Mapping[str, str]
    modules: tuple[str, ...]
    matrices: frozenset[str]
    conv1d: frozenset[str]

    def stored_in(self, module: str) -> Iterator[tuple[str, str]]:
        """Every stored tensor in a module or below it, with its name in the model."""
        for stored, (owner, parameter) in self.places.items():
            if owner == module or owner.startswith(f"{module}."):
                yield stored, f"{owner}.{parameter}"


def skeleton_of(checkpoint: Checkpoint) -> Skeleton:
    """The modules of a model; no weight is read or made.

    Raises InputFileError if transformers does not know the architecture, IncompatibleModelsError if it renames or fuses tensors of
    this family while loading.
    """
    with _refusals_told(checkpoint):
        import transformers
        from transformers.pytorch_utils import Conv1D

        config = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        kind = next(iter(config.architectures or ()), "")
        with torch.device("meta"):
            made: Any = getattr(transformers, kind, None)
            model = made(config) if made else transformers.AutoModelForCausalLM.from_config(config)
    try:
        stored = stored_names(model, checkpoint)
    except IncompatibleModelsError as error:
        raise _no_adapter(checkpoint, error.why) from error
    fused = [own for own, parts in stored.items() if len(parts) > 1]
    if fused:
        raise _no_adapter(checkpoint, f"transformers fuses tensors of this family while loading ({fused[0]})")
    names = {own: parts[0].name for own, parts in stored.items()}
    modules = dict(model.named_modules())
    second: dict[Any, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in names:
            second[parameter] = name
    first = dict(model.named_parameters())
    conv1d = {name for name, module in modules.items() if isinstance(module, Conv1D)}
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    return Skeleton(
        places={stored: _split(own) for own, stored in names.items()},
        twins={stored: second[first[own]] for own, stored in names.items() if first[own] in second},
        modules=tuple(name for name in modules if name),
        matrices=frozenset(conv1d | linear),
        conv1d=frozenset(conv1d),
    )


def _no_adapter(checkpoint: Checkpoint, why: str) -> IncompatibleModelsError:
    return IncompatibleModelsError(
        "an adapter of this architecture cannot be written",
        where=checkpoint.label,
        why=why,
        fix="keep the full model: there is no adapter that PEFT could load onto its base",
    )


def _split(name: str) -> tuple[str, str]:
    owner, _, parameter = name.rpartition(".")
    return owner, parameter


@contextmanager
def _refusals_told(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise InputFileError(
            "transformers cannot build this architecture",
            where=str(checkpoint.path / "config.json"),
            why=(str(error).strip() or type(error).__name__).split("\n")[0],
            fix="check that `AutoConfig.from_pretrained(folder)` works with the installed transformers",
        ) from error
