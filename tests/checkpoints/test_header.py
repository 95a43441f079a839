"""The header: attacks are refused, and whatever is accepted the safetensors library accepts with the same tensors."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sensmerge.checkpoints.header import StoredTensor, read_header
from sensmerge.errors import InputFileError
from tests.builders import safetensors_bytes

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}
GOOD = {"a": A, "b": B}
DATA = bytes(range(16))


def entry(**changes: Any) -> dict[str, Any]:
    return A | changes


def library(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the safetensors library reads: dtype, shape and bytes by name."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            part, tensor = file.get_slice(name), file.get_tensor(name)
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            found[name] = (part.get_dtype(), tuple(part.get_shape()), content)
    return found


def ours(path: Path, tensors: list[StoredTensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    whole = path.read_bytes()
    return {t.spec.name: (t.spec.dtype, t.spec.shape, whole[t.offset : t.offset + t.size]) for t in tensors}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------------------------------------------ valid files


VALID: dict[str, dict[str, torch.Tensor]] = {
    "mixed": {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b.c": torch.ones(3, dtype=torch.bfloat16),
        "d": torch.ones(5, dtype=torch.float16),
        "e": torch.tensor([True, False]),
        "f": torch.arange(3),
        "g": torch.arange(3, dtype=torch.float64),
        "h": torch.arange(4, dtype=torch.uint8),
        "i": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "j": torch.zeros(2, dtype=torch.float8_e5m2),
        "k": torch.arange(2, dtype=torch.int16),
    },
    "scalar": {"x": torch.tensor(3.0)},
    "empty tensors": {"x": torch.zeros(0), "y": torch.zeros(3, 0, 2, dtype=torch.bfloat16), "z": torch.ones(1)},
    "nothing": {},
    "odd names": {"": torch.ones(1), 'é/../"\\ ': torch.ones(2), "__meta__": torch.ones(1)},
}


@pytest.mark.parametrize("name", VALID)
def test_what_the_library_writes_is_read_alike(tmp_path: Path, name: str) -> None:
    """Names, dtypes, shapes and the place of every byte; in the order of the data."""
    path = tmp_path / "m.safetensors"
    save_file(VALID[name], path, metadata={"format": "pt", "é": "x" * 1000})
    tensors = read_header(path)
    assert ours(path, tensors) == library(path)
    assert [t.offset for t in tensors] == sorted(t.offset for t in tensors)
    assert all(t.file == path for t in tensors)


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes(GOOD, DATA),
        safetensors_bytes(dict(reversed(GOOD.items())), DATA),
        safetensors_bytes(json.dumps(GOOD) + "     ", DATA),
        safetensors_bytes(GOOD | {"__metadata__": {}}, DATA),
        safetensors_bytes({}, b""),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b""),
    ],
)
def test_valid_files_made_by_hand(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    assert ours(path, read_header(path)) == library(path)


# ---------------------------------------------------------------------------------------------------------- attacks

ATTACKS: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"\x00" * 7,
    "eight zero bytes": b"\x00" * 8,
    "header cut": safetensors_bytes(GOOD, DATA)[:40],
    "data cut": safetensors_bytes(GOOD, DATA[:-1]),
    "no data": safetensors_bytes(GOOD),
    "length one more": safetensors_bytes(GOOD, DATA, length=len(json.dumps(GOOD)) + 1),
    "length one less": safetensors_bytes(GOOD, DATA, length=len(json.dumps(GOOD)) - 1),
    "length of the whole file": safetensors_bytes(GOOD, DATA, length=len(json.dumps(GOOD)) + 16),
    "length huge": safetensors_bytes(GOOD, DATA, length=2**63),
    "length all ones": safetensors_bytes(GOOD, DATA, length=2**64 - 1),
    "length above the limit": safetensors_bytes(GOOD, DATA, length=100_000_001),
    "length zero": safetensors_bytes(GOOD, DATA, length=0),
    "not UTF-8": safetensors_bytes(b'{"a\xff": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', DATA[:8]),
    "UTF-16": safetensors_bytes(json.dumps(GOOD).encode("utf-16"), DATA),
    "byte-order mark": safetensors_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), DATA),
    "not JSON": safetensors_bytes("hello", DATA),
    "JSON with a tail": safetensors_bytes(json.dumps(GOOD) + "x", DATA),
    "JSON with zero bytes": safetensors_bytes(json.dumps(GOOD) + "\0\0", DATA),
    "single quotes": safetensors_bytes(str(GOOD), DATA),
    "a list": safetensors_bytes([GOOD], DATA),
    "a number": safetensors_bytes(3),
    "null": safetensors_bytes("null"),
    "a pickle": b"\x80\x04\x95" + b"\x00" * 100,
    "a zip": b"PK\x03\x04" + b"\x00" * 100,
    "a page of HTML": b"<!DOCTYPE html><html><body>Access denied, please log in first</body></html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    "name twice": safetensors_bytes(f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}', DATA[:8]),
    "key twice in a tensor": safetensors_bytes(
        '{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', DATA[:8]
    ),
    "overlap": safetensors_bytes({"a": A, "b": B | {"data_offsets": [4, 12]}}, DATA[:12]),
    "same bytes twice": safetensors_bytes({"a": A, "b": A}, DATA[:8]),
    "hole": safetensors_bytes({"a": A, "b": B | {"data_offsets": [9, 17]}}, DATA + b"x"),
    "hole at the start": safetensors_bytes({"a": entry(data_offsets=[4, 12])}, DATA[:12]),
    "tail": safetensors_bytes(GOOD, DATA + b"x"),
    "data without tensors": safetensors_bytes({}, b"x"),
    "negative offsets": safetensors_bytes({"a": entry(data_offsets=[-8, 0])}, DATA[:8]),
    "negative shape": safetensors_bytes({"a": entry(shape=[-1, -2])}, DATA[:8]),
    "negative zero shape": safetensors_bytes('{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}'),
    "offsets swapped": safetensors_bytes({"a": entry(data_offsets=[8, 0])}, DATA[:8]),
    "one offset": safetensors_bytes({"a": entry(data_offsets=[8])}, DATA[:8]),
    "three offsets": safetensors_bytes({"a": entry(data_offsets=[0, 8, 8])}, DATA[:8]),
    "offsets are text": safetensors_bytes({"a": entry(data_offsets="08")}, DATA[:8]),
    "offsets are an object": safetensors_bytes({"a": entry(data_offsets={"0": 0, "8": 8})}, DATA[:8]),
    "offsets missing": safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, DATA[:8]),
    "offsets null": safetensors_bytes({"a": entry(data_offsets=None)}, DATA[:8]),
    "size is true": safetensors_bytes({"a": entry(shape=[True, 2])}, DATA[:8]),
    "size is a float": safetensors_bytes({"a": entry(shape=[2.0])}, DATA[:8]),
    "size is text": safetensors_bytes({"a": entry(shape=["2"])}, DATA[:8]),
    "size is null": safetensors_bytes({"a": entry(shape=[None])}, DATA[:8]),
    "offset is true": safetensors_bytes({"a": entry(dtype="U8", shape=[1], data_offsets=[0, True])}, b"x"),
    "offset is false": safetensors_bytes({"a": entry(data_offsets=[False, 8])}, DATA[:8]),
    "offset is a float": safetensors_bytes({"a": entry(data_offsets=[0, 8.0])}, DATA[:8]),
    "shape overflows 64 bits": safetensors_bytes({"a": entry(shape=[2**32, 2**32, 2])}, DATA[:8]),
    "shape overflows to fit": safetensors_bytes({"a": entry(shape=[2**63, 2], data_offsets=[0, 0])}),
    "size beyond 64 bits times zero": safetensors_bytes({"a": entry(shape=[2**70, 0], data_offsets=[0, 0])}),
    "offset beyond 64 bits": safetensors_bytes({"a": entry(data_offsets=[2**64, 2**64 + 8])}, DATA[:8]),
    "shape too large for the data": safetensors_bytes({"a": entry(shape=[3])}, DATA[:8]),
    "shape too small for the data": safetensors_bytes({"a": entry(shape=[1])}, DATA[:8]),
    "shape is text": safetensors_bytes({"a": entry(shape="", data_offsets=[0, 4])}, DATA[:4]),
    "shape is an object": safetensors_bytes({"a": entry(shape={}, data_offsets=[0, 4])}, DATA[:4]),
    "shape is a number": safetensors_bytes({"a": entry(shape=2)}, DATA[:8]),
    "shape nested": safetensors_bytes({"a": entry(shape=[[2]])}, DATA[:8]),
    "shape missing": safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA[:8]),
    "dtype missing": safetensors_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA[:8]),
    "dtype unknown": safetensors_bytes({"a": entry(dtype="F31")}, DATA[:8]),
    "dtype in small letters": safetensors_bytes({"a": entry(dtype="f32")}, DATA[:8]),
    "dtype is null": safetensors_bytes({"a": entry(dtype=None)}, DATA[:8]),
    "dtype is a list": safetensors_bytes({"a": entry(dtype=["F32"])}, DATA[:8]),
    "dtype is an object": safetensors_bytes({"a": entry(dtype={"F32": 4})}, DATA[:8]),
    "tensor is null": safetensors_bytes({"a": None}),
    "tensor is a list": safetensors_bytes({"a": ["F32", [2], [0, 8]]}, DATA[:8]),
    "tensor is text": safetensors_bytes({"a": "F32"}),
    "tensor is a number": safetensors_bytes({"a": 3}),
    "metadata is a list": safetensors_bytes(GOOD | {"__metadata__": []}, DATA),
    "metadata is text": safetensors_bytes(GOOD | {"__metadata__": "pt"}, DATA),
    "metadata holds a number": safetensors_bytes(GOOD | {"__metadata__": {"format": 1}}, DATA),
    "metadata holds an object": safetensors_bytes(GOOD | {"__metadata__": {"format": {}}}, DATA),
    "NaN in the metadata": safetensors_bytes('{"__metadata__": {"x": NaN}}'),
    "nested lists": safetensors_bytes("[" * 200_000 + "]" * 200_000),
    "nested objects": safetensors_bytes('{"a":' * 100_000 + "1" + "}" * 100_000),
    "a number of 5000 digits": safetensors_bytes(
        '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 8]}}', DATA[:8]
    ),
    "half a surrogate pair in a name": safetensors_bytes('{"\\ud800": ' + json.dumps(A) + "}", DATA[:8]),
    "control character in a name": safetensors_bytes(b'{"a\x01": ' + json.dumps(A).encode() + b"}", DATA[:8]),
    "end of line in a name": safetensors_bytes({"a\n  fix:   x": A}, DATA[:8]),
    "escape sequence in a name": safetensors_bytes({"a\x1b[2J": A}, DATA[:8]),
    "text that runs backwards in a name": safetensors_bytes({"a\u202e": A}, DATA[:8]),
    "a million dimensions": safetensors_bytes({"a": entry(shape=[2**63 - 1] * 300_000)}, DATA[:8]),
    "overflow times zero": safetensors_bytes({"a": entry(shape=[2**63, 4, 0], data_offsets=[0, 0])}),
    "blanks before the object": safetensors_bytes("   " + json.dumps(GOOD), DATA),
}  # fmt: skip

# The library takes these too, with the same tensors: leniency that harms nobody.
BOTH_TAKE = {"blanks before the object"}
# Where we are stricter than the library, on purpose: what the file means would hang on who reads it.
STRICTER = {
    "name twice",
    "tensor is a list",
    "end of line in a name",
    "escape sequence in a name",
    "text that runs backwards in a name",
}
# -0 is a JSON spelling of 0; the library takes it for a float. No writer makes it.
HARMLESS = {"negative zero shape"}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in BOTH_TAKE | HARMLESS])
def test_an_attack_is_refused(tmp_path: Path, name: str) -> None:
    """Always InputFileError (exit 3) with the file's path: no traceback, no crash, no memory."""
    path = write(tmp_path, ATTACKS[name])
    with pytest.raises(InputFileError) as caught:
        read_header(path)
    assert caught.value.exit_code == 3
    assert str(path) in caught.value.where


