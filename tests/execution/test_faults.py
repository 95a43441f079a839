"""Faults of the engine that were found once and must not come back: at the edges, under interrupts, on failing disks."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from sensmerge import randomness
from sensmerge.checkpoints import digest
from sensmerge.checkpoints.writer import Shard, ShardWriter
from sensmerge.errors import ResourceError
from sensmerge.execution import convert, phases
from sensmerge.execution.run import execute
from sensmerge.execution.schedule import Schedule, run_in_threads
from sensmerge.methods.kernels.drop import drop
from sensmerge.methods.kernels.magprune import magprune
from sensmerge.methods.option import DENSITY
from sensmerge.records import TensorInput, TensorSpec
from sensmerge.settings import resolve
from tests.execution.plans import MemoryModel, plan_of, random_case, readers_of, run

FIRSTS = [0, 7, 2**32 - 700, 2**32, 5 * 2**32 - 3]


@pytest.mark.parametrize("first", FIRSTS)
def test_drop_keeps_what_the_public_draws_say(first: int) -> None:
    n = 1500
    draws = randomness.uniforms(3, "m", "t", first, n)
    keys = np.array([randomness.key(3, "m", "t")], np.uint32)
    hit = float(draws[11])
    for density in (0.0, 0.3, hit, hit + 2.0**-33, 1 - 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-53, 1.0):
        x = np.ones((1, n), np.float32)
        drop(n, first, n, x, np.array([[1.0, 1.0, density, 0.0]]), np.zeros((1, 3)), keys)
        assert np.array_equal(x[0] == 1, draws < density), density


@pytest.mark.parametrize("first", FIRSTS)
def test_magprune_keeps_what_the_public_draws_say(first: int) -> None:
    n = 1500
    draws = randomness.uniforms(3, "m", "t", first, n)
    keys = np.array([randomness.key(3, "m", "t")], np.uint32)
    hit = float(draws[11])
    for density in (0.3, hit, hit + 2.0**-33):
        x = np.ones((1, n), np.float32)
        magprune(n, first, n, x, np.array([[1.0, 1.0, density, 0.0]]), np.zeros((1, 3)), keys)
        assert np.array_equal(x[0] == 1, draws < density), density


def test_draws_are_keyed_by_the_name_in_the_output(tmp_path: Path) -> None:
    case = random_case("dare_linear", 0, (40, 50), 1, tensor="out", per_model={"density": (0.5,)}, w=(1.0,))
    plan = plan_of({"out": case})
    tensor = plan.tensors[0]
    plan = replace(plan, tensors=(replace(tensor, experts=(TensorInput("expert-0", "in"),)),))
    assert case.base is not None
    readers = {
        "base": MemoryModel("base", {"out": case.base}),
        "expert-0": MemoryModel("expert-0", {"in": case.experts[0]}),
    }
    execute(plan, readers, tmp_path)
    from safetensors.numpy import load_file

    moved = load_file(tmp_path / "model.safetensors")["out"] != case.base
    kept = randomness.uniforms(0, "expert-0", "out", 0, 2000).reshape(40, 50) < 0.5
    assert np.array_equal(moved, kept & (case.experts[0] != case.base))


def test_a_nan_is_no_number_in_bfloat16() -> None:
    values = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    for value in values:
        raw = np.empty(1, np.uint16)
        assert not convert.narrow_bf16(1, np.array([value]), np.zeros(1, np.float32), 1.0, False, raw)
        assert raw[0] & 0x7F80 == 0x7F80


def test_weights_are_summed_exactly(tmp_path: Path) -> None:
    case = random_case("task_arithmetic", 0, (10, 10), 3, options={"normalize": True}, w=(1e16, 1.0, -1e16))
    assert case.base is not None
    case = replace(case, experts=(case.base, case.experts[1], case.base))
    merged = run({"w": case}, tmp_path / "out")["w"]
    assert np.array_equal(merged, case.base + (case.experts[1] - case.base))


def test_what_waits_for_its_turn_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "WAITING_BYTES", 100)
    shard = Shard("model.safetensors", (TensorSpec("w", "F32", (100,)),))
    out = ShardWriter(tmp_path, shard)
    values = np.arange(100, dtype=np.float32)
    for start in range(90, -1, -10):
        out.write("w", start, values[start : start + 10])
        assert out._digest._kept <= 100
    assert out._digest._kept == 0
    assert not out._digest._waiting
    assert out.close() == xxhash.xxh3_128((tmp_path / "model.safetensors").read_bytes()).hexdigest()


class Units:
    def __init__(self, count: int, log: list[Any]) -> None:
        self.units = [(at, at + 1) for at in range(count)]
        self.log = log

    def work(self, worker: Any, unit: int) -> None:
        self.log.append(unit)

    def finish(self) -> None:
        self.log.append("finished")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_phase_without_units_is_passed(workers: int) -> None:
    log: list[Any] = []
    schedule = Schedule(iter([iter([Units(0, log)]), iter([Units(1, log), Units(0, log), Units(1, log)])]), ahead=3)
    thread = threading.Thread(target=run_in_threads, args=(schedule, list(range(workers))), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert log.count("finished") == 4


def test_an_interrupted_run_leaves_no_thread_at_work() -> None:
    """`Thread.join`, interrupted, takes a running thread for dead until Python 3.13 (gh-90882)."""
    busy = [0]

    class Slow(Units):
        def work(self, worker: Any, unit: int) -> None:
            busy[0] += 1
            time.sleep(1.5 if unit == 0 else 0.3)
            busy[0] -= 1

    # A shell starts its background jobs with SIGINT ignored, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.45, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_threads(Schedule(iter([iter([Slow(100, [])])]), ahead=3), list(range(4)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert busy[0] == 0


def test_a_failing_disk_at_the_end_leaks_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {f"t{at}": random_case("linear", at, (50,), 2) for at in range(6)}

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ResourceError):
        execute(plan_of(cases, shard_bytes=200), readers_of(cases), tmp_path, jobs=1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("layers", [24, 40, 48, 50, 60, 80])
def test_a_value_for_each_layer_is_that_layers_value(layers: int) -> None:
    for layer in range(layers):
        listed = tuple(1.0 if at == layer else 0.5 for at in range(layers))
        assert resolve([{"density": listed}], DENSITY, "w", layer / (layers - 1), where="") == 1.0


def test_a_file_has_its_room_before_any_piece_and_is_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    out = ShardWriter(tmp_path, Shard("model.safetensors", (TensorSpec("w", "F32", (1000,)),)))
    assert (tmp_path / "model.safetensors").stat().st_size > 4000
    out.write("w", 0, np.zeros(1000, np.float32))
    out.close()
    assert len(synced) == 1


def test_a_piece_past_its_tensor_is_refused_before_it_is_written(tmp_path: Path) -> None:
    specs = (TensorSpec("a", "F32", (4,)), TensorSpec("b", "F32", (4,)))
    out = ShardWriter(tmp_path, Shard("model.safetensors", specs))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="more bytes than 'a' has"):
        out.write("a", 2, np.ones(4, np.float32))
    assert (tmp_path / "model.safetensors").read_bytes() == before
    out.abandon()
    out.abandon()


def test_chunks_are_given_up_after_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[phases.ChunkStore] = []
    make = phases.ChunkStore.__init__

    def noted(self: phases.ChunkStore, *settings: Any) -> None:
        make(self, *settings)
        stores.append(self)

    monkeypatch.setattr(phases.ChunkStore, "__init__", noted)
    case = random_case("slerp", 0, (300, 301), 1, tensor="w", options={"t": 0.5})
    run({"w": case}, tmp_path / "out", jobs=2)
    assert stores
    assert not any(store._kept for store in stores)
    assert any(store._free for store in stores)


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_tensors_are_begun_than_ahead(ahead: int) -> None:
    begun = [0, 0]

    class Counted(Units):
        def finish(self) -> None:
            begun[0] -= 1

    def tensor() -> Any:
        begun[0] += 1
        begun[1] = max(begun)
        yield Counted(5, [])

    run_in_threads(Schedule((tensor() for _ in range(10)), ahead=ahead), list(range(8)))
    assert 1 <= begun[1] <= ahead


def test_too_many_open_files_are_told_with_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(ResourceError) as caught:
        ShardWriter(tmp_path, Shard("model.safetensors", ()))
    assert "--shard-size" in caught.value.fix
