"""One measurement in a process of its own; prints JSON. Run by `python -m benchmarks.calibration`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sensmerge.calibration.batches import batch_of, call_arguments
from sensmerge.calibration.measure import MeasuredModel
from sensmerge.calibration.scores import WeightScore
from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.records import CalibrationSet


class Memory:
    """The largest anonymous memory of this process above what it had at the beginning, looked at every two milliseconds."""

    def __init__(self) -> None:
        self.start, self.peak, self._stop = self.now(), 0, False
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def now() -> int:
        """Bytes of anonymous memory."""
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def _watch(self) -> None:
        while not self._stop:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    def stop(self) -> int:
        """The peak."""
        self._stop = True
        return self.peak


def samples(count: int, tokens: int, vocabulary: int, *, equal: bool) -> CalibrationSet:
    """Random samples, the loss on their later half; of unlike lengths (padding) unless `equal`."""
    generator = torch.Generator().manual_seed(0)
    lengths = [tokens if equal or at % 2 == 0 else tokens - 4 * (at % 9) for at in range(count)]
    ids = tuple(tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist()) for length in lengths)
    masks = tuple((0,) * (length // 2) + (1,) * (length - length // 2) for length in lengths)
    return CalibrationSet(tuple(range(count)), ids, masks, "response", 0)


def timed(work: Callable[[], None]) -> dict[str, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def model_of(folder: Path, mode: str, dtype: str) -> MeasuredModel:
    """The model, not yet read."""
    return MeasuredModel(ModelFolder(folder), label="model", device="cpu", memory=mode, compute_dtype=dtype)


def sums(model: MeasuredModel, data: CalibrationSet) -> None:
    """The per-sample sums of all samples."""
    model.sums(data, WeightScore(), places=range(len(data.rows)), save=lambda *_: None)


def plain(model: MeasuredModel, data: CalibrationSet) -> None:
    """A plain forward and backward pass over the same samples in one batch, with gradients of all weights."""
    batch = batch_of(data, range(len(data.rows)), "cpu")
    parameters = list(model.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    batch.loss(model.model(input_ids=batch.ids, **call_arguments(model.model, batch)).logits).backward()
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)


def compared(folder: Path, dtype: str, data: CalibrationSet, rounds: int) -> dict[str, Any]:
    """Our pass and the plain one in turn, on the same resident weights."""
    model = model_of(folder, "resident", dtype)
    found: dict[str, Any] = {"plain": [], "sums": []}
    with model.held():
        for _ in range(rounds):
            found["plain"].append(timed(lambda: plain(model, data)))
            found["sums"].append(timed(lambda: sums(model, data)))
    return found


def alone(folder: Path, mode: str, dtype: str, data: CalibrationSet) -> dict[str, Any]:
    """One calibration of one model from opening it: what a user waits for, and its memory."""
    memory = Memory()
    model = model_of(folder, mode, dtype)

    def run() -> None:
        with model.held():
            sums(model, data)

    return {**timed(run), "imports": memory.start, "peak": memory.stop()}


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("compared", "resident", "streamed"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    vocabulary = int(json.loads((arguments.folder / "config.json").read_text())["vocab_size"])
    padded = arguments.what == "compared"
    data = samples(arguments.samples, arguments.tokens, vocabulary, equal=not padded)
    if padded:
        found = compared(arguments.folder, arguments.dtype, data, arguments.rounds)
    else:
        found = alone(arguments.folder, arguments.what, arguments.dtype, data)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
