"""A Hugging Face checkpoint folder on this machine: config.json and weights, read with `pread`."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputFileError
from ..records import TensorSpec
from . import files
from .containment import check_files
from .fingerprint import fingerprint_of
from .formats import ITEM_SIZES, Raw
from .header import StoredTensor
from .quantised import refuse_quantised
from .shards import find_tensors
from .source import read_through


class ModelFolder:
    """A Hugging Face checkpoint folder: config.json and weights, in one file or in shards with an index.

    The weights are safetensors, or pickle files where `allow_pickle` says so; `allow` are names of checks that are switched off.
    Files are read with `pread`, never mapped: a file that shrinks while it is read is an error, not a crash. Raises
    InputFileError for a missing or damaged file, IncompatibleModelsError for formats that cannot be merged.
    """

    def __init__(
        self, path: Path, label: str | None = None, allow: frozenset[str] = frozenset(), allow_pickle: bool = False
    ) -> None:
        self.path = path
        self.label = label or str(path)
        check_files(path, self.label, allow)
        self.config = self._read_config()
        stored = find_tensors(path, self.label, allow, allow_pickle)
        self._stored = {tensor.spec.name: tensor for tensor in stored}
        self.tensors: Mapping[str, TensorSpec] = {name: stored.spec for name, stored in self._stored.items()}
        refuse_quantised(self.label, path, self.config, self.tensors)
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._fingerprint: str | None = None

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    @property
    def tokenizer_path(self) -> Path:
        """See Checkpoint."""
        return self.path

    @property
    def folders(self) -> tuple[Path, ...]:
        """See Checkpoint."""
        return (self.path,)

    def stored_dtype(self, name: str) -> str:
        """See Checkpoint."""
        return self.tensors[name].dtype

    def read(self, name: str, start: int, count: int) -> Raw:
        """See TensorSource. Raises InputFileError if the file has become shorter, KeyError for an unknown tensor."""
        return read_through(self, name, start, count)

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """See TensorSource. Raises InputFileError if the file has become shorter, KeyError for an unknown tensor."""
        stored = self._stored[name]
        self._pread(stored, start * ITEM_SIZES[stored.spec.dtype], out.data)

    def fingerprint(self) -> str:
        """See Checkpoint."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self)
        return self._fingerprint

    def _pread(self, stored: StoredTensor, offset: int, view: memoryview) -> None:
        descriptor = self._open(stored.file)
        done = 0
        while done < len(view):
            try:
                got = files.read_into(descriptor, view[done:], stored.offset + offset + done)
            except OSError as error:
                raise InputFileError(
                    "this file of the model cannot be read",
                    where=f"{stored.file}, tensor '{stored.spec.name}'",
                    why=str(error),
                    fix="check the disk or the network folder that holds it, then run the same command again",
                ) from error
            if got == 0:
                raise InputFileError(
                    "this file has become shorter while it was read",
                    where=f"{stored.file}, tensor '{stored.spec.name}'",
                    why=f"{len(view) - done} bytes at {stored.offset + offset + done} are missing",
                    fix="restore the file and run the command again",
                )
            done += got

    def _open(self, file: Path) -> int:
        descriptor = self._descriptors.get(file)
        if descriptor is not None:
            return descriptor
        # Two threads that open one file at once must not lose a descriptor.
        with self._opening:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise InputFileError(
                        "cannot open this file of the model any more",
                        where=str(file),
                        why=str(error),
                        fix="restore the file and run the command again",
                    ) from error
            return self._descriptors[file]

    def _read_config(self) -> dict[str, Any]:
        config = self.path / "config.json"
        try:
            data = json.loads(config.read_text(encoding="utf-8"))
            # Half a surrogate pair could not be written again.
            json.dumps(data, ensure_ascii=False).encode()
        except (OSError, ValueError, RecursionError) as error:
            raise InputFileError(
                f"'{self.label}' is not a model folder",
                where=str(config),
                why=str(error),
                fix="give a folder with config.json and model.safetensors, as `save_pretrained` writes it",
            ) from error
        if not isinstance(data, dict):
            raise InputFileError(
                f"'{self.label}' has a config.json that is not a JSON object",
                where=str(config),
                why=f"found {type(data).__name__}",
                fix="save the model again",
            )
        return data
