"""Which worker does what next: units of work in file order, tensor after tensor, with a look ahead where a tensor must wait.

A tensor goes through phases (its passes, then the merge), each made of units that may run side by side; a phase begins when the one
before it is complete. While one worker finishes the last unit of a phase, the others begin with the next tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol


class Phase(Protocol):
    """One phase of a tensor: `units` that any worker may do, and what happens when all are done."""

    @property
    def units(self) -> Sequence[tuple[int, int]]:
        """(start, stop) of each unit."""

    def work(self, worker: Any, unit: int) -> None:
        """Do one unit; `worker` is what the thread owns."""

    def finish(self) -> None:
        """Called once, when all units are done, before the next phase begins."""


@dataclass
class _Open:
    """A tensor that was begun."""

    phases: Iterator[Phase]
    phase: Phase
    claimed: int = 0
    done: int = 0


@dataclass
class Schedule:
    """Hands out the units of many tensors; each tensor is an iterator of its phases, asked for the next when one is complete.

    At most `ahead` tensors are begun at a time.
    """

    tensors: Iterable[Iterator[Phase]]
    ahead: int
    _open: list[_Open] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting = iter(self.tensors)
        self._changed = threading.Condition()
        self._exhausted = False
        self._stopped = False

    def run(self, worker: object) -> None:
        """Work until nothing is left, or until `stop`."""
        while (claim := self._claim()) is not None:
            tensor, unit = claim
            tensor.phase.work(worker, unit)
            self._finished(tensor)

    def stop(self) -> None:
        """Have every worker return after its unit."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _claim(self) -> tuple[_Open, int] | None:
        with self._changed:
            while not self._stopped:
                for tensor in self._open:
                    if tensor.claimed < len(tensor.phase.units):
                        tensor.claimed += 1
                        return tensor, tensor.claimed - 1
                if len(self._open) < self.ahead and not self._exhausted:
                    self._begin()
                elif not self._open:
                    return None
                else:
                    self._changed.wait()
            return None

    def _begin(self) -> None:
        phases = next(self._waiting, None)
        if phases is None:
            self._exhausted = True
        elif (phase := _following(phases)) is not None:
            self._open.append(_Open(phases, phase))

    def _finished(self, tensor: _Open) -> None:
        with self._changed:
            tensor.done += 1
            if tensor.done < len(tensor.phase.units):
                return
        # Nobody else holds or can claim a unit of this tensor now: others go on while its next phase is made.
        tensor.phase.finish()
        phase = _following(tensor.phases)
        with self._changed:
            if phase is None:
                self._open.remove(tensor)
            else:
                tensor.phase, tensor.claimed, tensor.done = phase, 0, 0
            self._changed.notify_all()


def _following(phases: Iterator[Phase]) -> Phase | None:
    """The next phase that has units; those without are finished at once, since no worker would ever come to them."""
    for phase in phases:
        if phase.units:
            return phase
        phase.finish()
    return None


def run_in_threads(schedule: Schedule, workers: Sequence[object]) -> None:
    """Run `schedule` with one thread for each worker; the first error stops all of them and is raised here.

    Where the system gives fewer threads, those that it gives do all of the work.
    """
    if len(workers) == 1:
        schedule.run(workers[0])
        return
    errors: list[BaseException] = []

    def work(worker: object, ended: threading.Event) -> None:
        try:
            schedule.run(worker)
        except BaseException as error:
            errors.append(error)
            schedule.stop()
        finally:
            ended.set()

    ends = [threading.Event() for _ in workers]
    threads = [threading.Thread(target=work, args=each, daemon=True) for each in zip(workers, ends, strict=True)]
    try:
        started = _start(threads)
        if started == 0:
            work(workers[0], ends[0])
        # Not `join`: until Python 3.13 a thread whose join was interrupted counts as ended while it still runs (gh-90882).
        for ended in ends[:started]:
            ended.wait()
    except BaseException:
        # Interrupted: let the others come to the end of their unit before files are closed under them. A thread that only
        # begins now finds the schedule stopped and touches nothing.
        schedule.stop()
        for thread, ended in zip(threads, ends, strict=True):
            while thread.ident is not None and not ended.is_set():
                with suppress(KeyboardInterrupt):
                    ended.wait()
        raise
    for thread in threads[:started]:
        thread.join()
    if errors:
        raise errors[0]


def _start(threads: Sequence[threading.Thread]) -> int:
    """How many of the threads could be started: limits and a lack of memory end it."""
    for count, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError:
            return count
    return len(threads)
