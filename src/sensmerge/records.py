"""The frozen records that flow between the floors, each a small JSON file.

Every record carries a `schema` number and, in `inputs`, a hash of what it was computed from; "resume" means: a file with the
same hash exists. Files are written with one top-level key a line, so that they can be read and compared by eye.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from .errors import InputFileError, ResourceError


def hash_of(*parts: object) -> str:
    """SHA-256 (hex) of the canonical JSON of `parts`: equal values give equal hashes on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename: readers see the old file or the whole new one. Raises ResourceError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ResourceError(
            "a file could not be written",
            where=str(path),
            why=str(error),
            fix="free some space or choose a folder that can be written to (--profiles DIR for calibration), then run it again",
        ) from error


@dataclass(frozen=True)
class Record:
    """What all records share: JSON in, JSON out, and a clear error for a file that is not one."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}
    SCHEMA: ClassVar[int] = 1

    def to_json(self) -> str:
        """The record as JSON text, one top-level key a line; NaN and infinity are refused (ValueError)."""
        pairs = [(f.name.rstrip("_"), getattr(self, f.name)) for f in dataclasses.fields(self)]
        lines = [f"  {json.dumps(key)}: {json.dumps(_plain(value), allow_nan=False)}" for key, value in pairs]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Self:
        """The record in `text`; `source` names the file in errors. Raises InputFileError if it is not such a record."""
        from pydantic import TypeAdapter, ValidationError

        kind = f"{cls.__name__} record"
        remake = "delete the file and run the command that writes it again"
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputFileError(
                f"this file is not a {kind}", where=f"{source}:{error.lineno}:{error.colno}", why=error.msg, fix=remake
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputFileError(f"this file is not a {kind}", where=source, why=str(error), fix=remake) from error
        if not isinstance(data, dict) or data.get("schema") != cls.SCHEMA or isinstance(data["schema"], bool):
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise InputFileError(
                f"this file is not a {kind} of this version",
                where=source,
                why=f"schema {cls.SCHEMA} is needed, found {found!r}",
                fix=remake,
            )
        renamed = {_FIELD_NAMES.get(key, key): value for key, value in data.items()}
        try:
            return TypeAdapter(cls).validate_python(renamed)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputFileError(
                f"this file is not a valid {kind}", where=f"{source}, {place}", why=first["msg"], fix=remake
            ) from error

    def save(self, path: Path) -> None:
        """Write the record to `path`, atomically."""
        write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the record at `path` (raises InputFileError if it is missing or not such a record)."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputFileError(
                f"cannot read this {cls.__name__} record",
                where=str(path),
                why=str(error),
                fix="check the path, or run the command that writes it",
            ) from error
        return cls.from_json(text, source=str(path))


# `lambda` is a Python keyword. The second entry keeps Python's spelling from being taken as a key of the file.
_FIELD_NAMES = {"lambda": "lambda_", "lambda_": "lambda"}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name.rstrip("_"): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


Role = Literal["block", "embed", "final_norm", "lm_head", "other"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint, as its header tells: safetensors dtype name ("BF16") and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class SensSettings:
    """The `sens:` block after its preset was applied; DESIGN names and defaults (docs/recipe.md lists the choices)."""

    preset: str = "paper"
    samples: int = 100
    max_length: int = 1024
    seed: int = 0
    template: str = "none"
    loss: str = "response"
    score: str = "weight"
    group: str = "block"
    distance: str = "l2"
    positions: str = "all"
    axis: str = "row"
    direction: str = "distance"
    rule: str = "softmax"
    temperature: float | None = 1.0
    total: float | str = "K"
    other: str = "block_mean"
    compute_dtype: str | None = None


@dataclass(frozen=True)
class SensSource:
    """Where one expert's calibration comes from: a data file with its field names, or a published profile."""

    data: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    profile: str | None = None


@dataclass(frozen=True)
class Expert:
    """One entry of `models:`, with its line in the recipe for messages."""

    model: str
    weight: float
    sens: SensSource | None
    line: int


@dataclass(frozen=True)
class Recipe:
    """A merge as the user wrote it, checked and with presets applied; `text` is the file's own text, for the output folder.

    `lambda_` is a number, "auto", or None where neither the recipe nor its preset names one. `options` are the method's own.
    """

    path: Path
    text: str
    merge_method: str
    base_model: str | None
    models: tuple[Expert, ...]
    lambda_: float | str | None
    options: Mapping[str, object]
    dtype: str | None
    out_dtype: str | None
    sens: SensSettings | None

    def where(self, line: int | None = None) -> str:
        """The recipe's path, with a line number if one is known: for messages."""
        return f"{self.path}:{line}" if line else str(self.path)


@dataclass(frozen=True)
class CalibrationSet:
    """The m samples of one task: token ids and, for each token, whether its prediction counts in the loss.

    `rows` are the samples' 0-based places in their file. `loss_mask[k][t]` is 1 if token t of sample k is a loss token (it is
    predicted from position t-1; token 0 never is one). `loss` is the setting that made the masks.
    """

    rows: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...]
    loss_mask: tuple[tuple[int, ...], ...]
    loss: str
    truncated: int

    @property
    def loss_tokens(self) -> int:
        """Number of loss tokens over all samples."""
        return sum(sum(mask) for mask in self.loss_mask)


