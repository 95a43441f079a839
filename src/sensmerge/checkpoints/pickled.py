"""Legacy weights, `pytorch_model*.bin`: zip files of raw storages beside a pickle that says which tensor lies where.

The pickle is read in a process of its own (see pickle_listing), what it says is checked against the zip file, and the weights are
then read with `pread` like those of safetensors. Format: PyTorch's serialization notes, https://pytorch.org/docs/stable/notes/serialization.html.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputFileError, escaped
from ..records import TensorSpec
from .formats import ITEM_SIZES
from .header import StoredTensor

# A few seconds for torch's import, then some milliseconds a file: this is for a process that hangs.
SECONDS_TO_READ = 600.0
LARGEST_PICKLE = 100_000_000
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def read_pickles(files: Sequence[Path]) -> dict[Path, list[StoredTensor] | InputFileError]:
    """The tensors of pickle files, or what is wrong with each; no weight is read and nothing that is in a file is run.

    Refused are files older than torch 1.6's zip format, compressed or big-endian ones, values that are no tensors, tensors that are
    not contiguous. Cost: one process that imports torch.
    """
    found: dict[Path, list[StoredTensor] | InputFileError] = {}
    storages: dict[Path, dict[int, int]] = {}
    for file in files:
        try:
            storages[file] = _storages(file)
        except InputFileError as error:
            found[file] = error
    lines = _listing(list(storages)) if storages else []
    for file, line in zip(storages, lines, strict=True):
        try:
            found[file] = _stored(file, line, storages[file])
        except InputFileError as error:
            found[file] = error
    return found


def _refused(file: Path, why: str) -> InputFileError:
    return InputFileError(
        "this file of pickled weights cannot be merged",
        where=str(file),
        why=why,
        fix="load the model with transformers and `save_pretrained(folder)`, which writes model.safetensors",
    )


def _storages(file: Path) -> dict[int, int]:
    """Where each member of the zip file begins, and its bytes. Raises InputFileError for what torch would not write today."""
    try:
        with file.open("rb") as raw, zipfile.ZipFile(raw) as archive:
            members = archive.infolist()
            packed = next((each.filename for each in members if each.compress_type != zipfile.ZIP_STORED), None)
            if packed is not None:
                raise _refused(file, f"'{packed[:200]}' in it is compressed; torch stores plainly")
            for each in members:
                name = each.filename.rpartition("/")[2]
                if name == "data.pkl" and each.file_size > LARGEST_PICKLE:
                    raise _refused(file, f"its data.pkl has {each.file_size} bytes")
                if name == "byteorder" and (order := archive.read(each)[:16]) != b"little":
                    raise _refused(file, f"its numbers are stored with byte order {order!r}, not little")
            size = os.fstat(raw.fileno()).st_size
            places = {_data_start(raw, each.header_offset): each.file_size for each in members}
    except zipfile.BadZipFile as error:
        raise _refused(
            file, f"it is no zip file ({error}): damaged, or written by a torch older than 1.6 or as another format"
        ) from error
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise _refused(file, str(error)) from error
    beyond = next((start for start, length in places.items() if start + length > size), None)
    if beyond is not None:
        raise _refused(file, f"a storage at byte {beyond} would end behind the end of the file, {size}")
    return places


def _data_start(raw: Any, header: int) -> int:
    """The first byte of a zip member whose local header (30 bytes, its name, extra fields) lies at `header`."""
    raw.seek(header)
    fixed = raw.read(30)
    if len(fixed) != 30 or fixed[:4] != b"PK\x03\x04":
        raise ValueError(f"there is no member at byte {header}, as its directory says")
    return int(header + 30 + int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:30], "little"))


def _listing(files: Sequence[Path]) -> list[Mapping[str, Any]]:
    """What pickle_listing says of each file; a file that ends the process, and those behind it, have an `error`."""
    script = Path(__file__).with_name("pickle_listing.py")
    # -P: the folder of the script, with our own modules, is no place to import from.
    command = [sys.executable, "-P", str(script), *(str(file.resolve()) for file in files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=SECONDS_TO_READ,
            check=False,
        )
        output, ended = done.stdout, f"the process that read it ended with {done.returncode}: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired:
        output, ended = "", f"it took longer than {SECONDS_TO_READ:g} s to read"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [*lines, *({"error": " ".join(ended.split())} for _ in files[len(lines) :])]


def _stored(file: Path, listing: Mapping[str, Any], storages: Mapping[int, int]) -> list[StoredTensor]:
    """The tensors of one file, each checked against the zip file's members."""
    if "error" in listing:
        raise _refused(file, str(listing["error"]))
    found, faults = [], []
    for name, dtype, shape, stride, offset, start, size in listing["tensors"]:
        shown = f"'{escaped(str(name)[:200], lines=True)}'"
        if escaped(name, lines=True) != name:
            faults.append(f"{shown} has control characters in its name")
        elif dtype not in DTYPES:
            faults.append(f"{shown} has dtype {dtype}")
        elif not _contiguous(shape, stride):
            faults.append(f"{shown} is not contiguous: shape {shape}, stride {stride}")
        elif start is None or storages.get(start) != size:
            faults.append(f"{shown} has no storage in the file that the installed torch can place")
        else:
            spec = TensorSpec(name, DTYPES[dtype], tuple(shape))
            item = ITEM_SIZES[spec.dtype]
            if offset < 0 or (offset + spec.elements) * item > size:
                faults.append(f"{shown} is larger than its storage")
            found.append(StoredTensor(spec, file, start + offset * item, spec.elements * item))
    if faults:
        more = [f"and {len(faults) - 20} more"] if len(faults) > 20 else []
        raise _refused(file, "; ".join([*faults[:20], *more]))
    return found


def _contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements lie one after the other in the order of their indices."""
    if 0 in shape:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
