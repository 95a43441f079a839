"""From a `model:` string to an open checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .folder import ModelFolder
from .locate import Located, locate
from .lora.loading import is_bare_adapter, open_adapted, split_name
from .source import Checkpoint


@dataclass(frozen=True)
class Opening:
    """How models are opened: the folders in which relative paths are tried, in order, and what the user allowed.

    `allow` are names of checks that were switched off, `allow_pickle` says that pickle files may be read. `located` is what was
    found so far: the hub is asked once for each name.
    """

    folders: Sequence[Path]
    allow: frozenset[str] = frozenset()
    allow_pickle: bool = False
    located: dict[tuple[str, bool], Located] = field(default_factory=dict, compare=False)

    @property
    def commits(self) -> dict[str, str]:
        """The commit of every model that came from the hub, by its `model:` string."""
        return {name: found.commit for (name, _), found in self.located.items() if found.commit is not None}

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
        return ModelFolder(folder, name, self.allow, self.allow_pickle)

    def folder(self, name: str, *, where: str, weights: bool = True) -> Path:
        """The folder on this machine that `name` means, downloaded if it is the hub's (without `weights`: its small files alone).

        Raises InputFileError naming every place that was tried, ResourceError if a download finds no room.
        """
        key = name, weights
        if key not in self.located:
            self.located[key] = locate(name, self.folders, where=where, weights=weights, allow_pickle=self.allow_pickle)
        return self.located[key].path
