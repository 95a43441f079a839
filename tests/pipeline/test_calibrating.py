"""Calibration of a recipe: what is measured, what is kept, and what an interruption costs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import sensmerge as sm
from sensmerge import progress
from sensmerge.records import Alignment, SensitivityProfile
from tests.builders import byte_tokenizer, tiny_llama, tiny_mixtral, write_jsonl
from tests.conftest import QUIET

NAMES = ("one", "two", "three")


def family(folder: Path, make: Any, rows: int = 4, names: Sequence[str] = NAMES) -> Path:
    """A base, an expert for each name, their tokenizer and their calibration data."""
    for seed, name in enumerate(("base", *names)):
        make(seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
        lines = [{"prompt": f"{name} {row}? ", "response": "yes " * (1 + row % 3)} for row in range(rows)]
        write_jsonl(folder / f"{name}.jsonl", lines)
    return folder


def recipe(folder: Path, names: Sequence[str] = NAMES, file: str = "recipe.yml", **sens: Any) -> Path:
    models = [{"model": name, "sens": {"data": f"{name}.jsonl"}} for name in names]
    text = {"merge_method": "task_arithmetic", "base_model": "base", "models": models, "sens": sens}
    (folder / file).write_text(yaml.safe_dump(text))
    return folder / file


class Heard:
    """A front end that writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        self.said.append(label)
        steps: list[int] = []
        yield steps.append
        assert sum(steps) == total, label

    def message(self, text: str) -> None:
        self.said.append(text)

    def warning(self, text: str) -> None:
        self.said.append(text)


def calibrated(path: Path, kept: Path) -> tuple[list[SensitivityProfile], Alignment, list[str]]:
    """Profiles, distances, and what was said meanwhile."""
    listener = Heard()
    with progress.listening(listener):
        profiles, alignment = sm.calibrate(sm.load_recipe(path), profiles_dir=kept, device="cpu")
    assert alignment is not None
    return profiles, alignment, listener.said


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("llamas"), tiny_llama)


def test_each_model_runs_once_over_each_task(llamas: Path, tmp_path: Path) -> None:
    """Its forward on its own task is that of its sensitivity: three backward passes, six forward passes, six pairs."""
    profiles, alignment, said = calibrated(recipe(llamas), tmp_path)
    assert sorted(label for label in said if label.startswith("sensitivity")) == [
        "sensitivity of one",
        "sensitivity of three",
        "sensitivity of two",
    ]
    forward = [label for label in said if "on the samples of" in label]
    assert sorted(forward) == sorted(f"{a} on the samples of {b}" for a in NAMES for b in NAMES if a != b)
    assert all(alignment.distances[i][j] > 0 for i in range(3) for j in range(3) if i != j)
    for profile in profiles:
        assert profile.paths["loop"] == 0
        assert profile.paths["batched"] > 10


def test_nothing_is_measured_twice(llamas: Path, tmp_path: Path) -> None:
    path = recipe(llamas)
    first = calibrated(path, tmp_path)
    again = calibrated(path, tmp_path)
    assert again[:2] == first[:2]
    assert again[2] == []


def test_a_further_expert_measures_only_what_is_new(llamas: Path, tmp_path: Path) -> None:
    """The old pairs are not run again, their numbers stay; all is as if measured at once."""
    two = recipe(llamas, NAMES[:2], "two.yml")
    three = recipe(llamas, NAMES, "three.yml")
    _, before, _ = calibrated(two, tmp_path / "kept")
    profiles, alignment, said = calibrated(three, tmp_path / "kept")
    assert [label for label in said if label.startswith("sensitivity")] == ["sensitivity of three"]
    assert not {"one on the samples of two", "two on the samples of one"} & set(said)
    assert alignment.per_sample[0][1] == before.per_sample[0][1]
    assert len(list((tmp_path / "kept" / "distances").iterdir())) == 6
    at_once, whole, _ = calibrated(three, tmp_path / "fresh")
    assert profiles == at_once
    for i in range(3):
        for j in range(3):
            assert alignment.per_sample[i][j] == pytest.approx(whole.per_sample[i][j], rel=1e-5)


