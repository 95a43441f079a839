"""From a `model:` string to an open checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .folder import ModelFolder
from .locate import locate
from .lora.loading import is_bare_adapter, open_adapted, split_name
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
        """The model that `name` means: a folder, `base+adapter`, or an adapter's folder alone; reads config and headers.

        `where` says which line asked for it. Raises InputFileError naming every place that was tried, IncompatibleModelsError for
        formats that cannot be merged and adapters of another base.
        """
        parts = split_name(name, self.folders, where=where)
        if parts is not None:
            return open_adapted(self, parts[0], self.folder(parts[1], where=where), name, where=where)
        folder = self.folder(name, where=where)
        if is_bare_adapter(folder):
            return open_adapted(replace(self, folders=[*self.folders, folder]), None, folder, name, where=where)
        return ModelFolder(folder, name)

    def folder(self, name: str, *, where: str) -> Path:
        """The folder on this machine that `name` means. Raises InputFileError naming every place that was tried."""
        return locate(name, self.folders, where=where)
