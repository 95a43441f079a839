"""A file system that fails at the n-th call, or a machine that stops there."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sensmerge.checkpoints import files

Judge = Callable[[str, Any], None]

_judge: Judge | None = None


class Crash(BaseException):
    """Everything stops: what is open stays as it is, nothing is cleaned up."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """What is written past the seam (small files, through Python's own `open`) counts as well."""
    if _judge is None:
        return
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _judge("open", arguments[0])
    elif event in ("shutil.copyfile", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        _judge(event, arguments[0])


sys.addaudithook(_audit)


@contextmanager
def judging(judge: Judge) -> Iterator[None]:
    """Every call to the file system that matters goes past `judge`, which may raise."""
    global _judge
    _judge = judge
    files.watch(judge)
    try:
        yield
    finally:
        _judge = None
        files.watch(None)


class Failing:
    """The n-th call fails with `number`, or from the n-th on nothing works any more (`Crash`); counts the calls.

    `exchange` False: there is no renameat2.
    """

    def __init__(self, at: int | None, number: int | None, *, exchange: bool = True) -> None:
        self.at, self.number, self.exchange = at, number, exchange
        self.calls: list[str] = []

    def __call__(self, call: str, place: Any) -> None:
        self.calls.append(call)
        here = len(self.calls) - 1
        if self.at is not None and self.number is None and here >= self.at:
            raise Crash
        if self.at is not None and here == self.at:
            assert self.number is not None
            raise OSError(self.number, os.strerror(self.number))
        if call == "exchange" and not self.exchange:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
