"""Exact order statistics of non-negative numbers that are never held at once: two histograms of their bits.

For non-negative float32 numbers the order of the values is the order of their bits. A first pass counts the upper 16 bits; it
tells in which bin each place lies, and a second pass counts the lower 16 bits inside that bin. Counts are integers, so neither the
order in which tiles are seen nor their size matters, and every value is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..methods.kernel import kernel

COARSE = 1 << 15
FINE = 1 << 16


@kernel
def count_coarse(n: int, values: Any, counts: Any, zeros: Any) -> None:
    """counts[row, upper 16 bits of |value|] += 1 and zeros[row] += 1 for zeros, over values[rows, :n]."""
    for row in range(values.shape[0]):
        bits = values[row].view(np.uint32)
        bins = counts[row]
        for i in range(n):
            bins[np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1
        none = 0
        for i in range(n):
            none += np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) == 0
        zeros[row] += none


@kernel
def count_fine(n: int, values: Any, bins: Any, counts: Any) -> None:
    """counts[row, place, lower 16 bits] += 1 for the values whose upper 16 bits are bins[row, place]; -1 is no bin.

    Blocks are first looked over as a whole, which the compiler vectorises. Few values lie in a bin, but for one case: the
    differences of bf16 weights have few bits, so that many of them are the bin's lowest value. Those are counted apart.
    """
    span = np.uint32(65535)
    for row in range(values.shape[0]):
        for place in range(bins.shape[1]):
            if bins[row, place] < 0:
                continue
            lowest = np.uint32(bins[row, place] << 16)
            inside = counts[row, place]
            ties = np.int64(0)
            for start in range(0, n, 64):
                bits = values[row, start : min(start + 64, n)].view(np.uint32)
                found, equal = np.uint32(0), np.uint32(0)
                for i in range(bits.shape[0]):
                    above = np.uint32(np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) - lowest)
                    equal += np.uint32(above == np.uint32(0))
                    found |= np.uint32(np.uint32(above - np.uint32(1)) < span)
                ties += np.int64(equal)
                if found:
                    for i in range(bits.shape[0]):
                        above = np.uint32(np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) - lowest)
                        if np.uint32(above - np.uint32(1)) < span:
                            inside[above] += 1
            inside[0] += ties


class Counter:
    """What one worker counts for one selection."""

    def __init__(self, rows: int) -> None:
        self.coarse = np.zeros((rows, COARSE), np.int64)
        self.zeros = np.zeros(rows, np.int64)
        self.fine = np.zeros((rows, 0, FINE), np.int64)

    def clear(self) -> None:
        """Set everything to zero."""
        for counts in (self.coarse, self.zeros, self.fine):
            counts.fill(0)


class Counters:
    """Counters to be used again: making one anew for each tensor would cost more than counting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Counter] = []

    def take(self, rows: int) -> Counter:
        """An empty counter of `rows` rows."""
        with self._lock:
            fitting = next((each for each in self._free if len(each.coarse) == rows), None)
            if fitting is not None:
                self._free.remove(fitting)
        return fitting or Counter(rows)

    def give(self, counter: Counter) -> None:
        """Take back a counter."""
        counter.clear()
        with self._lock:
            self._free.append(counter)


class Selection:
    """The values at some places of each row's ascending order: coarse counts, `locate`, fine counts, `values`."""

    def __init__(self, rows: int, counters: Counters) -> None:
        self.rows = rows
        self.bins = np.zeros((rows, 0), np.int64)
        self._inside = np.zeros((rows, 0), np.int64)
        self._counters = counters
        self._lock = threading.Lock()
        self._used: dict[int, Counter] = {}

    def counter(self, worker: object) -> Counter:
        """The counter of one worker."""
        with self._lock:
            if id(worker) not in self._used:
                self._used[id(worker)] = self._counters.take(self.rows)
            counter = self._used[id(worker)]
        places = self.bins.shape[1]
        if counter.fine.shape[1] != places and places:
            counter.fine = np.zeros((self.rows, places, FINE), np.int64)
        return counter

    def zeros(self) -> list[int]:
        """How many values of each row are zero, once the coarse counts are complete."""
        return _sum([each.zeros for each in self._used.values()]).tolist()  # type: ignore[no-any-return]

    def locate(self, places: Sequence[Sequence[int]]) -> None:
        """Find the bin of each 0-based place; a place past the last value has none."""
        wanted = np.array(places, np.int64)
        self.bins = np.full(wanted.shape, -1, np.int64)
        self._inside = np.zeros(wanted.shape, np.int64)
        for row, below in enumerate(_sum([each.coarse for each in self._used.values()]).cumsum(axis=1)):
            for at, place in enumerate(wanted[row]):
                if place < below[-1]:
                    found = int(np.searchsorted(below, place, side="right"))
                    self.bins[row, at] = found
                    self._inside[row, at] = place - (below[found - 1] if found else 0)

    def values(self) -> NDArray[np.float32]:
        """The values, float32 [rows, places]; infinity for a place past the last. The counters are given back."""
        bits = np.full(self.bins.shape, np.uint32(0x7F800000))
        for row, at in np.argwhere(self.bins >= 0):
            # Workers who took no part in the fine count have nothing to add.
            counted = [each for each in self._used.values() if each.fine.shape[1] == self.bins.shape[1]]
            inside = _sum([each.fine[row, at] for each in counted])
            low = int(np.searchsorted(inside.cumsum(), self._inside[row, at], side="right"))
            bits[row, at] = np.uint32(int(self.bins[row, at]) << 16 | low)
        for counter in self._used.values():
            self._counters.give(counter)
        self._used = {}
        return bits.view(np.float32)


def _sum(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
