"""The rows of a calibration file, in order: JSON lines, one JSON array, or Parquet. What one row is worth is not decided here.

Every row comes with its place in the file; a row that cannot be read comes with what is wrong with it instead of an entry.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CalibrationDataError

# Endings of the files that are read; anything else is taken for JSON lines.
PARQUET = ".parquet"
ENDINGS = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz", PARQUET)


@dataclass(frozen=True)
class Row:
    """One row: `line` of the file from 1 (in Parquet, which has no lines, the row's number), and its entry or its fault."""

    line: int
    entry: Any = None
    fault: str | None = None
    column: int | None = None


def read_rows(path: Path, columns: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a file; of Parquet only `columns`, if any are named. Raises CalibrationDataError if it cannot be opened.

    A `.json` file that begins with `[` is one array; every other text is JSON lines. Cost: the file's text in memory.
    """
    if path.suffix == PARQUET:
        yield from _parquet(path, columns)
        return
    text = _text_of(path)
    if path.name.removesuffix(".gz").endswith(".json") and text.lstrip()[:1] == "[":
        yield from _array(text)
        return
    # split, not splitlines: JSON strings may hold U+2028 and its like, which end no line of a file.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_line(number, line)


def _text_of(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise CalibrationDataError(
            "this calibration file is not UTF-8 text",
            where=f"{path}:{line}",
            why=str(error),
            fix="save the file as UTF-8, or name it .parquet or .gz if it is one",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CalibrationDataError:
    return CalibrationDataError(
        "cannot read this calibration file",
        where=str(path),
        why=str(error).split("\n")[0],
        fix="check the path in `sens: {data: …}`",
    )


def _checked(entry: Any) -> Any:
    # Half a surrogate pair is legal JSON and no text: no tokenizer can take it.
    json.dumps(entry, ensure_ascii=False, default=str).encode()
    return entry


def _json_line(number: int, line: str) -> Row:
    try:
        return Row(number, _checked(json.loads(line)))
    except json.JSONDecodeError as error:
        return Row(number, fault=f"not JSON at column {error.colno}: {error.msg}", column=error.colno)
    except (ValueError, RecursionError) as error:
        return Row(number, fault=f"cannot be read: {error}")


def _array(text: str) -> Iterator[Row]:
    """The elements of one JSON array, each with the line on which it begins; what follows a fault is not looked at."""
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0

    def blank(start: int) -> int:
        while start < len(text) and text[start] in " \t\r\n":
            start += 1
        return start

    def broken(place: int, message: str) -> Row:
        # Counted as JSON's own errors are: lines and columns from 1.
        column = place - text.rfind("\n", 0, place)
        return Row(text.count("\n", 0, place) + 1, fault=f"not JSON at column {column}: {message}", column=column)

    at = blank(at)
    first = True
    while text[at : at + 1] != "]":
        if not first:
            if text[at : at + 1] != ",":
                yield broken(at, "expecting ',' or ']'")
                return
            at = blank(at + 1)
        line, counted = line + text.count("\n", counted, at), at
        try:
            entry, end = decoder.raw_decode(text, at)
            yield Row(line, _checked(entry))
        except json.JSONDecodeError as error:
            yield broken(error.pos, error.msg)
            return
        except (ValueError, RecursionError) as error:
            yield Row(line, fault=f"cannot be read: {error}")
            return
        at, first = blank(end), False
    rest = blank(at + 1)
    if rest < len(text):
        yield broken(rest, "text after the array")


def _parquet(path: Path, columns: Collection[str]) -> Iterator[Row]:
    try:
        # An optional dependency: only who reads Parquet needs it.
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise CalibrationDataError(
            "reading a Parquet file needs pyarrow, which is not installed",
            where=str(path),
            why=str(error),
            fix="pip install pyarrow",
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in columns] if columns else None
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for entry in batch.to_pylist():
                    number += 1
                    try:
                        yield Row(number, _checked(entry))
                    except ValueError as error:
                        yield Row(number, fault=f"cannot be read: {error}")
    # pyarrow's errors are subclasses of these.
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(path, error) from error
