"""A model as an adapter makes it: the base, with scale·B·A added while it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import IncompatibleModelsError
from ...records import TensorSpec
from ..formats import FLOATS, to_float32
from ..source import TOKENIZER_FILES, Checkpoint, Wrapped
from .changes import Change, Changes
from .config import AdapterConfig
from .factors import AdapterFile, Floats, add_product, widen
from .remedies import merging_command

# The base is read and widened in pieces of this many elements.
PIECE = 1 << 16


class AdaptedModel(Wrapped):
    """A base with a LoRA adapter, as PEFT's `merge_and_unload` gives it but in float32: nothing is rounded before the merge.

    Tensors that the adapter changes are shown as F32, the base's numbers widened exactly; all others as stored. What an element is
    does not depend on how it is read. Raises IncompatibleModelsError naming every tensor of the adapter that does not fit the base.
    Memory: the adapter's factors of a few tensors, whatever the number of layers. Cost: 2·r float32 operations an element.
    """

    def __init__(self, inner: Checkpoint, config: AdapterConfig, file: AdapterFile, label: str) -> None:
        super().__init__(inner)
        self._label, self._file, self._folder = label, file, file.path.parent.resolve()
        found = Changes(file.tensors, inner.tensors, inner.config, config)
        unlike = [] if found.faults else self._unlike_twins(found)
        faults = found.faults + unlike
        if faults:
            merging = merging_command(inner.path, self._folder, untie=found.unties or bool(unlike), rows=found.rows)
            other = (
                f"write the base it was trained on ({config.base}) before the `+`, or save the adapter again with PEFT"
            )
            raise IncompatibleModelsError(
                f"the adapter of '{label}' cannot be added to its base: {len(faults)} fault(s)",
                where=str(file.path),
                why="; ".join(faults),
                fix=other if found.misfits else merging,
            )
        self.changes: Mapping[str, Change] = found.by_tensor
        self._tensors = {
            name: replace(spec, dtype="F32") if name in self.changes else spec for name, spec in inner.tensors.items()
        }

    @property
    def label(self) -> str:
        """See TensorSource."""
        return self._label

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """See TensorSource."""
        return self._tensors

    @property
    def tokenizer_path(self) -> Path:
        """See Checkpoint: the adapter's folder if it has a tokenizer, else the base's."""
        own = any((self._folder / name).is_file() for name in TOKENIZER_FILES)
        return self._folder if own else self.inner.tokenizer_path

    @property
    def folders(self) -> tuple[Path, ...]:
        """See Checkpoint."""
        return (*self.inner.folders, self._folder)

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """See TensorSource."""
        change = self.changes.get(name)
        if change is None:
            self.inner.read_into(name, start, out)
            return
        values = out.view(np.float32)
        if change.replaced is not None:
            values[:] = self._file.values(change.replaced, start, len(values))
        else:
            self._read_base(name, start, values)
        if change.added is not None:
            # What overflows is found, and told by name, where every input is looked over.
            with np.errstate(all="ignore"):
                values += np.float32(change.scale) * self._file.values(change.added, start, len(values))
        if change.a is not None and change.b is not None:
            # W is B·A; a Conv1D keeps its transpose, Aᵀ·Bᵀ.
            first, second = (change.a, change.b) if change.flipped else (change.b, change.a)
            rows = self._file.rows(first, transposed=change.flipped)
            columns = self._file.columns(second, transposed=change.flipped)
            add_product(start, rows, columns, change.scale, values)

    def _read_base(self, name: str, start: int, values: Floats) -> None:
        dtype = self.inner.tensors[name].dtype
        if dtype == "F32":
            self.inner.read_into(name, start, values.view(np.uint8))
            return
        held = FLOATS[dtype]
        raw = np.empty(min(PIECE, len(values)), held)
        for at in range(0, len(values), PIECE):
            piece = raw[: min(PIECE, len(values) - at)]
            self.inner.read_into(name, start + at, piece.view(np.uint8))
            if dtype == "BF16":
                widen(piece, values[at : at + len(piece)])
            else:
                values[at : at + len(piece)] = to_float32(piece, dtype)

    def fingerprint(self) -> str:
        """See Checkpoint: that of the base, the bytes of the adapter, and what each of its tensors does."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        does = [[name, *astuple(change)] for name, change in sorted(self.changes.items())]
        text = json.dumps(["adapted 1", self.inner.fingerprint(), self._file.hash(), does])
        return hashlib.sha256(text.encode()).hexdigest()

    def _unlike_twins(self, found: Changes) -> list[str]:
        return [
            f"'{one}' and '{other}' differ, and the base ties them"
            for one, other in found.twins
            if not self._equal(one, other)
        ]

    def _equal(self, one: str, other: str) -> bool:
        elements = self._file.tensors[one].elements
        parts = [(at, min(PIECE, elements - at)) for at in range(0, elements, PIECE)]
        return self._file.tensors[one].shape == self._file.tensors[other].shape and all(
            np.array_equal(self._file.values(one, *part), self._file.values(other, *part)) for part in parts
        )


def adapted_model(checkpoint: Checkpoint) -> AdaptedModel | None:
    """The adapter on a base that `checkpoint` is or shows; None for a model without one."""
    shown: Checkpoint | None = checkpoint
    while isinstance(shown, Wrapped):
        if isinstance(shown, AdaptedModel):
            return shown
        shown = shown.inner
    return None
