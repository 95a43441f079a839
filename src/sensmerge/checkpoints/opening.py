"""From a `model:` string to an open checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .folder import ModelFolder
from .locate import locate
from .source import Checkpoint


@dataclass(frozen=True)
class Opening:
    """How models are opened: the folders in which relative paths are tried, in order, and what the user allowed.

    `allow` are names of checks that were switched off, `allow_pickle` says that pickle files may be read.
    """

    folders: Sequence[Path]
    allow: frozenset[str] = frozenset()
    allow_pickle: bool = False

    def open(self, name: str, *, where: str) -> Checkpoint:
        """The model that `name` means; reads config and headers. `where` says which line asked for it.

        Raises InputFileError naming every place that was tried, IncompatibleModelsError for formats that cannot be merged.
        """
        return ModelFolder(self.folder(name, where=where), name)

    def folder(self, name: str, *, where: str) -> Path:
        """The folder on this machine that `name` means. Raises InputFileError naming every place that was tried."""
        return locate(name, self.folders, where=where)
