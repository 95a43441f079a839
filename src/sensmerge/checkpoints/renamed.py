"""A checkpoint under other tensor names: other prefixes, aliases for what is tied, without buffers that are computed on loading."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import TensorSpec
from .families import NAMING
from .source import Checkpoint, Wrapped

_RECOMPUTED = tuple((re.compile(each["name"]), tuple(each["shape"])) for each in NAMING["recomputed"])


class RenamedModel(Wrapped):
    """A checkpoint that shows the tensors of another under the names of `own`: a map of names shown to names stored.

    A stored tensor may be shown twice (an embedding that is the head as well); one that is not named is hidden. `config`
    replaces that of the model.
    """

    def __init__(self, inner: Checkpoint, own: Mapping[str, str], config: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner)
        self._own = dict(own)
        self._config = inner.config if config is None else config
        self._tensors = {name: replace(inner.tensors[stored], name=name) for name, stored in self._own.items()}

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """See TensorSource."""
        return self._tensors

    @property
    def config(self) -> Mapping[str, Any]:
        """See Checkpoint."""
        return self._config

    @property
    def shows_twice(self) -> bool:
        """Whether some stored tensor is shown under two names."""
        return len(set(self._own.values())) < len(self._own)

    def stored_dtype(self, name: str) -> str:
        """See Checkpoint."""
        return self.inner.stored_dtype(self._own[name])

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """See TensorSource."""
        self.inner.read_into(self._own[name], start, out)


def is_recomputed(spec: TensorSpec) -> bool:
    """Whether a tensor is a buffer that a model computes when it is loaded: by its name and its shape, never by its name alone."""
    return any(pattern.search(spec.name) and _has_form(spec.shape, form) for pattern, form in _RECOMPUTED)


def _has_form(shape: tuple[int, ...], form: tuple[int | str, ...]) -> bool:
    """Whether a shape is as a form says: numbers are lengths, and equal letters equal lengths."""
    if len(shape) != len(form):
        return False
    letters: dict[str, int] = {}
    return all(
        length == (letters.setdefault(each, length) if isinstance(each, str) else each)
        for length, each in zip(shape, form, strict=True)
    )


def _parts(name: str) -> tuple[str, str]:
    """The known prefix of a name (empty if it has none) and the rest, in the spelling of today."""
    prefix = next((prefix for prefix in NAMING["prefixes"] if name.startswith(prefix)), "")
    rest = name[len(prefix) :]
    for old, new in NAMING["spellings"]:
        if rest.endswith(old):
            rest = rest[: -len(old)] + new
    return prefix, rest


def names_like(names: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """What each of `names` is called where the tensors are called as in `wanted`: other prefixes and older spellings are known.

    A name without a counterpart gets the prefix that its kind has there (the blocks of a deeper model), or stays as it is. No two
    names become one: then all stay.
    """
    names, wanted = list(names), set(wanted)
    if wanted == set(names):
        return {name: name for name in names}
    theirs: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        theirs[_parts(name)[1]].append(name)
    found = {name: name for name in names if name in wanted}
    # What the prefix of a kind of tensor (`h`, `wte`) becomes: one answer, or none.
    prefixes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in names:
        prefix, rest = _parts(name)
        if name not in found and len(theirs[rest]) == 1:
            found[name] = theirs[rest][0]
        if name in found:
            prefixes[prefix, rest.partition(".")[0]].add(_parts(found[name])[0])
    for name in names:
        if name not in found:
            prefix, rest = _parts(name)
            becomes = prefixes[prefix, rest.partition(".")[0]]
            found[name] = next(iter(becomes)) + name[len(prefix) :] if len(becomes) == 1 else name
    return found if len(set(found.values())) == len(found) else {name: name for name in names}
