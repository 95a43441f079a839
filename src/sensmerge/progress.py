"""How long work tells its listener where it stands; silent unless a front end listens.

A library call never prints. The command line installs a `Listener`; a notebook or a service can install its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol


class Listener(Protocol):
    """What a front end implements to show progress and messages."""

    def task(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a task of `total` steps; the yielded function advances it by n steps."""

    def message(self, text: str) -> None:
        """Show one line: something the user should know but need not act on."""

    def warning(self, text: str) -> None:
        """Show one line: something the user should act on."""


_listener: ContextVar[Listener | None] = ContextVar("sensmerge_progress_listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Everything inside the `with` block reports to `listener`, to nobody if it is None."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def task(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """`with task("merging", n) as advance: ... advance(1)`: a step of work that may take more than a second."""
    listener = _listener.get()
    if listener is None:
        return nullcontext(lambda steps: None)
    return listener.task(label, total)


def message(text: str) -> None:
    """Tell the listener one line of information."""
    listener = _listener.get()
    if listener is not None:
        listener.message(text)


def warning(text: str) -> None:
    """Tell the listener one line that the user should act on."""
    listener = _listener.get()
    if listener is not None:
        listener.warning(text)