def test_more_samples_measure_only_the_new_ones(llamas: Path, tmp_path: Path) -> None:
    """A sample's sums depend neither on how many others there are nor on how tensors are grouped."""
    calibrated(recipe(llamas, file="few.yml", samples=2), tmp_path / "kept")
    profiles, _, said = calibrated(recipe(llamas, file="all.yml", samples=4, group="module"), tmp_path / "kept")
    assert "one: 2 samples were measured before" in said
    fresh, _, _ = calibrated(recipe(llamas, file="all.yml", samples=4, group="module"), tmp_path / "fresh")
    for got, expected in zip(profiles, fresh, strict=True):
        assert got.tensors == pytest.approx(expected.tensors, rel=1e-5)
        assert got.layers == expected.layers


@pytest.mark.parametrize("fault", ["foreign", "cut", "no text", "not finite"])
def test_a_damaged_or_foreign_file_of_sums_is_begun_anew(fault: str, llamas: Path, tmp_path: Path) -> None:
    """What cannot be trusted is measured again: the profile is that of a fresh calibration."""
    path = recipe(llamas)
    fresh, _, _ = calibrated(path, tmp_path)
    (tmp_path / "profiles" / "one.json").unlink()
    file = tmp_path / "samples" / "one.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 4
    known = 0
    if fault == "foreign":
        file.write_text((tmp_path / "samples" / "two.jsonl").read_text())
    elif fault == "cut":
        known = 2
        file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    elif fault == "no text":
        file.write_bytes(b"\xff\xfe" + file.read_bytes())
    else:
        entry = json.loads(lines[1])
        entry["sums"] = dict.fromkeys(entry["sums"], float("nan"))
        file.write_text("\n".join([lines[0], json.dumps(entry), *lines[2:]]) + "\n")
    profiles, _, said = calibrated(path, tmp_path)
    assert "sensitivity of one" in said
    assert "sensitivity of two" not in said
    assert [line for line in said if "were measured before" in line] == (
        [f"one: {known} samples were measured before"] if known else []
    )
    assert profiles[0].tensors == pytest.approx(fresh[0].tensors, rel=1e-5)
    assert len(file.read_text().splitlines()) == 1 + 4


def test_a_calibration_that_was_killed_goes_on_at_its_sample(tmp_path: Path) -> None:
    """`kill -9` in the middle of the samples of a real run; then the same again. The profiles are those of a whole run.

    The models are measured a sample at a time, so that every sample is kept as it is done.
    """
    folder = family(tmp_path / "family", tiny_mixtral, rows=60, names=NAMES[:2])
    path = recipe(folder, NAMES[:2])
    command = [sys.executable, "-m", "sensmerge", "calibrate", str(path), "--device", "cpu"]
    running = subprocess.Popen(
        command, env={**os.environ, **QUIET}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kept = path.with_suffix(".sens")
    sums = kept / "samples" / "one.jsonl"
    try:
        while running.poll() is None and (not sums.is_file() or sums.read_bytes().count(b"\n") < 6):
            time.sleep(0.002)
        assert running.poll() is None, "it ended before it could be killed"
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not (kept / "profiles").exists()
    measured = sum(line.endswith("}}") for line in sums.read_text().splitlines()[1:])
    assert 5 <= measured < 60
    resumed, _, said = calibrated(path, kept)
    assert f"one: {measured} samples were measured before" in said
    whole, _, _ = calibrated(path, tmp_path / "whole")
    for got, expected in zip(resumed, whole, strict=True):
        assert got.paths["loop"] == 4
        assert got.tensors == pytest.approx(expected.tensors, rel=1e-6)
        assert dataclasses.replace(got, tensors={}, per_sample=[], sensitivity=[]) == dataclasses.replace(
            expected, tensors={}, per_sample=[], sensitivity=[]
        )
