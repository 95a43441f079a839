"""What the engine promises: the same bytes from any number of threads, chunks and orders; what cannot be merged is named."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensmerge.errors import IncompatibleModelsError, InputFileError, NonFiniteError
from sensmerge.execution import phases, tiles
from sensmerge.execution.run import execute, updates
from sensmerge.execution.schedule import Schedule, run_in_threads
from sensmerge.execution.tiles import TensorWork
from sensmerge.methods import METHODS
from tests.execution.plans import MemoryModel, plan_of, random_case, readers_of, run
from tests.methods.test_methods import EXPERTS, VARIANTS
from tests.oracle.methods64 import Case

# Several tiles, chunks and stretches: 64 Ki elements a tile, and rows that do not divide it.
LARGE = {"wide": (130, 3001), "long": (700_001,), "m": (61, 24)}


def large_cases(method: str, variant: dict[str, Any]) -> dict[str, Case]:
    settings = dict(variant)
    experts = settings.pop("experts", EXPERTS.get(method, 3))
    return {
        name: replace(random_case(method, place, shape, experts, tensor=name), **settings)
        for place, (name, shape) in enumerate(LARGE.items())
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", METHODS.names())
def test_threads_and_chunks_change_no_byte(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = large_cases(method, VARIANTS[method][-1 if method in ("nuslerp", "sce") else 0])
    run(cases, tmp_path / "one", jobs=1)
    expected = files(tmp_path / "one")
    for jobs, chunk_bytes in ((2, 1 << 20), (8, 1), (3, 100_000), (1, 1 << 26)):
        run(cases, tmp_path / f"{jobs}-{chunk_bytes}", jobs=jobs, chunk_bytes=chunk_bytes)
        assert files(tmp_path / f"{jobs}-{chunk_bytes}") == expected
    # With no room to keep what was read, everything is read again.
    monkeypatch.setattr(phases, "KEPT_BYTES", 0)
    run(cases, tmp_path / "again", jobs=2)
    assert files(tmp_path / "again") == expected


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp"])
def test_global_and_mixed_selections_do_not_depend_on_threads(method: str, tmp_path: Path) -> None:
    everywhere = {"per_model": {"density": (0.3, 0.6, 0.9)}, "options": {"scope": "global"}}
    variant = everywhere if method == "ties" else VARIANTS[method][0]
    cases = large_cases(method, variant)
    run(cases, tmp_path / "one", jobs=1)
    run(cases, tmp_path / "four", jobs=4, chunk_bytes=300_000)
    assert files(tmp_path / "one") == files(tmp_path / "four")


def test_a_tensor_does_not_depend_on_the_others(tmp_path: Path) -> None:
    cases = large_cases("dare_ties", VARIANTS["dare_ties"][0])
    whole = run(cases, tmp_path / "whole")
    for name in cases:
        alone = run({name: cases[name]}, tmp_path / name)
        assert alone[name].tobytes() == whole[name].tobytes()
    turned = run(cases, tmp_path / "turned", order=list(cases)[::-1], shard_bytes=1000)
    assert {name: values.tobytes() for name, values in turned.items()} == {n: v.tobytes() for n, v in whole.items()}


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear", "task_arithmetic", "ties"])
def test_an_expert_of_weight_zero_changes_nothing(method: str, tmp_path: Path) -> None:
    """The masks of the others stay as they are: draws are keyed by expert, not by turn."""
    density = {} if method == "task_arithmetic" else {"density": (0.5,) * 3}
    case = random_case(method, 1, (400, 300), 3, tensor="w", per_model=density, w=(1.0, 0.7, 0.0))
    fewer = replace(
        case,
        experts=case.experts[:2],
        names=case.names[:2],
        w=case.w[:2],
        per_model={name: values[:2] for name, values in density.items()},
    )
    three, two = run({"w": case}, tmp_path / "three")["w"], run({"w": fewer}, tmp_path / "two")["w"]
    assert np.array_equal(three, two)


def test_the_seed_changes_the_mask(tmp_path: Path) -> None:
    case = random_case("dare_linear", 1, (100, 100), 2, tensor="w", per_model={"density": (0.5, 0.5)})
    first = run({"w": case}, tmp_path / "a")["w"]
    second = run({"w": replace(case, options={"seed": 1})}, tmp_path / "b")["w"]
    assert np.mean(first != second) > 0.5


def test_updates_are_what_a_merge_scales_and_adds(tmp_path: Path) -> None:
    case = replace(large_cases("ties", VARIANTS["ties"][0])["wide"], scale=0.7)
    cases = {"w": case}
    formed = updates(plan_of(cases), readers_of(cases), {"w"})["w"].reshape(case.experts[0].shape)
    assert case.base is not None
    assert np.array_equal(case.base + np.float32(0.7) * formed, run(cases, tmp_path / "out")["w"])
    assert updates(plan_of(cases), readers_of(cases), set()) == {}


def test_integers_are_copied_or_refused(tmp_path: Path) -> None:
    case = random_case("linear", 0, (4,), 2, tensor="w")
    steps = np.arange(5)
    cases = {"w": case, "steps": replace(case, experts=(steps, steps), base=None)}
    plan = plan_of(cases)
    tensors = [replace(t, spec=replace(t.spec, dtype="I64")) if t.spec.name == "steps" else t for t in plan.tensors]
    plan = replace(plan, tensors=tuple(tensors))
    readers = readers_of(cases)
    execute(plan, readers, tmp_path)
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(tmp_path / "model.safetensors")["steps"], steps)
    readers["expert-1"] = MemoryModel("expert-1", {"w": case.experts[1], "steps": steps + 1})
    (tmp_path / "other").mkdir()
    with pytest.raises(IncompatibleModelsError, match="steps"):
        execute(plan, readers, tmp_path / "other")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_not_finite_is_named(dtype: str, value: float, jobs: int, tmp_path: Path) -> None:
    case = random_case("ties", 0, (300, 301), 2, tensor="w", per_model={"density": (0.2, 0.2)})
    broken = case.experts[1].copy()
    broken[250, 7] = value
    cases = {"w": replace(case, experts=(case.experts[0], broken))}
    (tmp_path / "out").mkdir()
    with pytest.raises(NonFiniteError) as caught:
        execute(plan_of(cases), readers_of(cases, dtype), tmp_path / "out", jobs=jobs)
    assert "expert-1" in caught.value.where
    assert "'w'" in caught.value.where
    assert "[250, 7]" in caught.value.where


def test_a_merge_that_overflows_is_named(tmp_path: Path) -> None:
    case = random_case("task_arithmetic", 0, (30, 31), 2, tensor="w", scale=1.0)
    large = case.experts[0].copy()
    large[3, 4] = 60_000.0
    cases = {"w": replace(case, experts=(large, case.experts[1]), w=(2.0, 1.0))}
    with pytest.raises(NonFiniteError) as caught:
        run(cases, tmp_path / "out", out_dtype="F16")
    assert "[3, 4]" in caught.value.where
    assert "12000" in caught.value.why


def test_a_source_that_fails_stops_all_threads(tmp_path: Path) -> None:
    cases = large_cases("task_arithmetic", {})
    readers = readers_of(cases)

    class Broken(MemoryModel):
        def __init__(self, inner: MemoryModel) -> None:
            self.inner, self.label, self.tensors = inner, inner.label, inner.tensors

        def read_into(self, name: str, start: int, out: Any) -> None:
            if name == "long":
                raise InputFileError("gone", where="here", why="test", fix="none")
            self.inner.read_into(name, start, out)

    readers["expert-1"] = Broken(readers["expert-1"])
    before = threading.active_count()
    with pytest.raises(InputFileError, match="gone"):
        execute(plan_of(cases), readers, tmp_path, jobs=4)
    assert threading.active_count() == before


class CountingPhase:
    """Counts its units; the next phase must not begin before all are done."""

    def __init__(self, units: int, log: list[Any], name: str, before: CountingPhase | None) -> None:
        self.units = [(at, at + 1) for at in range(units)]
        self.log, self.name, self.before, self.done, self.finished = log, name, before, 0, False

    def work(self, worker: Any, unit: int) -> None:
        assert self.before is None or self.before.finished
        self.log.append((self.name, unit))
        self.done += 1

    def finish(self) -> None:
        assert self.done == len(self.units)
        self.finished = True


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_unit_is_done_once_and_phases_follow_each_other(workers: int) -> None:
    log: list[Any] = []

    def tensor(name: str) -> Any:
        before = None
        for phase in range(3):
            before = CountingPhase(7, log, f"{name}{phase}", before)
            yield before

    run_in_threads(Schedule((tensor(name) for name in "abcdefgh"), ahead=3), list(range(workers)))
    assert sorted(log) == sorted(
        (f"{name}{phase}", unit) for name in "abcdefgh" for phase in range(3) for unit in range(7)
    )


def test_tiles_do_not_depend_on_chunks() -> None:
    cases = large_cases("model_stock", {"options": {"filter_wise": True}})
    plan, readers = plan_of(cases), readers_of(cases)
    method = METHODS.get("model_stock", where="test")
    for tensor in plan.tensors:
        for chunk_bytes in (1, 10_000, 1 << 20, 1 << 24):
            work = TensorWork(tensor, method, readers, chunk_bytes)
            assert work.tile % tensor.spec.shape[-1] == 0
            usual = TensorWork(tensor, method, readers)
            assert (work.tile, work.stretch) == (usual.tile, usual.stretch)
            starts = [start for start, _ in work.all_chunks]
            assert all(start % work.tile == 0 for start in starts)
            assert work.all_chunks[-1][1] == tensor.spec.elements
            assert len(work.stretches) <= tiles.STRETCHES
