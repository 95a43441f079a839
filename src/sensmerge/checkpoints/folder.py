"""A Hugging Face checkpoint folder on this machine: config.json and safetensors, read with `pread`."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import IncompatibleModelsError, InputFileError
from ..records import TensorSpec
from . import files
from .fingerprint import fingerprint_of
from .formats import ITEM_SIZES, Raw
from .header import StoredTensor, read_header
from .source import read_through


class ModelFolder:
    """A Hugging Face checkpoint folder: config.json and safetensors, in one file or in shards with an index.

    Files are read with `pread`, never mapped: a file that shrinks while it is read is an error, not a crash. Raises
    InputFileError for a missing or damaged file, IncompatibleModelsError for formats that cannot be merged.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self.label = label or str(path)
        self.config = self._read_config()
        self._stored = {tensor.spec.name: tensor for tensor in self._find_tensors()}
        self.tensors: Mapping[str, TensorSpec] = {name: stored.spec for name, stored in self._stored.items()}
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
        if data.get("quantization_config") is not None:
            raise IncompatibleModelsError(
                f"'{self.label}' is a quantised checkpoint",
                where=str(config),
                why="quantised weights cannot be merged without loss: config.json has 'quantization_config'",
                fix="use the unquantised checkpoint",
            )
        return data

    def _find_tensors(self) -> Iterator[StoredTensor]:
        index = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if index.exists() and not single.exists():
            yield from self._indexed(index)
            return
        if not single.exists():
            pickles = sorted(path.name for path in self.path.glob("pytorch_model*.bin"))
            raise InputFileError(
                f"'{self.label}' has no safetensors weights",
                where=str(self.path),
                why=f"pickle files ({pickles[0]}) can run code when read"
                if pickles
                else "model.safetensors is missing",
                fix="save the model with `save_pretrained(folder)`, which writes model.safetensors",
            )
        yield from read_header(single)

    def _indexed(self, index: Path) -> Iterator[StoredTensor]:
        """The tensors of all shards; every fault of index and shards is listed at once."""
        weight_map = _read_weight_map(index)
        faults: list[str] = []
        found: dict[str, StoredTensor] = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or file in ("", ".", ".."):
                faults.append(f"shard '{file}' lies outside the folder")
            elif not (self.path / file).is_file():
                faults.append(f"shard '{file}' is missing")
            else:
                try:
                    tensors = read_header(self.path / file)
                except InputFileError as error:
                    faults.append(f"shard '{file}' is damaged: {error.why}")
                    continue
                faults += [f"'{t.spec.name}' lies in two shards" for t in tensors if t.spec.name in found]
                found |= {tensor.spec.name: tensor for tensor in tensors}
        readable = {file for file in weight_map.values() if not any(f"'{file}'" in fault for fault in faults)}
        for name, file in sorted(weight_map.items()):
            if file in readable and name not in found:
                faults.append(f"'{name}' is in the index but in no shard")
            elif file in readable and found[name].file.name != file:
                faults.append(f"'{name}' is in shard '{found[name].file.name}', not in '{file}' as the index says")
        faults += [f"'{name}' is in a shard but not in the index" for name in sorted(found.keys() - weight_map.keys())]
        if faults:
            raise InputFileError(
                f"'{self.label}' has {len(faults)} fault(s) in its shards",
                where=str(index),
                why="; ".join(faults),
                fix="download the model again",
            )
        yield from found.values()


def _read_weight_map(index: Path) -> dict[str, str]:
    """The index's map of tensor names to shard files."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("weight_map must map tensor names to file names, and name at least one")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputFileError(
            "this index of shards cannot be read", where=str(index), why=repr(error), fix="download the file again"
        ) from error
    return dict(weight_map)
