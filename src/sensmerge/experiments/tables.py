"""Tables in the layout of the paper's Table 1: methods with and without Sens, task columns, the average last, the best in bold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line: a method, whether Sens was used (None for base and experts), and for each column its values over the seeds.

    `compared` rows compete for the best in their column; single models stand above them and do not. `notes` are printed behind
    the average.
    """

    method: str
    sens: bool | None
    values: Mapping[str, Sequence[float]]
    compared: bool
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Columns in order (without the average, which is added) and rows; all values in percent."""

    title: str
    columns: Sequence[str]
    note_columns: Sequence[str]
    rows: Sequence[Row]


def averages(row: Row, columns: Sequence[str]) -> list[float]:
    """The mean over columns, for each seed."""
    return [
        math.fsum(values) / len(columns) for values in zip(*(row.values[column] for column in columns), strict=True)
    ]


def _values(row: Row, column: str, columns: Sequence[str]) -> list[float]:
    return averages(row, columns) if column == "average" else list(row.values[column])


def _spelt(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def cells(table: Table) -> tuple[list[str], list[list[str]], list[list[bool]]]:
    """(header, rows of text, which cells are the best of their column): what every output format prints.

    Several seeds are told as mean ± sample standard deviation. The best is taken among the compared rows, by the mean; equal
    means share it.
    """
    scored = [*table.columns, "average"]
    best = {
        column: max(
            (statistics.fmean(_values(row, column, table.columns)) for row in table.rows if row.compared),
            default=math.inf,
        )
        for column in scored
    }
    header = ["method", "Sens", *scored, *table.note_columns]
    texts, bold = [], []
    for row in table.rows:
        values = {column: _values(row, column, table.columns) for column in scored}
        mark = "" if row.sens is None else "✓" if row.sens else "✗"
        texts.append([row.method, mark, *(_spelt(values[column]) for column in scored), *row.notes])
        winners = [row.compared and statistics.fmean(values[column]) >= best[column] for column in scored]
        bold.append([False, False, *winners, *([False] * len(row.notes))])
    return header, texts, bold


def markdown(table: Table) -> str:
    """The table as Markdown, best in bold."""
    header, texts, bold = cells(table)
    lines = [f"**{table.title}**", "", "| " + " | ".join(header) + " |", "|---|:-:|" + "---:|" * (len(header) - 2)]
    for row, marks in zip(texts, bold, strict=True):
        lines.append(
            "| " + " | ".join(f"**{text}**" if best else text for text, best in zip(row, marks, strict=True)) + " |"
        )
    return "\n".join(lines) + "\n"