def check_agreement(path: Path) -> bool:
    """If we accept a file, the library accepts it and finds the same tensors. Returns whether we did."""
    try:
        tensors = read_header(path)
    except InputFileError:
        return False
    try:
        theirs = library(path)
    except SafetensorError as error:
        pytest.fail(f"accepted {path.read_bytes()[:400]!r}, the library says: {error}")
    assert ours(path, tensors) == theirs
    return True


@pytest.mark.parametrize("name", ATTACKS)
def test_the_library_agrees_about_the_attacks(tmp_path: Path, name: str) -> None:
    """The list above means something: the library refuses it too, but where we say otherwise."""
    path = write(tmp_path, ATTACKS[name])
    if name in BOTH_TAKE:
        assert check_agreement(path)
    elif name not in STRICTER:
        with pytest.raises(SafetensorError):
            library(path)


def test_a_declared_length_costs_no_memory(tmp_path: Path) -> None:
    """A sparse file may be as large as its header claims; the limit of the format holds."""
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(InputFileError):
        read_header(path)


def test_a_missing_file_and_a_folder_are_input_file_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(InputFileError) as caught:
            read_header(path)
        assert str(path) in caught.value.where


def test_the_error_says_which_tensor(tmp_path: Path) -> None:
    path = write(tmp_path, safetensors_bytes({"good": A, "bad.weight": B | {"shape": [2, 3]}}, DATA))
    with pytest.raises(InputFileError) as caught:
        read_header(path)
    assert "'bad.weight'" in caught.value.why


