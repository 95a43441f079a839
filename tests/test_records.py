"""Records: what is written is what is read, and what is not a record is refused by name and place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sensmerge.errors import InputFileError
from sensmerge.records import (
    Alignment,
    Coefficients,
    Intervals,
    Record,
    Scale,
    Scores,
    SensitivityProfile,
    TaskScore,
    TensorSpec,
    hash_of,
)

PROFILE = SensitivityProfile(
    schema=1, model="a/b", fingerprint="f" * 64, samples=2, tokens=3, loss="response", score="weight",
    layers=["model.layers.0", "model.layers.1"], sensitivity=[0.1 + 0.2, 1e-300],
    per_sample=[[0.1, 5e-324], [0.2, 1e-300]], tensors={"model.layers.0.w": 1 / 3, "embed.é\u2028": 2.0},
    rows=[0, 7], token_ids=[[1, 2, 3], [4, 5]], loss_mask=[[0, 1, 1], [0, 1]], inputs="x",
)  # fmt: skip
ALIGNMENT = Alignment(
    schema=1, models=["a", "b"], distances=[[0.0, math.pi], [1e17, 0.0]],
    per_sample=[[[0.0], [3.0, math.pi]], [[1e17], [0.0, 0.0]]], inputs="y",
)  # fmt: skip
COEFFICIENTS = Coefficients(
    schema=1, preset="paper", rule="softmax", temperature=1.0, total=2.0, lambda_=0.7, models=["a", "b"],
    layers=["l.0"], alpha=[[1.0], [1.0]], tau=[0.25, 0.75], sigma=[[0.4], [0.6]], w=[1.0, 0.5],
    weights=[[0.56], [0.42]], other={"embed": [0.5, 0.5]}, spread=0.2, warnings=["müde\n"], inputs="z",
)  # fmt: skip
INTERVALS = Intervals(
    1000,
    [[[0.9, 1.0]], [[1.0, 1.0]]],
    [[0.2, 0.3], [0.7, 0.8]],
    [[[0.3, 0.5]], [[0.5, 0.7]]],
    [[[0.5, 0.6]], [[0.4, 0.5]]],
)
SCALE = Scale(1, 0.85, "mean over tasks", ["a"], [[0.1, 2.0, 2.0], [0.85, 1.0, 1.0]], "q")
SCORES = Scores(1, "m", "f", {"t": TaskScore("accuracy", 50.0, 2, 35.35, [0.0, 1.0])}, 50.0, "i")

RECORDS: list[Record] = [
    PROFILE,
    ALIGNMENT,
    COEFFICIENTS,
    dataclasses.replace(COEFFICIENTS, lambda_=None),
    dataclasses.replace(COEFFICIENTS, intervals=INTERVALS),
    SCALE,
    SCORES,
]
IDS = ["profile", "alignment", "coefficients", "lambda-null", "intervals", "scale", "scores"]

each_record = pytest.mark.parametrize("record", RECORDS, ids=IDS)


@each_record
def test_a_record_comes_back_equal(record: Record, tmp_path: Path) -> None:
    """Every float bit for bit, every string, through text and through a file."""
    assert type(record).from_json(record.to_json(), source="here") == record
    path = tmp_path / "deep" / "er" / "record.json"
    record.save(path)
    assert type(record).load(path) == record
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"], "no partial file is left"


@each_record
def test_the_text_is_plain_json_with_one_key_a_line(record: Record) -> None:
    """Other programs read it; two records can be compared line by line."""
    data = json.loads(record.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    names = [field.name.removesuffix("_") for field in dataclasses.fields(record)]
    assert list(data) == names
    assert data["schema"] == 1
    lines = record.to_json().splitlines()
    assert [line.strip().partition(":")[0] for line in lines[1:-1]] == [f'"{name}"' for name in names]


@pytest.mark.parametrize("record", [COEFFICIENTS, SCALE], ids=["coefficients", "scale"])
def test_lambda_is_spelt_as_in_the_recipe(record: Record) -> None:
    """The key is `lambda`, whatever Python calls the field."""
    data = json.loads(record.to_json())
    assert "lambda" in data
    assert "lambda_" not in data


def test_the_python_spelling_of_lambda_is_an_unknown_key() -> None:
    """A record has one spelling."""
    text = SCALE.to_json().replace('"lambda"', '"lambda_"')
    with pytest.raises(InputFileError):
        Scale.from_json(text, source="s.json")


@each_record
@pytest.mark.parametrize("schema", [0, 2, "1", None], ids=repr)
def test_another_schema_is_refused(record: Record, schema: object) -> None:
    """Only schema 1 is read; the message says what was found."""
    data = json.loads(record.to_json()) | {"schema": schema}
    with pytest.raises(InputFileError, match=r"schema 1 is needed") as caught:
        type(record).from_json(json.dumps(data), source="dir/rec.json")
    assert caught.value.exit_code == 3
    assert "dir/rec.json" in caught.value.where


def test_true_is_not_schema_1() -> None:
    """JSON's true equals 1 in Python only."""
    with pytest.raises(InputFileError):
        Scale.from_json(SCALE.to_json().replace('"schema": 1', '"schema": true'), source="s.json")


