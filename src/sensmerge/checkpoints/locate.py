"""From a `model:` string to a folder on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputFileError


def locate(name: str, folders: Sequence[Path], *, where: str) -> Path:
    """The folder `name` means: absolute, else relative to the first of `folders` that has it.

    Raises InputFileError naming every place that was tried; `where` says which line asked for it.
    """
    tried = [(folder / Path(name).expanduser()) for folder in folders]
    found = next((path for path in tried if path.is_dir()), None)
    if found is not None:
        return found.resolve()
    places = ", ".join(dict.fromkeys(str(path) for path in tried))
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    local = Path(name).name.partition("@")[0]
    raise InputFileError(
        f"there is no model folder '{name}'",
        where=where,
        why=f"tried {places}",
        fix=f"if this is a hub id: `hf download {name.partition('@')[0]} --local-dir {local}`, then write `{local}`"
        if looks_like_hub_id
        else "write the path of a folder with config.json and model.safetensors",
    )
