"""What all records share: JSON in, JSON out, a hash of what they came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ..errors import InputFileError, ResourceError


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
