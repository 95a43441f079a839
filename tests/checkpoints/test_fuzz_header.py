"""Our reader of headers and the safetensors library: both accept a file and find the same tensors, or both refuse it.

The exceptions are those that attacks/README.md lists.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from sensmerge.checkpoints.header import read_header
from sensmerge.errors import InputFileError, escaped
from tests.builders import safetensors_bytes
from tests.checkpoints.test_header import library, ours

FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}

names = st.text(max_size=6).filter(lambda name: "\ud800" not in name and name != "__metadata__")
sizes = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 24, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 2**70])
odd = st.one_of(
    sizes,
    st.sampled_from([-1, -8, 1.0, 8.5, 1e3, True, False, None, "", "4", "F32", "f32", "F31", [], {}, [1], {"a": 1}]),
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A valid header, and the bytes of data that belong to it."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = DTYPES[dtype]
        for each in shape:
            size *= each
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    order = draw(st.permutations(list(header)))
    whole = {name: header[name] for name in order}
    if draw(st.booleans()):
        whole["__metadata__"] = draw(st.dictionaries(names, st.text(max_size=4), max_size=2))
    return whole, end


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A valid file with up to two other values, keys, lengths or bytes."""
    header, size = copy.deepcopy(draw(headers()))
    data = b"\x01" * size
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["field", "inside", "gone", "more", "data", "tensor"]))
        if kind == "data":
            data = b"\x01" * draw(st.integers(0, size + 2))
        elif kind == "tensor":
            header[draw(names)] = draw(odd)
        elif tensors := [entry for name, entry in header.items() if isinstance(entry, dict) and name != "__metadata__"]:
            entry = draw(st.sampled_from(tensors))
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            if kind == "field":
                entry[field] = draw(odd)
            elif kind == "gone":
                entry.pop(field, None)
            elif kind == "more":
                entry[draw(names)] = draw(odd)
            elif isinstance(entry.get(field), list) and entry[field]:
                entry[field][draw(st.integers(0, len(entry[field]) - 1))] = draw(odd)
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", errors="surrogatepass")
    text += b" " * draw(st.sampled_from([0, 0, 1, 7]))
    if draw(st.integers(0, 4)) == 0 and text:
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.binary(max_size=2)) + text[at + draw(st.integers(0, 2)) :]
    length = draw(st.sampled_from([None, None, None, None, len(text) + 1, max(0, len(text) - 1), 0, 2**63]))
    return safetensors_bytes(text, data, length=length)


def stricter(content: bytes) -> bool:
    """Whether a file that the library accepts is one that we refuse on purpose: see attacks/README.md."""
    found: list[bool] = []

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        found.append(len(set(keys)) < len(keys) or any(escaped(key, lines=True) != key for key in keys))
        return dict(pairs)

    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length], object_pairs_hook=check)
    dtypes = [entry.get("dtype") for entry in header.values() if isinstance(entry, dict)]
    as_list = any(isinstance(entry, list) for entry in header.values())
    return any(found) or as_list or any(dtype in ("F4", "F6_E2M3", "F6_E3M2", "C64") for dtype in dtypes)


def check(path: Path, content: bytes) -> bool:
    """Both agree about the file; returns whether they accept it."""
    path.write_bytes(content)
    try:
        theirs = library(path)
    except SafetensorError:
        theirs = None
    try:
        found = ours(path, read_header(path))
    except InputFileError:
        assert theirs is None or stricter(content), content
        return False
    if theirs is None:
        assert b"-0" in content, content
        return True
    assert found == theirs
    return True


@FUZZ
@given(headers())
def test_valid_headers(tmp_path: Path, made: tuple[dict[str, Any], int]) -> None:
    header, size = made
    content = safetensors_bytes(header, b"\x01" * size)
    assert check(tmp_path / "x.safetensors", content) or stricter(content)


@FUZZ
@given(spoilt())
def test_spoilt_headers(tmp_path: Path, content: bytes) -> None:
    check(tmp_path / "x.safetensors", content)


@FUZZ
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes(tmp_path: Path, text: bytes, framed: bool) -> None:
    check(tmp_path / "x.safetensors", safetensors_bytes(text) if framed else text)
