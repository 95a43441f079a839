"""Whether a base is the one that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ... import progress
from ...errors import IncompatibleModelsError, SensmergeError
from ..source import Checkpoint
from .config import AdapterConfig

ALLOW = "adapter_base"


def check_base(
    config: AdapterConfig,
    base: Checkpoint,
    name: str,
    folders: Sequence[Path],
    open_model: Callable[[Path], Checkpoint],
    allow: frozenset[str] = frozenset(),
) -> None:
    """`base` is what the adapter was trained on; raises IncompatibleModelsError otherwise.

    `allow` are the checks that were switched off. Compared are folders, else (where the adapter names a folder that exists)
    fingerprints, else the last components of the names.
    """
    if config.base is None:
        progress.message(
            f"{name}: its adapter_config.json names no base, so nothing tells whether this is the right one"
        )
        return
    place = next((path for folder in folders if (path := folder / Path(config.base).expanduser()).is_dir()), None)
    if place is not None and place.resolve() == base.path.resolve():
        return
    trained = None if place is None else _opened(place, open_model)
    if trained is not None:
        try:
            same = trained.fingerprint() == base.fingerprint()
        finally:
            trained.close()
        if not same:
            why = f"it was trained on {config.base}, whose weights differ from those of {base.label}"
            raise _refused(config, base, name, why, allow)
        return
    named, _, label_revision = base.label.partition("@")
    names = {
        _last(named),
        _last(str(base.path)),
        _last(str(base.config.get("_name_or_path") or "")),
        _cached(base.path),
    }
    if _last(config.base.partition("@")[0]) not in names - {""}:
        why = f"it was trained on {config.base}, and the base given is {base.label}"
        raise _refused(config, base, name, why, allow)
    if config.revision is not None and label_revision and label_revision != config.revision:
        why = f"it was trained on revision {config.revision} of {config.base}, and the base given is {base.label}"
        raise _refused(config, base, name, why, allow)


def _opened(place: Path, open_model: Callable[[Path], Checkpoint]) -> Checkpoint | None:
    """The model in a folder that an adapter names; None if there is none by now, so that only the name can be compared."""
    try:
        return open_model(place)
    except SensmergeError:
        return None


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _cached(path: Path) -> str:
    """The model's name in the hub's cache (models--org--name/snapshots/…); empty elsewhere."""
    parts = [part for part in path.parts if part.startswith("models--")]
    return parts[-1].rpartition("--")[2].casefold() if parts else ""


def _refused(
    config: AdapterConfig, base: Checkpoint, name: str, why: str, allow: frozenset[str]
) -> IncompatibleModelsError:
    return IncompatibleModelsError(
        f"the adapter of '{name}' was trained on another base",
        where=str(config.path),
        why=why,
        fix=f"write the base that it names, or, if both are one model, "
        f"add `allow: [{', '.join(sorted({ALLOW} | allow))}]` to the recipe",
    )
