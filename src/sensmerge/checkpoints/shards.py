"""The tensors of a model folder, in one file or in shards with an index; every fault of index and shards is listed at once."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputFileError, escaped
from .containment import fault_of, remedy_of
from .header import StoredTensor, read_header
from .pickled import read_pickles

# So many faults are told one by one; a hostile index can hold millions.
SHOWN_FAULTS = 200
Reader = Callable[[Sequence[Path]], dict[Path, list[StoredTensor] | InputFileError]]

# One process, in one line that can be pasted; `weights_only` runs nothing that is in the files.
CONVERT = (
    'python -c "import glob,sys,torch,safetensors.torch as s; d=sys.argv[1]; w={}; '
    "[w.update(torch.load(f,map_location='cpu',weights_only=True)) for f in sorted(glob.glob(d+'/pytorch_model*.bin'))]; "
    "s.save_file({k:v.detach().clone().contiguous() for k,v in w.items()},d+'/model.safetensors',{'format':'pt'})\""
)


def find_tensors(folder: Path, label: str, allow: frozenset[str], allow_pickle: bool) -> list[StoredTensor]:
    """Where every tensor of a model folder lies: safetensors, else pickle files if they are allowed.

    A single file wins over an index, as in transformers. Raises InputFileError listing every fault. Reads headers only.
    """
    for stem, end, read in (("model", ".safetensors", _headers), ("pytorch_model", ".bin", read_pickles)):
        single, index = folder / f"{stem}{end}", folder / f"{stem}{end}.index.json"
        if not _there(single) and not _there(index):
            continue
        if read is read_pickles and not allow_pickle:
            break
        if _there(single):
            return _single(single, label, allow, read)
        return _Shards(folder, label, allow, read).tensors(index)
    raise _no_weights(folder, label, allow_pickle)


def _there(path: Path) -> bool:
    """Whether something has this name, if only a link that leads nowhere."""
    return path.is_symlink() or path.exists()


def _no_weights(folder: Path, label: str, allow_pickle: bool) -> InputFileError:
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles and allow_pickle:
        return InputFileError(
            f"'{label}' has shards of pickled weights without their index",
            where=str(folder),
            why=f"pytorch_model.bin.index.json is missing beside {escaped(pickles[0])}",
            fix=f"download the index, or convert the files once: {CONVERT} {shlex.quote(str(folder))}",
        )
    if pickles:
        return InputFileError(
            f"'{label}' has no safetensors weights",
            where=str(folder),
            why=f"pickle files ({escaped(pickles[0])}) can run code when they are read",
            fix=f"convert it once: {CONVERT} {shlex.quote(str(folder))}\n"
            "         or add `--allow-pickle` to the command: the files are read without running what is in them",
        )
    return InputFileError(
        f"'{label}' has no safetensors weights",
        where=str(folder),
        why="model.safetensors is missing",
        fix="save the model with `save_pretrained(folder)`, which writes model.safetensors",
    )


def _headers(files: Sequence[Path]) -> dict[Path, list[StoredTensor] | InputFileError]:
    """The tensors of safetensors files, or what is wrong with each."""
    found: dict[Path, list[StoredTensor] | InputFileError] = {}
    for file in files:
        try:
            found[file] = read_header(file)
        except InputFileError as error:
            found[file] = error
    return found


def _single(file: Path, label: str, allow: frozenset[str], read: Reader) -> list[StoredTensor]:
    fault = fault_of(file.parent, file.name, allow)
    if fault is not None:
        raise _faulty(label, file, [f"'{file.name}' {fault}"], allow)
    tensors = read([file])[file]
    if isinstance(tensors, InputFileError):
        raise tensors
    return tensors


class _Shards:
    """The shards that an index names, read and compared with it."""

    def __init__(self, folder: Path, label: str, allow: frozenset[str], read: Reader) -> None:
        self.folder, self.label, self.allow, self.read = folder, label, allow, read
        self.faults: list[str] = []

    def tensors(self, index: Path) -> list[StoredTensor]:
        """The tensors of all shards. Raises InputFileError listing every fault."""
        weight_map = _read_weight_map(index)
        names = sorted(set(weight_map.values()))
        sound = [name for name in names if self._is_sound(name)]
        found: dict[str, StoredTensor] = {}
        readable: set[str] = set()
        for path, tensors in self.read([self.folder / name for name in sound]).items():
            if isinstance(tensors, InputFileError):
                self.faults.append(f"shard {_shown(path.name)} is damaged: {tensors.why}")
                continue
            readable.add(path.name)
            self.faults += [f"{_shown(t.spec.name)} lies in two shards" for t in tensors if t.spec.name in found]
            found |= {tensor.spec.name: tensor for tensor in tensors}
        for name, file in sorted(weight_map.items()):
            if file not in readable:
                continue
            if name not in found:
                self.faults.append(f"{_shown(name)} is in the index but in no shard")
            elif found[name].file.name != file:
                other = _shown(found[name].file.name)
                self.faults.append(f"{_shown(name)} is in shard {other}, not in {_shown(file)} as the index says")
        orphans = sorted(found.keys() - weight_map.keys())
        self.faults += [f"{_shown(name)} is in a shard but not in the index" for name in orphans]
        if self.faults:
            raise _faulty(self.label, index, self.faults, self.allow)
        return list(found.values())

    def _is_sound(self, name: str) -> bool:
        """Whether a shard's name is that of a file in this folder that may be read; a fault is kept otherwise."""
        if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
            self.faults.append(f"shard {_shown(name)} lies outside the folder")
            return False
        fault = fault_of(self.folder, name, self.allow)
        if fault is None and not (self.folder / name).exists():
            fault = "is missing"
        if fault is not None:
            self.faults.append(f"shard {_shown(name)} {fault}")
        return fault is None


def _shown(name: str) -> str:
    """A name out of a file, quoted, cut and without control characters."""
    return f"'{escaped(name[:200], lines=True)}{'…' if len(name) > 200 else ''}'"


def _faulty(label: str, where: Path, faults: Sequence[str], allow: frozenset[str]) -> InputFileError:
    more = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    return InputFileError(
        f"'{label}' has {len(faults)} fault(s) in its weight files",
        where=str(where),
        why="; ".join([*faults[:SHOWN_FAULTS], *more]),
        fix=remedy_of(faults, allow),
    )


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it names {_shown(key)} twice")
        found[key] = value
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
    """The index's map of tensor names to shard files."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_once)["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("weight_map must map tensor names to file names, and name at least one")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputFileError(
            "this index of shards cannot be read", where=str(index), why=repr(error), fix="download the file again"
        ) from error
    return dict(weight_map)
