"""What merge.json says of a folder: the hashes of its files, and where its models were looked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash

from ..errors import InputFileError
from ..records import Recipe
from .models import search_folders

RECORD = Path("sensmerge") / "merge.json"
# Files beside the weights, by how they end. A model card is for people to edit.
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".yml")
_READ_BYTES = 1 << 20


def hash_of_file(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """XXH3-128 (hex) of a file; `advance` is told of every byte. Raises InputFileError."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                advance(len(piece))
    except OSError as error:
        raise InputFileError(
            "this file cannot be read",
            where=str(path),
            why=str(error),
            fix="restore the file and run the command again",
        ) from error
    return digest.hexdigest()


def companion_files(folder: Path) -> list[str]:
    """The files of a merged model beside its weights, its card and merge.json, relative to `folder`, sorted."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix in _SUFFIXES]
    names = [path.relative_to(folder) for path in found]
    return sorted(
        str(name) for name in names if name != RECORD and not any(part.startswith(".") for part in name.parts)
    )


def companion_hashes(folder: Path) -> dict[str, str]:
    """XXH3-128 (hex) of the files beside the weights."""
    return {name: hash_of_file(folder / name) for name in companion_files(folder)}


def searched(recipe: Recipe, labels: Iterable[str], folder: Path) -> list[str]:
    """The folders that lead from the relative paths among `labels` to models, relative to `folder`, the merged model's.

    Relative, so that recipe, models and result can be moved together; a merge of hub ids names no folder at all.
    """
    parts = [Path(part).expanduser() for label in labels for part in (label, *label.split("+"))]
    relative = [part for part in parts if not part.is_absolute()]
    used = [each for each in search_folders(recipe) if any((each / part).is_dir() for part in relative)]
    here = folder.resolve()
    return list(dict.fromkeys(os.path.relpath(each, here) for each in used))
