"""A model's files lie in its own folder, are plain files, and are no larger than such files are.

A folder from a stranger must not make a merge read other files of this machine (a symbolic link), wait for ever (a pipe) or fill
the memory (a config.json of gigabytes).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputFileError
from .source import TOKENIZER_FILES

CONFIG_FILES = ("config.json", "generation_config.json", "adapter_config.json")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LARGEST = {
    **dict.fromkeys(CONFIG_FILES, 16 << 20),
    **dict.fromkeys(TOKENIZER_FILES, 1 << 30),
    **dict.fromkeys(INDEX_FILES, 128 << 20),
}
_SNAPSHOT = re.compile(r"(models--[^/]+)/snapshots/[^/]+")


def check_files(folder: Path, label: str, allow: frozenset[str] = frozenset(), weights: Sequence[str] = ()) -> None:
    """Config, tokenizer and index files of a folder, and its `weights`, can be read safely; every fault is listed.

    Raises InputFileError.
    """
    faults = [
        f"'{name}' {fault}" for name in (*LARGEST, *weights) if (fault := fault_of(folder, name, allow)) is not None
    ]
    if faults:
        raise InputFileError(
            f"'{label}' has files that are not read",
            where=str(folder),
            why="; ".join(faults),
            fix=remedy_of(faults, allow),
        )


def remedy_of(faults: Sequence[str], allow: frozenset[str]) -> str:
    """What to do about faults that `fault_of` told; `allow` are the checks that are switched off already."""
    if not any("link out of" in fault for fault in faults):
        return "download the model again"
    names = ", ".join(sorted({"symlinks"} | allow))
    return (
        "replace each link by a copy of its file, or, if you made the links yourself,"
        f" add `allow: [{names}]` to the recipe"
    )


def fault_of(folder: Path, name: str, allow: frozenset[str] = frozenset()) -> str | None:
    """Why a model's file is not to be read, None if it may be or is absent: a link out of the folder, no plain file, too large.

    A link may lead into the folder itself or, in a snapshot of the hub's cache, to the blobs of its repository.
    """
    path = folder / name
    try:
        state = path.stat()
    except FileNotFoundError:
        return "is a link to a file that does not exist" if path.is_symlink() else None
    except (OSError, ValueError) as error:
        return f"cannot be looked at: {getattr(error, 'strerror', None) or error}"
    if not stat.S_ISREG(state.st_mode):
        return "is no plain file"
    if path.is_symlink() and "symlinks" not in allow and not _inside(folder, path):
        return f"is a link out of the model's folder, to {path.resolve()}"
    if state.st_size > LARGEST.get(name, state.st_size):
        return f"has {state.st_size} bytes, more than such a file can need"
    return None


def _inside(folder: Path, link: Path) -> bool:
    """Whether a link ends in its own folder, or in the hub's cache where that keeps this repository's files."""
    home, target = folder.resolve(), link.resolve()
    if home in target.parents:
        return True
    if _SNAPSHOT.fullmatch("/".join(home.parts[-3:])) is None:
        return False
    repository = home.parent.parent
    # A file that several repositories share is itself a link, from the repository's blobs to the cache's.
    return repository / "blobs" in target.parents or (
        _first_step(link).parent == repository / "blobs" and repository.parent / "blobs" in target.parents
    )


def _first_step(link: Path) -> Path:
    """Where a link points, its own last part not followed."""
    there = link.parent.resolve() / os.readlink(link)  # noqa: PTH115  # as text: the next link stays unresolved
    return there.parent.resolve() / there.name