def _keys(record: Record) -> list[str]:
    """The keys that must be there: those that came later have defaults, so that older files can be read."""
    late = {
        field.name
        for field in dataclasses.fields(record)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    return [key for key in json.loads(record.to_json()) if key != "schema" and key not in late]


def test_files_without_the_later_keys_can_be_read() -> None:
    for record in (PROFILE, COEFFICIENTS):
        data = json.loads(record.to_json())
        for key in ("truncated", "dropped", "intervals"):
            data.pop(key, None)
        assert type(record).from_json(json.dumps(data), source="old.json") == record


@pytest.mark.parametrize(
    ("record", "key"),
    [(record, key) for record in (PROFILE, ALIGNMENT, COEFFICIENTS, SCALE, SCORES) for key in _keys(record)],
)
def test_a_missing_key_is_named(record: Record, key: str) -> None:
    """Whatever key is taken away, the error names it and the file."""
    data = json.loads(record.to_json())
    del data[key]
    with pytest.raises(InputFileError) as caught:
        type(record).from_json(json.dumps(data), source="rec.json")
    assert caught.value.where.startswith("rec.json")
    assert key in caught.value.where
    assert caught.value.exit_code == 3


@each_record
def test_an_extra_key_is_named(record: Record) -> None:
    """A key from another version is not silently dropped."""
    data = json.loads(record.to_json()) | {"temprature": 1.0}
    with pytest.raises(InputFileError) as caught:
        type(record).from_json(json.dumps(data), source="rec.json")
    assert "temprature" in caught.value.where


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("sensitivity", ["much"], "sensitivity.0"),
        ("sensitivity", {"a": 1.0}, "sensitivity"),
        ("per_sample", [[0.1], [None]], "per_sample.1.0"),
        ("token_ids", [[1.5]], "token_ids.0.0"),
        ("tensors", {"w": "x"}, "tensors.w"),
        ("model", 3, "model"),
        ("samples", None, "samples"),
    ],
)
def test_a_wrong_type_is_told_with_its_place(key: str, value: object, place: str) -> None:
    """The place in the record is named down to the element."""
    data = json.loads(PROFILE.to_json()) | {key: value}
    with pytest.raises(InputFileError) as caught:
        SensitivityProfile.from_json(json.dumps(data), source="p.json")
    assert caught.value.where == f"p.json, {place}"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "r.json:1:1"),
        ('{"schema": 1,\n  "models": [}', "r.json:2:14"),
        ('{"schema": 1} trailing', "r.json:1:15"),
        ("[1, 2]", "r.json"),
        ("null", "r.json"),
        ("{}", "r.json"),
    ],
)
def test_text_that_is_no_record_is_refused(text: str, place: str) -> None:
    """Malformed JSON is told with line and column."""
    with pytest.raises(InputFileError) as caught:
        Alignment.from_json(text, source="r.json")
    assert caught.value.where == place
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "text",
    ['{"schema": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"schema": 1, "x": ' + "9" * 5000 + "}"],
    ids=["deep", "long number"],
)
def test_hostile_json_is_refused_like_any_other(text: str) -> None:
    """A profile may come from a stranger: neither depth nor length of a number ends in a traceback."""
    with pytest.raises(InputFileError):
        Alignment.from_json(text, source="r.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_no_number_that_is_not_finite_is_written(value: float, tmp_path: Path) -> None:
    """JSON has no NaN: writing one is an error and leaves no file."""
    record = dataclasses.replace(PROFILE, sensitivity=[value, 1.0])
    with pytest.raises(ValueError, match="JSON"):
        record.save(tmp_path / "p.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spelling", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_no_number_that_is_not_finite_is_read(spelling: str) -> None:
    """A profile with NaN would end in a merge of NaN."""
    text = ALIGNMENT.to_json().replace(repr(math.pi), spelling)
    assert spelling in text
    with pytest.raises(InputFileError) as caught:
        Alignment.from_json(text, source="a.json")
    assert caught.value.where.startswith("a.json")


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    """Missing, a folder, not UTF-8: all are input-file errors with the path."""
    missing, folder, binary = tmp_path / "no.json", tmp_path / "dir", tmp_path / "bin.json"
    folder.mkdir()
    binary.write_bytes(b"\xff\xfe{}")
    for path in (missing, folder, binary):
        with pytest.raises(InputFileError) as caught:
            Scale.load(path)
        assert caught.value.where.startswith(str(path))


def test_save_replaces_the_old_file(tmp_path: Path) -> None:
    """The second save wins whole."""
    path = tmp_path / "s.json"
    SCALE.save(path)
    newer = dataclasses.replace(SCALE, lambda_=0.1)
    newer.save(path)
    assert Scale.load(path) == newer


@pytest.mark.parametrize(
    ("parts", "same"),
    [
        ((({"a": 1, "b": [2]},), ({"b": [2], "a": 1},)), True),
        (((1,), (1.0,)), False),
        ((("a", "b"), ("ab",)), False),
        (((["a"],), (("a",),)), True),
        (((None,), ("null",)), False),
        (((0.1,), (0.1 + 5e-18,)), True),
        (((0.1,), (0.1 + 1e-17,)), False),
    ],
)
def test_hash_of_tells_values_apart(parts: Any, same: bool) -> None:
    """Equal values hash equally whatever the order of keys; others do not."""
    left, right = parts
    assert (hash_of(*left) == hash_of(*right)) is same


def test_hash_of_is_the_sha256_of_canonical_json() -> None:
    """Anyone can recompute it, on any machine."""
    text = '["é",{"a":null,"b":[1,2.5]}]'
    assert hash_of("é", {"b": [1, 2.5], "a": None}) == hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(ValueError, match="JSON"):
        hash_of(math.nan)


@pytest.mark.parametrize(
    ("shape", "elements"), [((), 1), ((0,), 0), ((3, 0, 2), 0), ((2, 3, 4), 24), ((2**40, 2**30), 2**70)]
)
def test_elements_of_a_shape(shape: tuple[int, ...], elements: int) -> None:
    """A scalar is one element; no overflow."""
    assert TensorSpec("t", "F32", shape).elements == elements


@pytest.mark.parametrize("group", ["l.0", "embed"])
def test_sigma_of_finds_blocks_and_roles(group: str) -> None:
    """A block's column of sigma, or the role's own list."""
    assert COEFFICIENTS.sigma_of(group) == {"l.0": [0.4, 0.6], "embed": [0.5, 0.5]}[group]


@pytest.mark.parametrize("items", [[1.0], [0.0, 1.0, 1.0, 1.0], [0.5] * 10])
def test_task_score_is_percent_with_binomial_error(items: list[float]) -> None:
    """value = 100 p, stderr = 100 sqrt(p (1-p) / n)."""
    p, n = sum(items) / len(items), len(items)
    score = TaskScore.of("m", items)
    assert score.value == pytest.approx(100 * p)
    assert score.stderr == pytest.approx(100 * math.sqrt(p * (1 - p) / n))
    assert score.samples == n
