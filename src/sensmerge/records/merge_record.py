"""merge.json: what a merge was made from and what it wrote, so that anyone can check it later."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .record import Record


@dataclass(frozen=True)
class MergeRecord(Record):
    """What `sensmerge check` starts from; it stands in the merged model's folder.

    `inputs` are the fingerprints of all models by their `model:` strings, `outputs` the XXH3-128 (hex) of every file of weights,
    `companions` that of every file beside them but the model card and this record. `searched` are the folders in which the recipe's
    relative paths were found, relative to the merged model's folder. `lambda_` is null where the method has none;
    `random_seed` is that of the method's draws, `seed` that of the calibration samples.
    `commits` are those of models that came from the hub.
    `identity` and `files` (sizes) are what a merge knows its own complete work by, null and empty where nothing was written.
    """

    SCHEMA: ClassVar[int] = 3

    schema: int
    method: str
    parameters: dict[str, Any]
    lambda_: float | None
    random_seed: int | None
    inputs: dict[str, str]
    searched: list[str]
    outputs: dict[str, str]
    companions: dict[str, str]
    versions: dict[str, str]
    seed: int | None
    finished: str
    seconds: float
    warnings: list[str]
    commits: dict[str, str] = field(default_factory=dict)
    identity: str | None = None
    files: dict[str, int] = field(default_factory=dict)
