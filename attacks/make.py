"""Writes the hostile model folders: `python attacks/make.py DIR`, one folder an attack, beside a sound `base`.

Each attack begins with a sound copy of the model and spoils one thing. Files that look large are sparse.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

A: dict[str, Any] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B: dict[str, Any] = {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}
SOUND = {"model.embed_tokens.weight": A, "model.layers.0.mlp.w.weight": B}
DATA = bytes(24)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Attack:
    """What is done to a sound folder, and what the message must say; `options` go to the command."""

    spoil: Callable[[Path], object]
    says: str
    exit_code: int = 3
    options: tuple[str, ...] = ()


def file_of(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    """A safetensors file by hand; `length` lies about the header's."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def sound(folder: Path, sharded: bool = False) -> None:
    """A model that is accepted: config.json, a tokenizer, two tensors in one file or in two shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    if not sharded:
        (folder / WEIGHTS).write_bytes(file_of(SOUND))
        return
    names = list(SOUND)
    (folder / SHARDS[0]).write_bytes(file_of({names[0]: A}, DATA[:16]))
    (folder / SHARDS[1]).write_bytes(file_of({names[1]: B | {"data_offsets": [0, 8]}}, DATA[:8]))
    write_index(folder, dict(zip(names, SHARDS, strict=True)))


def write_index(folder: Path, weight_map: object) -> None:
    """An index of shards."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weights(header: object, data: bytes = DATA, length: int | None = None) -> Callable[[Path], object]:
    """Another single file."""
    return lambda folder: (folder / WEIGHTS).write_bytes(file_of(header, data, length))


def changed(**changes: object) -> Callable[[Path], object]:
    """The first tensor's header entry with other values."""
    return weights({**SOUND, "model.embed_tokens.weight": A | changes})


def content(name: str, text: bytes) -> Callable[[Path], object]:
    """A file with other bytes."""
    return lambda folder: (folder / name).write_bytes(text)


def sparse(name: str, size: int, start: bytes = b"") -> Callable[[Path], object]:
    """A file that says it is large and takes no room on the disk."""

    def spoil(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)

    return spoil


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in a file's place."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def linked(name: str) -> Callable[[Path], object]:
    """The file is a link to a sound one of another folder."""

    def spoil(folder: Path) -> None:
        outside = folder.parent / f"outside-{folder.name}"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return spoil


