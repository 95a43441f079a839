"""From a `model:` string and an adapter's folder to the adapted model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ...errors import IncompatibleModelsError, InputFileError
from ..containment import check_files
from ..source import Checkpoint
from .adapted import AdaptedModel, adapted_model
from .base import ALLOW, check_base
from .config import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, AdapterConfig, read_config
from .factors import AdapterFile
from .remedies import converting_command, remedy

_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def is_bare_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG_FILE).is_file() and not any((folder / name).exists() for name in _MODEL_FILES)


def split_name(name: str, folders: Sequence[Path], *, where: str) -> tuple[str, str] | None:
    """The base and the adapter in `base+adapter`; None for the name of one model.

    A folder whose own name has a '+' wins; of several '+' the one that leaves two folders divides. Raises InputFileError if none
    does.
    """

    def exists(part: str) -> bool:
        return any((folder / Path(part).expanduser()).is_dir() for folder in folders)

    cuts = [(name[: cut.start()], name[cut.end() :]) for cut in re.finditer(r"\+", name)]
    cuts = [(base, adapter) for base, adapter in cuts if base and adapter]
    if not cuts or exists(name):
        return None
    found = next((cut for cut in cuts if exists(cut[0]) and exists(cut[1])), None)
    if found is None and len(cuts) > 1:
        raise InputFileError(
            f"'{name}' is no base with one adapter",
            where=where,
            why="one adapter can be added to a model at a time, and no '+' stands between two folders",
            fix="merge the first adapter into its base with `sensmerge merge`, and write that folder before the last `+`",
        )
    return found or cuts[0]


def weights_file(folder: Path, name: str) -> Path:
    """adapter_model.safetensors in `folder`; raises InputFileError if the folder is no adapter or has pickled weights only."""
    if not (folder / CONFIG_FILE).is_file():
        raise InputFileError(
            f"'{name}' is not a LoRA adapter",
            where=str(folder / CONFIG_FILE),
            why="there is no such file",
            fix="write `base+adapter` with a folder that has adapter_config.json and adapter_model.safetensors",
        )
    file = folder / WEIGHTS_FILE
    pickled = folder / PICKLE_FILE
    if not file.is_file() and pickled.is_file():
        raise InputFileError(
            f"the adapter '{name}' has no safetensors weights",
            where=str(pickled),
            why="pickle files can run code when read",
            fix=converting_command(pickled, file),
        )
    if not file.is_file():
        raise InputFileError(
            f"the adapter '{name}' has no weights",
            where=str(file),
            why="there is no such file",
            fix="save the adapter again with PEFT's `save_pretrained(folder)`",
        )
    return file


class Opens(Protocol):
    """What is needed of the one who opens models (checkpoints.opening.Opening)."""

    @property
    def folders(self) -> Sequence[Path]:
        """Where relative paths are tried."""

    @property
    def allow(self) -> frozenset[str]:
        """Checks that were switched off."""

    def open(self, name: str, *, where: str) -> Checkpoint:
        """The model that a name means."""

    def folder(self, name: str, *, where: str) -> Path:
        """The folder that a name means."""


def open_adapted(opening: Opens, base: str | None, adapter: Path, name: str, *, where: str) -> AdaptedModel:
    """The adapter in the folder `adapter` on the model `base`; on the one that it names where `base` is None.

    Raises InputFileError for files that are missing or damaged, IncompatibleModelsError for an adapter that is no plain LoRA, that
    was trained on another base, or that does not fit.
    """
    check_files(adapter, name, opening.allow, weights=(WEIGHTS_FILE,))
    file = weights_file(adapter, name)
    config = read_config(adapter)
    folder = _base_folder(opening, config, name, where) if base is None else opening.folder(base, where=where)
    if config.refused:
        raise IncompatibleModelsError(
            f"the adapter of '{name}' is no plain LoRA",
            where=str(config.path),
            why="; ".join(config.refused),
            fix=remedy(config, folder, adapter),
        )
    tensors = AdapterFile(file)
    model = opening.open(str(folder) if base is None else base, where=where) if not is_bare_adapter(folder) else None
    if model is None or adapted_model(model) is not None:
        raise IncompatibleModelsError(
            f"the base of '{name}' is an adapter itself",
            where=str(folder),
            why="one adapter can be added to a model at a time",
            fix="merge the first adapter into its base with `sensmerge merge`, and write that folder before the `+`",
        )
    try:
        if base is not None and ALLOW not in opening.allow:
            places = [*opening.folders, adapter]
            check_base(config, model, name, places, lambda at: opening.open(str(at), where=where), opening.allow)
        return AdaptedModel(model, config, tensors, name)
    except BaseException:
        model.close()
        raise


def _base_folder(opening: Opens, config: AdapterConfig, name: str, where: str) -> Path:
    """The folder of the base that an adapter names; raises InputFileError telling how to name it in the recipe."""
    what, why = f"the adapter '{name}' does not name its base", "base_model_name_or_path is empty"
    if config.base is not None:
        try:
            here = any((folder / Path(config.base).expanduser()).is_dir() for folder in opening.folders)
            revised = "" if here or config.revision is None or "@" in config.base else f"@{config.revision}"
            return opening.folder(config.base + revised, where=where)
        except InputFileError as error:
            what, why = f"the base of the adapter '{name}' was not found: {error.what}", error.why
    raise InputFileError(
        what,
        where=f"base_model_name_or_path in {config.path}",
        why=why,
        fix=f"write the base before it: `model: BASE+{name}`",
    )