@dataclass(frozen=True)
class SensitivityProfile(Record):
    """How sensitive one expert is, layer by layer (eq. 1 and the sums of eq. 3), with the samples that showed it.

    `layers` are the L group names in the order of the stack; `sensitivity[l]` is the sum over samples, `per_sample[k][l]` one
    sample's part; `tensors` has one sum per parameter, those outside the blocks included. `score` is what was summed: `weight`
    |θ·g|, `task_vector` |δ·g| or `fisher` g². `token_ids` and `loss_mask` are empty if the profile was made without samples.
    """

    schema: int
    model: str
    fingerprint: str
    samples: int
    tokens: int
    loss: str
    score: str
    layers: list[str]
    sensitivity: list[float]
    per_sample: list[list[float]]
    tensors: dict[str, float]
    rows: list[int]
    token_ids: list[list[int]]
    loss_mask: list[list[int]]
    inputs: str


@dataclass(frozen=True)
class Alignment(Record):
    """How far the experts stand apart (eq. 4).

    `distances[i][j]` is the distance of model i from expert j on task j's samples (diagonal 0), the mean over its samples of
    `per_sample[i][j]`, which is itself a mean over positions.
    """

    schema: int
    models: list[str]
    distances: list[list[float]]
    per_sample: list[list[list[float]]]
    inputs: str


@dataclass(frozen=True)
class Coefficients(Record):
    """One coefficient per expert and layer (eq. 5-7), and everything that led to it.

    Lists over K experts are in recipe order, lists over L groups in the order of `layers`. `alpha` is eq. 3, `tau` eq. 5,
    `sigma` eq. 6, `other` the σ of tensors outside the blocks by role, `w` the recipe's own weights, and
    `weights[i][l]` = λ·w_i·total·σ_i^l (with 1 in place of λ while it is null): what multiplies δ_i in block l under task
    arithmetic. `spread` is max|K·σ - 1|, whatever `total` is: how far the merge is from a plain one.
    """

    schema: int
    preset: str
    rule: str
    temperature: float
    total: float
    lambda_: float | None
    models: list[str]
    layers: list[str]
    alpha: list[list[float]]
    tau: list[float]
    sigma: list[list[float]]
    w: list[float]
    weights: list[list[float]]
    other: dict[str, list[float]]
    spread: float
    warnings: list[str]
    inputs: str

    def sigma_of(self, group: str) -> list[float]:
        """The K values of σ for a block (or finer group) or for a role outside the blocks.

        A stored head without a σ of its own is tied: it takes the embedding's. Any other group without one holds no parameters,
        only buffers: it takes the mean over the layers.
        """
        if group in self.other:
            return self.other[group]
        if group in self.layers:
            column = self.layers.index(group)
            return [row[column] for row in self.sigma]
        if group == "lm_head" and "embed" in self.other:
            return self.other["embed"]
        return [math.fsum(row) / len(row) for row in self.sigma]


@dataclass(frozen=True)
class Scale(Record):
    """The λ that minimises the calibration loss of the merged model, and every λ that was tried.

    `tried` lists [λ, objective, loss of task 1, … task K] sorted by λ; the objective is the mean over tasks of the mean sample
    loss (nats per token).
    """

    schema: int
    lambda_: float
    objective: str
    models: list[str]
    tried: list[list[float]]
    inputs: str


@dataclass(frozen=True)
class TaskScore:
    """One task's result: `value` in percent, its standard error in percent points, and every item's score (0 to 1)."""

    metric: str
    value: float
    samples: int
    stderr: float
    items: list[float]

    @classmethod
    def of(cls, metric: str, items: list[float]) -> TaskScore:
        """The score of `items` (at least one, each 0 to 1); the standard error is the binomial one, √(p(1-p)/n)."""
        share = math.fsum(items) / len(items)
        return cls(metric, 100.0 * share, len(items), 100.0 * math.sqrt(share * (1.0 - share) / len(items)), items)


@dataclass(frozen=True)
class Scores(Record):
    """What an evaluation says about one model: a score per task, and their mean."""

    schema: int
    model: str
    fingerprint: str
    tasks: dict[str, TaskScore]
    average: float
    inputs: str


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made: its group, its output dtype, and what multiplies each expert (sorted by model string)."""

    spec: TensorSpec
    group: str
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class MergePlan:
    """All that a merge will do, known from headers and fingerprints alone.

    `weights` are the recipe's w_i and `order` the models' places in the recipe, both in the order in which experts are
    processed: sorted by `model:` string, so that the order in the recipe never changes a bit. `shards` lists output file names
    with the tensors they hold.
    """

    method: str
    base: str | None
    models: tuple[str, ...]
    order: tuple[int, ...]
    weights: tuple[float, ...]
    scale: float
    options: Mapping[str, object]
    tensors: tuple[TensorPlan, ...]
    shards: tuple[tuple[str, tuple[str, ...]], ...]
    bytes_read: int
    bytes_written: int
