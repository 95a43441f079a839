"""Killed at random instants and run again: the same bytes as if nothing had happened. `make test-long` kills ten times as often."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import QUIET
from tests.faults.merges import Case, large, tiny

KILLS = int(os.environ.get("SENSMERGE_KILLS", "20"))
# So many kills hit one merge before it may come to its end.
IN_A_ROW = 4


class Zygote:
    """Runs the command line in processes of its own that need no time to start."""

    def __init__(self, warm: Path, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "tests.faults.zygote", str(warm)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **QUIET}
        )
        assert self._line() == "ready"

    def start(self, *arguments: str) -> int:
        """Begin; the number of the process."""
        assert self.process.stdin is not None
        print(json.dumps([str(self.log), *arguments]), file=self.process.stdin, flush=True)
        return int(self._line())

    def ended(self) -> int:
        """Wait for the end; the exit code, negative for a signal."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return int(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def model_files(folder: Path) -> dict[str, bytes]:
    """What "the same bytes" means: weights, config and tokenizer."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name.startswith("model") or path.name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return large(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("zygote")
    warm = tiny(folder, "ties", experts=2, more="parameters: {density: 0.4}\n").recipe
    process = Zygote(warm, folder / "stderr")
    yield process
    process.close()


def phase_of(case: Case) -> str:
    """How far the process had come that was killed."""
    journal = case.work / "journal"
    if not case.work.exists():
        return "5 in place" if (case.out / "sensmerge").exists() else "0 before the work began"
    if (case.work / "complete").exists():
        return "4 putting it in place"
    if (case.work / "model" / "sensmerge" / "merge.json").exists():
        return "4 putting it in place"
    if (case.work / "model" / "config.json").exists():
        return "3 config and tokenizer"
    if not journal.exists() or not journal.stat().st_size:
        return "1 room, no tensor done"
    ends: dict[str, int] = {}
    for line in journal.read_text().splitlines():
        file, end, _ = line.split("\t")
        ends[file] = max(ends.get(file, 0), int(end))
    return f"2 weights, {25 * min(3, sum(ends.values()) * 4 // 56_000_000)} % and more"


def has_tensors(journal: Path) -> bool:
    """Is a tensor done?"""
    try:
        return journal.stat().st_size > 0
    except OSError:
        return False


def durations(case: Case, zygote: Zygote, *arguments: str) -> tuple[float, float]:
    """Seconds of an undisturbed merge until its first tensor is done, and from there to its end."""
    case.clear(old=False)
    started = time.monotonic()
    zygote.start(*arguments)
    while not has_tensors(case.work / "journal") and time.monotonic() - started < 60:
        time.sleep(0.001)
    first = time.monotonic()
    assert zygote.ended() == 0, zygote.log.read_text()
    return first - started, time.monotonic() - first


def test_killed_at_random_instants(case: Case, zygote: Zygote, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", str(case.recipe), str(case.out), "--shard-size", str(case.shard_bytes), "--jobs", "1"]
    lead, work = durations(case, zygote, *arguments)
    expected = model_files(case.out)
    assert sum(map(len, expected.values())) > 50_000_000
    chance = random.Random(int(os.environ.get("SENSMERGE_SEED", "0")))
    hit: Counter[str] = Counter()
    after_data = in_a_row = resumed = 0
    case.clear(old=False)
    while hit.total() < KILLS:
        pid = zygote.start(*arguments)
        # At most a third: those that come late find a process that has ended, and count for nothing.
        if in_a_row == 0 and hit.total() - after_data < KILLS // 3 and chance.random() < 0.4:
            time.sleep(chance.random() * lead)
        else:
            began = time.monotonic()
            if in_a_row:
                # It reads what is there before it goes on.
                time.sleep(lead)
            while not has_tensors(case.work / "journal") and not case.out.exists() and time.monotonic() - began < 60:
                time.sleep(0.002)
            # Rather early: the later part of a merge is waiting for the disk.
            time.sleep(chance.random() ** 3 * work)
        os.kill(pid, signal.SIGKILL)
        code = zygote.ended()
        resumed += "going on with an interrupted merge" in zygote.log.read_text()
        if code == -signal.SIGKILL:
            phase = phase_of(case)
            hit[phase] += 1
            after_data += phase[0] in "2345"
            in_a_row += 1
        else:
            assert code == 0, zygote.log.read_text()
        if code == 0 or in_a_row == IN_A_ROW or hit.total() == KILLS:
            zygote.start(*arguments)
            assert zygote.ended() == 0, zygote.log.read_text()
            resumed += "going on with an interrupted merge" in zygote.log.read_text()
            assert model_files(case.out) == expected
            assert [path.name for path in case.out.parent.iterdir()] == ["out"]
            case.clear(old=False)
            in_a_row = 0
    with capsys.disabled():
        print(f"\n{hit.total()} kills, {after_data} after the first tensor was done; {resumed} runs went on with one:")
        for phase, count in sorted(hit.items()):
            print(f"  {phase[2:]:24s} {'#' * count} {count}")
    assert after_data >= KILLS / 2
    assert resumed >= KILLS / 10
