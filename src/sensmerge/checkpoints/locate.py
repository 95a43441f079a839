"""From a `model:` string to a folder on this machine: a folder of that name, else the hub's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import progress
from ..errors import InputFileError
from ..registry import suggestion
from .hub import fetch, hub_name


@dataclass(frozen=True)
class Located:
    """Where a model was found, and the commit for one of the hub's."""

    path: Path
    commit: str | None = None


def locate(
    name: str, folders: Sequence[Path], *, where: str, weights: bool = True, allow_pickle: bool = False
) -> Located:
    """The folder `name` means: absolute, else relative to the first of `folders` that has it, else the hub's model of that name.

    A folder always wins. Without `weights` a hub model's config and tokenizer are fetched alone. Raises InputFileError naming
    every place that was tried, ResourceError if a download finds no room; `where` says which line asked for it.
    """
    tried = [folder / _at_home(name) for folder in folders]
    found = next((path for path in tried if _is_folder(path)), None)
    if found is not None:
        return Located(found.resolve())
    near = _near(name, tried)
    places = ", ".join(dict.fromkeys(str(path) for path in tried)) + (f" (is there: '{near}')" if near else "")
    on_hub = hub_name(name)
    if on_hub is None:
        raise InputFileError(
            f"there is no model folder '{name}'",
            where=where,
            why=f"tried {places}",
            fix=f"did you mean '{near}'?"
            if near
            else "write the path of a folder with config.json and model.safetensors, or a hub id: org/name or org/name@revision",
        )
    path = fetch(on_hub, where=where, tried=places, weights=weights, allow_pickle=allow_pickle)
    progress.message(f"'{name}' is the hub's, commit {path.name}, in {path}")
    return Located(path, path.name)


def _near(name: str, tried: Sequence[Path]) -> str | None:
    """The folder beside those that were tried whose name is most like theirs, written as `name` is."""
    for path in tried:
        try:
            known = {each.name.lower(): each.name for each in path.parent.iterdir() if each.is_dir()}
        except OSError:
            continue
        close = suggestion(path.name, known)
        if close is not None:
            return f"{name.rpartition('/')[0]}/{known[close]}".lstrip("/" if "/" not in name else "")
    return None


def _at_home(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        # There is no user of that name: the tilde is part of a file's name.
        return Path(name)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # A name that is too long, or a folder that may not be looked into.
        return False
