"""A checkpoint shown with the rows of another vocabulary, read straight from the files that have them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...errors import IncompatibleModelsError
from ...records import TensorSpec
from ..formats import FLOATS, ITEM_SIZES, to_float32
from ..source import Checkpoint, Wrapped
from .rows import FILL, MEAN, ZERO, RowTable


class AlignedModel(Wrapped):
    """A model whose tensors with vocabulary rows have the rows of the output, in its order; all others are as they are.

    Rows that lie side by side are read at once; nothing is kept but the table of row numbers, and one mean row where the output is
    longer than any model. Means are formed in float64 and shown as float32: the dtype of a tensor is F32 where any of its rows is a
    mean, or comes from a model that stores another dtype. Pieces of any size give the same bytes.
    """

    def __init__(
        self, inner: Checkpoint, table: RowTable, models: Sequence[tuple[Checkpoint, int]], names: Sequence[str]
    ) -> None:
        """`models` are what the table's places mean, each with its number of rows; `names` are the tensors to align."""
        super().__init__(inner)
        self._table, self._models = table, [model for model, _ in models]
        self._rows = [rows for _, rows in models]
        self._fills: dict[str, NDArray[np.float32]] = {}
        self._filling = threading.Lock()
        read_from = {place for place in np.unique(table.source).tolist() if place >= 0}
        read_from |= {place for pairs in table.means.values() for place, _ in pairs}
        computed = bool(np.isin(table.source, (MEAN, FILL)).any())
        self._specs: dict[str, TensorSpec] = {}
        for name in names:
            own = inner.tensors[name]
            found = {self._checked(place, name, own).dtype for place in read_from}
            dtype = "F32" if computed or found - {own.dtype} else own.dtype
            self._specs[name] = TensorSpec(name, dtype, (len(table.row), *own.shape[1:]))
        self._tensors = {**inner.tensors, **self._specs}

    def _checked(self, place: int, name: str, own: TensorSpec) -> TensorSpec:
        """The tensor that a model gives rows for; raises IncompatibleModelsError if it has none like it."""
        other = self._models[place]
        spec = other.tensors.get(name)
        fits = spec is not None and spec.shape == (self._rows[place], *own.shape[1:])
        if spec is None or not fits or spec.dtype not in FLOATS or own.dtype not in FLOATS:
            found = "it is missing" if spec is None else f"it is {spec.dtype} {list(spec.shape)}"
            raise IncompatibleModelsError(
                f"'{self.label}' lacks tokens, and '{other.label}' has no rows that could stand for them",
                where=f"tensor '{name}'",
                why=f"{found} in {other.label}, and {own.dtype} {list(own.shape)} in {self.label}",
                fix="merge models of one architecture and width, in float32, float16 or bfloat16",
            )
        return spec

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """See TensorSource."""
        return self._tensors

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """See TensorSource."""
        spec = self._specs.get(name)
        if spec is None:
            self.inner.read_into(name, start, out)
            return
        width = replace(spec, shape=spec.shape[1:]).elements
        item = ITEM_SIZES[spec.dtype]
        stop = start + len(out) // item
        for first, last in self._runs(start // width, -(-stop // width)) if width else ():
            low, high = max(first * width, start), min(last * width, stop)
            self._fill_run(name, spec, first, low - first * width, out[(low - start) * item : (high - start) * item])

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Rows from `first` to `last` in runs that lie side by side in one place; means stand alone."""
        source, row = self._table.source[first:last], self._table.row[first:last]
        breaks = (np.diff(source) != 0) | ((source[1:] >= 0) & (np.diff(row) != 1)) | (source[1:] <= MEAN)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), last - first]
        yield from ((first + a, first + b) for a, b in pairwise(edges) if b > a)

    def _fill_run(self, name: str, spec: TensorSpec, row: int, column: int, out: NDArray[np.uint8]) -> None:
        """The bytes of one run from `column` of its first row on."""
        source = int(self._table.source[row])
        width = replace(spec, shape=spec.shape[1:]).elements
        count = len(out) // ITEM_SIZES[spec.dtype]
        if source == ZERO:
            out[:] = 0
        elif source >= 0:
            start = int(self._table.row[row]) * width + column
            model = self._models[source]
            if model.tensors[name].dtype == spec.dtype:
                model.read_into(name, start, out)
            else:
                out.view(np.float32)[:] = self._float32(source, name, start, count)
        elif source == MEAN:
            pairs = self._table.means[row]
            total = np.zeros(count, np.float64)
            for place, other_row in pairs:
                total += self._float32(place, name, other_row * width + column, count)
            out.view(np.float32)[:] = total / len(pairs)
        else:
            out.view(np.float32)[:] = self._mean_of_tokens(name, width)[column : column + count]

    def _float32(self, place: int, name: str, start: int, count: int) -> NDArray[np.float32]:
        model = self._models[place]
        return to_float32(model.read(name, start, count), model.tensors[name].dtype)

    def _mean_of_tokens(self, name: str, width: int) -> NDArray[np.float32]:
        """The mean of all rows of tokens: what stands in rows beyond every model's, as in mergekit. One pass, once."""
        with self._filling:
            if name not in self._fills:
                total = np.zeros(width, np.float64)
                for at in np.flatnonzero(self._table.is_token).tolist():
                    row = np.empty(width * 4, np.uint8)
                    self.read_into(name, at * width, row)
                    total += row.view(np.float32)
                self._fills[name] = (total / int(self._table.is_token.sum())).astype(np.float32)
            return self._fills[name]
