"""How the command speaks: progress bars on a terminal, plain lines elsewhere, all on standard error; results on standard output."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from .. import progress
from ..errors import RecipeError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# Without a terminal a running task says where it stands at most this often.
SECONDS_BETWEEN_LINES = 10.0


def fail(text: str, code: int) -> NoReturn:
    """Print an error on standard error and exit with `code`."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


def print_json(value: Any) -> None:
    """A command's result as one JSON document on standard output."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not utf8, allow_nan=False))


def parse_size(text: str) -> int:
    """Bytes in `5GB`, `200MB`, `1GiB` or a plain number. Raises RecipeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(
            f"'{text}' is no size",
            where="--shard-size",
            why="a number with KB, MB, GB, MiB or GiB is needed",
            fix="--shard-size 5GB",
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size_text(count: int) -> str:
    """Bytes for people, in powers of ten."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int = 1,
    bold: Sequence[Sequence[bool]] | None = None,
) -> None:
    """A table on standard output; the first `text_columns` are text, the others numbers; `bold` marks cells."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for at, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if at < text_columns else "right", no_wrap=True)
    for at, row in enumerate(rows):
        marks = [False] * len(row) if bold is None else bold[at]
        table.add_row(*(Text(text, "bold" if mark else "") for text, mark in zip(row, marks, strict=True)))
    # All the width it needs: a line that the terminal wraps can be read, a number that is cut cannot.
    console = Console(highlight=False, width=max(80, Console(width=1000).measure(table).maximum))
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(table)


class PlainListener:
    """Progress as plain lines, for logs and pipes."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """One line when the task ends, and one every ten seconds while it runs."""
        started = spoken = time.monotonic()
        done = 0

        def advance(steps: int) -> None:
            nonlocal done, spoken
            done += steps
            if time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                self.message(f"{label}: {100 * done // max(total, 1)} %")

        yield advance
        self.message(f"{label}: done in {time.monotonic() - started:.1f} s")

    def message(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        """One line that begins with "warning"."""
        self.message(f"warning: {text}")


class TerminalListener:
    """Progress bars, drawn by rich on standard error."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._live: Any = None

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar with its percentage and the time left; tasks inside a task share the display."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        outermost = self._live is None
        if outermost:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._live.start()
        bar = self._live.add_task(label, total=max(total, 1))
        try:
            yield lambda steps: self._live.update(bar, advance=steps)
        finally:
            if outermost:
                self._live.stop()
                self._live = None

    def message(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(text, markup=False)

    def warning(self, text: str) -> None:
        """One yellow line."""
        self._console.print(f"warning: {text}", style="yellow", markup=False)


@contextmanager
def listening_terminal() -> Iterator[None]:
    """Show progress and messages the way standard error allows."""
    listener: progress.Listener = TerminalListener() if sys.stderr.isatty() else PlainListener()
    with progress.listening(listener):
        yield