# ------------------------------------------------------------------------------------------------------------- fuzz

BASE = safetensors_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
        "c": {"dtype": "U8", "shape": [], "data_offsets": [12, 13]},
        "d": {"dtype": "I16", "shape": [0, 3], "data_offsets": [13, 13]},
        "e": {"dtype": "BOOL", "shape": [3], "data_offsets": [13, 16]},
    },
    b"\x01" * 16,
)
ODD = b'0123456789-+.eE{}[],:"\\/ \t\r\nabcdFUInrtu_\x00\x7f\x80\xff'


def mutated_bytes(chance: random.Random) -> bytes:
    """A few bytes of length or header changed, inserted or taken out; the length mostly put right again."""
    header = bytearray(BASE[8:-16])
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place, kind = chance.randrange(len(header)), chance.random()
        if kind < 0.6:
            header[place] = chance.choice(ODD)
        elif kind < 0.8:
            header.insert(place, chance.choice(ODD))
        else:
            del header[place]
    length = len(header) if chance.random() < 0.95 else chance.choice((0, 1, len(header) + 1, 2**40))
    return safetensors_bytes(
        bytes(header), b"\x01" * (16 if chance.random() < 0.95 else chance.randrange(18)), length=length
    )


VALUES: list[Any] = [
    0, 1, 2, 3, 8, 12, 16, -1, 2**32, 2**63, 2**64, 2**65, 1.0, 8.0, 1e3, True, False, None, "", "F32", "F64",
    "BF16", "F4", "C64", "F8_E4M3", "F8_E5M2FNUZ", "U64", [], {}, [0], [2], [2, 1], [1, 2, 1], [0, 8], [8, 12], [0, 0],
    [12, 16],
    [[]], {"x": "y"},
]  # fmt: skip


