"""The calibration data of a recipe: each file is found, hashed and read at most once in a run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..calibration.data_sets import folder_files
from ..calibration.hub_data import Asked, hub_files, is_hub_id
from ..calibration.samples import Sample, read_samples
from ..records import Recipe, SensSource
from .models import find_file, local_places, source_of

# What names data: path, configuration, split, revision.
_Named = tuple[str | None, str | None, str | None, str | None]


def find_data(recipe: Recipe, source: SensSource, line: int) -> tuple[Path, ...]:
    """The files of a model's `data:`: a file, a folder's split, or that of a data set on the hub, in this order.

    Raises CalibrationDataError; asks the hub only where nothing local has the name.
    """
    assert source.data is not None
    places = local_places(recipe, source.data)
    where = recipe.where(line)
    for path in places:
        if path.is_file():
            return (path,)
        if path.is_dir():
            return folder_files(path, source.name, source.split, label=source.data, where=where)
    if is_hub_id(source.data, named=source.name is not None or source.split is not None):
        tried = ", ".join(dict.fromkeys(str(path) for path in places))
        return hub_files(Asked(source.data, source.name, source.split, source.revision, where, tried))
    return (find_file(recipe, source.data, line),)


class CalibrationData:
    """The data of every expert that names some, by its place in the recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._files: dict[_Named, tuple[Path, ...]] = {}
        self._hashes: dict[Path, str] = {}
        self._samples: dict[tuple[tuple[Path, ...], tuple[tuple[str, str], ...]], list[Sample]] = {}

    def files(self, index: int) -> tuple[Path, ...]:
        """The files of expert `index`. Raises CalibrationDataError."""
        source = source_of(self._recipe, index)
        key = (source.data, source.name, source.split, source.revision)
        if key not in self._files:
            self._files[key] = find_data(self._recipe, source, self._recipe.models[index].line)
        return self._files[key]

    def hash(self, index: int) -> str:
        """SHA-256 of the bytes of expert `index`'s files. Cost: one pass over them."""
        hashes = [self._hash_of(path) for path in self.files(index)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def _hash_of(self, path: Path) -> str:
        if path not in self._hashes:
            with path.open("rb") as file:
                self._hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[path]

    def samples(self, index: int) -> list[Sample]:
        """All rows of expert `index`'s data. Raises CalibrationDataError."""
        fields = source_of(self._recipe, index).fields
        key = self.files(index), tuple(sorted(fields.items()))
        if key not in self._samples:
            self._samples[key] = read_samples(self.files(index), fields)
        return self._samples[key]