def shards(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    """The same, done to a model in two shards."""

    def in_shards(folder: Path) -> None:
        shutil.rmtree(folder)
        sound(folder, sharded=True)
        spoil(folder)

    return in_shards


def indexed(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    """Two shards whose index has another map."""

    def spoil(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change(weight_map)
        write_index(folder, weight_map)

    return shards(spoil)


class Payload:
    """Unpickling it makes the file `ran` in the current folder."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, ("touch ran",)


def pickled(bare: bool, compression: int = zipfile.ZIP_STORED, size: int = 0) -> Callable[[Path], object]:
    """Weights as a pickle that runs a command, in place of safetensors."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        text = pickle.dumps({"model.embed_tokens.weight": Payload()}, protocol=2) + bytes(size)
        if bare:
            (folder / "pytorch_model.bin").write_bytes(text)
            return
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w", compression) as archive:
            archive.writestr("archive/data.pkl", text)
            archive.writestr("archive/version", "3\n")

    return spoil


ONE = json.dumps(A)
DEEP = 100_000
ALLOWED = ("--allow-pickle",)

ATTACKS: dict[str, Attack] = {
    # ---- the header of a safetensors file
    "empty": Attack(content(WEIGHTS, b""), "damaged"),
    "truncated-header": Attack(content(WEIGHTS, file_of(SOUND)[:50]), "the header would take"),
    "truncated-data": Attack(weights(SOUND, DATA[:-1]), "the tensors end at byte"),
    "tail": Attack(weights(SOUND, DATA + b"x"), "the tensors end at byte"),
    "length-too-small": Attack(weights(SOUND, length=100), "cannot be read"),
    "length-too-large": Attack(weights(SOUND, length=1 << 63), "the header would take"),
    "length-over-the-limit": Attack(sparse(WEIGHTS, 1 << 32, struct.pack("<Q", 100_000_001)), "the header would take"),
    "overlap": Attack(weights({**SOUND, "x": B | {"data_offsets": [8, 16]}}), "was expected"),
    "hole": Attack(weights({**SOUND, "x": B | {"data_offsets": [25, 33]}}, DATA + bytes(9)), "was expected"),
    "leaking-offsets": Attack(changed(data_offsets=[1 << 40, (1 << 40) + 16]), "was expected"),
    "negative-offsets": Attack(changed(data_offsets=[-16, 0]), "is no size"),
    "duplicate-tensor": Attack(weights(f'{{"a": {ONE}, "a": {ONE}}}', DATA[:16]), "twice"),
    "duplicate-key": Attack(weights(f'{{"a": {ONE[:-1]}, "dtype": "F32"}}}}', DATA[:16]), "twice"),
    "not-utf-8": Attack(weights(b'{"\xff": ' + ONE.encode() + b"}", DATA[:16]), "cannot be read"),
    "not-json": Attack(weights("<!DOCTYPE html>"), "cannot be read"),
    "deep-lists": Attack(weights("[" * DEEP + "]" * DEEP), "cannot be read"),
    "deep-objects": Attack(weights('{"a":' * DEEP + "1" + "}" * DEEP), "cannot be read"),
    "negative-shape": Attack(changed(shape=[-2, -2]), "is no size"),
    "overflowing-shape": Attack(changed(shape=[1 << 62, 4, 4]), "too large for 64 bits"),
    "overflow-times-zero": Attack(changed(shape=[1 << 63, 4, 0], data_offsets=[0, 0]), "too large for 64 bits"),
    "million-dimensions": Attack(changed(shape=[(1 << 63) - 1] * 1_000_000), "too large for 64 bits"),
    "million-digits": Attack(weights('{"a": {"shape": [' + "9" * 1_000_000 + "]}}"), "is no size"),
    "fractional-shape": Attack(changed(shape=[2.0, 2]), "is no size"),
    "truth-as-shape": Attack(changed(shape=[True, 4]), "has dtype"),
    "unknown-dtype": Attack(changed(dtype="F31"), "not supported"),
    "metadata-no-text": Attack(weights({**SOUND, "__metadata__": {"x": 1}}), "metadata"),
    "escape-in-a-name": Attack(weights({"a\x1b[2J\x1b]0;x\x07": A}, DATA[:16]), "control characters"),
    "line-in-a-name": Attack(weights({"a\n  fix:   run this": A}, DATA[:16]), "control characters"),
    "backwards-name": Attack(weights({"a\u202egnp": A}, DATA[:16]), "control characters"),
    # ---- what lies in a file's place
    "folder-as-weights": Attack(in_place_of(WEIGHTS, Path.mkdir), "is no plain file"),
    "pipe-as-weights": Attack(in_place_of(WEIGHTS, os.mkfifo), "is no plain file"),
    "device-as-weights": Attack(in_place_of(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), "is no plain file"),
    "dangling-weights": Attack(in_place_of(WEIGHTS, lambda path: path.symlink_to("nowhere")), "does not exist"),
    "loop-as-weights": Attack(in_place_of(WEIGHTS, lambda path: path.symlink_to(WEIGHTS)), "cannot be looked at"),
    "linked-weights": Attack(linked(WEIGHTS), "link out of"),
    "linked-config": Attack(linked("config.json"), "link out of"),
    "linked-tokenizer": Attack(linked("tokenizer.json"), "link out of"),
    # ---- shards and their index
    "shard-above": Attack(indexed(lambda m: m.update(x="../../x.safetensors")), "'../../x.safetensors' lies outside"),
    "shard-absolute": Attack(indexed(lambda m: m.update(x="/etc/passwd")), "'/etc/passwd' lies outside"),
    "shard-below": Attack(indexed(lambda m: m.update(x="sub/x.safetensors")), "lies outside"),
    "shard-nul": Attack(indexed(lambda m: m.update(x="a\0b")), "lies outside"),
    "shard-long": Attack(indexed(lambda m: m.update(x="x" * 10_000)), "cannot be looked at"),
    "shard-half-a-character": Attack(indexed(lambda m: m.update(x="\ud800")), "cannot be looked at"),
    "shard-escape": Attack(indexed(lambda m: m.update(x="\x1b[2J\n  fix:   x")), "is missing"),
    "shard-linked": Attack(shards(linked(SHARDS[1])), "link out of"),
    "shard-pipe": Attack(shards(in_place_of(SHARDS[1], os.mkfifo)), "is no plain file"),
    "shards-missing": Attack(
        shards(lambda folder: [(folder / name).unlink() for name in SHARDS]),
        f"'{SHARDS[0]}' is missing; shard '{SHARDS[1]}'",
    ),
    "index-of-ghosts": Attack(indexed(lambda m: m.update(x=SHARDS[0], y=SHARDS[1])), "2 fault(s)"),
    "orphans": Attack(
        shards(content(SHARDS[1], file_of({**SOUND, "x": B | {"data_offsets": [24, 32]}}, bytes(32)))),
        "'x' is in a shard but not in the index",
    ),
    "index-of-the-wrong-shard": Attack(
        indexed(lambda m: m.update(dict(zip(m, reversed(SHARDS), strict=True)))), "as the index says"
    ),
    "index-of-20000-shards": Attack(
        shards(lambda folder: write_index(folder, {f"t{n}": f"shard-{n}" for n in range(20_000)})), "and 19800 more"
    ),
    "index-twice": Attack(shards(content(INDEX, b'{"weight_map": {"a": "x", "a": "y"}}')), "twice"),
    "index-deep": Attack(shards(content(INDEX, b"[" * DEEP)), "cannot be read"),
    "index-huge": Attack(shards(sparse(INDEX, 1 << 34)), "more than such a file can need"),
    "index-pipe": Attack(shards(in_place_of(INDEX, os.mkfifo)), "is no plain file"),
    # ---- config and tokenizer
    "config-missing": Attack(lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config-list": Attack(content("config.json", b"[]"), "not a JSON object"),
    "config-deep": Attack(content("config.json", b'{"a":' * DEEP), "config.json"),
    "config-huge": Attack(sparse("config.json", 1 << 34), "more than such a file can need"),
    "config-pipe": Attack(in_place_of("config.json", os.mkfifo), "is no plain file"),
    "config-not-utf-8": Attack(content("config.json", b'{"a": "\xff"}'), "config.json"),
    "tokenizer-huge": Attack(sparse("tokenizer.json", 1 << 34), "more than such a file can need"),
    "tokenizer-pipe": Attack(in_place_of("tokenizer.json", os.mkfifo), "is no plain file"),
    "tokenizer-deep": Attack(content("tokenizer.json", b"[" * DEEP), "tokenizer"),
    "tokenizer-escape": Attack(
        content("tokenizer.json", b'{"model": {"vocab": {"a": 0, "\\u001b[2J": 1}}}'), "token", exit_code=4
    ),
    # ---- pickles
    "pickle": Attack(pickled(bare=True), "can run code"),
    "pickle-allowed": Attack(pickled(bare=False), "weights_only=True", options=ALLOWED),
    "pickle-of-old": Attack(pickled(bare=True), "no zip file", options=ALLOWED),
    "pickle-bomb": Attack(pickled(False, zipfile.ZIP_DEFLATED, 10_000_000), "is compressed", options=ALLOWED),
}


def write_all(folder: Path) -> None:
    """`base` and one folder for each attack."""
    sound(folder / "base")
    for name, attack in ATTACKS.items():
        sound(folder / name)
        attack.spoil(folder / name)


if __name__ == "__main__":
    """Weights as a pickle that runs a command, in place of safetensors."""
    """Two shards whose index has another map."""
    """The same, done to a model in two shards."""
    """Something else in a file's place."""
    """A file that says it is large and takes no room on the disk."""
    """A file with other bytes."""
    """The first tensor's header entry with other values."""
    """Another single file."""
    """An index of shards."""
    write_all(Path(sys.argv[1]))