def mutated_json(chance: random.Random) -> bytes:
    """A value somewhere in the header replaced, taken out or added."""
    header: dict[str, Any] = json.loads(BASE[8:-16])
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(list(header)) if header else "a"
        part = header.get(name)
        choice = chance.random()
        if choice < 0.1 or not isinstance(part, dict) or not part:
            header[name] = copy.deepcopy(chance.choice(VALUES))
        elif choice < 0.15:
            del header[name]
        elif choice < 0.25:
            part[chance.choice(("extra", "dtype", "shape"))] = copy.deepcopy(chance.choice(VALUES))
        else:
            key = chance.choice(list(part))
            inner = part[key]
            if isinstance(inner, list) and inner and chance.random() < 0.6:
                inner[chance.randrange(len(inner))] = copy.deepcopy(chance.choice(VALUES))
            else:
                part[key] = copy.deepcopy(chance.choice(VALUES))
    return safetensors_bytes(header, b"\x01" * 16)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mutate", [mutated_bytes, mutated_json])
def test_mutated_files_are_refused_or_read_as_the_library_reads_them(tmp_path: Path, mutate: Any, seed: int) -> None:
    """A hundred files a seed; some must survive, or the test would show nothing."""
    chance = random.Random(seed)
    accepted = sum(check_agreement(write(tmp_path, mutate(chance))) for _ in range(100))
    assert 0 < accepted < 100


def test_random_noise_is_never_accepted(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for size in range(0, 400, 7):
        with pytest.raises(InputFileError):
            read_header(write(tmp_path, noise.bytes(size)))


@pytest.mark.parametrize("cut", range(0, len(BASE), 5))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    with pytest.raises(InputFileError):
        read_header(write(tmp_path, BASE[:cut]))
