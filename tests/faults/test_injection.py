"""Every call to the file system fails once: afterwards there is the whole old model or the whole new one, and a way on."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sensmerge.errors import InputFileError, OutputError, ResourceError, SensmergeError
from tests.faults.injector import Crash, Failing, judging
from tests.faults.merges import Case, tiny, tree

FAULTS = {"full": errno.ENOSPC, "failing": errno.EIO, "crash": None}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """In memory where the machine has such a file system: hundreds of merges wait thousands of times for a disk."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield tiny(Path(folder))


@pytest.fixture(scope="module")
def new(case: Case) -> dict[str, bytes]:
    """What an undisturbed merge writes."""
    case.clear(old=True)
    case.merge()
    return tree(case.out)


def calls_of(case: Case, *, old: bool, exchange: bool = True) -> list[str]:
    """The calls of an undisturbed merge."""
    case.clear(old=old)
    counting = Failing(None, None, exchange=exchange)
    with judging(counting):
        case.merge(overwrite=old)
    return counting.calls


def broken(case: Case, failing: Failing, *, old: bool) -> BaseException | None:
    """What a merge raises that is disturbed."""
    case.clear(old=old)
    try:
        with judging(failing):
            case.merge(overwrite=old)
    except (SensmergeError, Crash) as error:
        return error
    return None


@pytest.mark.parametrize(("fault", "old"), [("full", True), ("failing", True), ("crash", True), ("crash", False)])
def test_the_old_model_or_the_new_one_whatever_fails(case: Case, new: dict[str, bytes], fault: str, old: bool) -> None:
    calls = calls_of(case, old=old)
    assert ("exchange" in calls) is old
    case.clear(old=old)
    before = tree(case.out)
    seen = {"before": 0, "after": 0}
    for at in range(len(calls)):
        error = broken(case, Failing(at, FAULTS[fault]), old=old)
        now = tree(case.out)
        assert now in (before, new), (at, calls[at])
        seen["before" if now == before else "after"] += 1
        if fault != "crash":
            # An output that cannot be written and an input that cannot be read are told as such, never as a bug.
            assert error is None or isinstance(error, (ResourceError, InputFileError)), (at, calls[at], error)
            assert error is not None or now == new
        case.merge(overwrite=old)
        assert tree(case.out) == new, (at, calls[at])
        assert [path.name for path in case.out.parent.iterdir()] == ["out"], (at, calls[at])
    assert seen["before"] > 50
    assert seen["after"] > 0


@pytest.mark.parametrize("fault", ["failing", "crash"])
def test_without_an_exchange_the_next_run_finishes(case: Case, new: dict[str, bytes], fault: str) -> None:
    """Between its two renames a crash may leave nothing in place; whoever comes next puts the new model there."""
    calls = calls_of(case, old=True, exchange=False)
    case.clear(old=True)
    before = tree(case.out)
    between = 0
    for at in range(calls.index("exchange") - 3, len(calls)):
        broken(case, Failing(at, FAULTS[fault], exchange=False), old=True)
        now = tree(case.out)
        if not case.out.exists():
            assert fault == "crash"
            between += 1
            kept = [tree(case.work / name) for name in ("old", "complete")]
            assert kept == [before, new]
        else:
            assert now in (before, new), (at, calls[at])
        with judging(Failing(None, None, exchange=False)):
            case.merge()
        assert tree(case.out) == new
        assert [path.name for path in case.out.parent.iterdir()] == ["out"]
    assert between >= (fault == "crash")


def test_another_command_finishes_it_too(tmp_path: Path) -> None:
    """A recipe that has nothing to do with the merge finds the model in place, and does not overwrite it unasked."""
    case = tiny(tmp_path)
    case.clear(old=True)
    case.merge()
    new = tree(case.out)
    calls = calls_of(case, old=True, exchange=False)
    at = calls.index("exchange") + 1
    renames = [place for place in range(at, len(calls)) if calls[place] == "rename"]
    broken(case, Failing(renames[1], None, exchange=False), old=True)
    assert not case.out.exists()
    other = tmp_path / "other.yml"
    other.write_text("merge_method: linear\nmodels: [{model: base}]\n")
    with pytest.raises(OutputError, match="not empty"):
        Case(case.folder, other, case.out).merge(overwrite=False)
    assert tree(case.out) == new
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]


def test_a_folder_that_came_between_two_renames_is_never_taken_away(tmp_path: Path) -> None:
    case = tiny(tmp_path)
    calls = calls_of(case, old=True, exchange=False)
    renames = [place for place in range(calls.index("exchange") + 1, len(calls)) if calls[place] == "rename"]
    broken(case, Failing(renames[1], None, exchange=False), old=True)
    case.out.mkdir()
    (case.out / "precious.txt").write_text("kept")
    with pytest.raises(OutputError, match="came into being"):
        case.merge()
    assert tree(case.out) == {"precious.txt": b"kept"}
    (case.out / "precious.txt").rename(tmp_path / "precious.txt")
    case.merge()
    assert (case.out / "model.safetensors.index.json").exists()


def test_a_full_disk_says_how_to_go_on(case: Case, new: dict[str, bytes]) -> None:
    """Where something was finished it is kept, and the message has the command; where nothing was, nothing is left."""
    calls = calls_of(case, old=True)
    first, last = calls.index("allocate"), len(calls) - 1 - calls[::-1].index("write")
    error = broken(case, Failing(first, errno.ENOSPC), old=True)
    assert isinstance(error, ResourceError)
    assert "bytes are needed for the weights" in error.why
    assert not case.work.exists()
    error = broken(case, Failing(last, errno.ENOSPC), old=True)
    assert isinstance(error, ResourceError)
    assert error.what == "the disk is full"
    assert f"goes on from here: sensmerge merge {case.recipe} {case.out} --overwrite --shard-size 220" in error.fix
    assert case.work.exists()
    case.merge()
    assert tree(case.out) == new


class Noting:
    """What was done, and to which file: its number in the file system."""

    def __init__(self, case: Case, *, exchange: bool) -> None:
        self.case, self.exchange = case, exchange
        self.calls: list[tuple[str, int]] = []
        self.placed: dict[str, int] = {}

    def __call__(self, call: str, place: Any) -> None:
        path = None if isinstance(place, int) else Path(place)
        state = os.fstat(place) if path is None else path.stat() if path.exists() else None
        if (call == "exchange" and self.exchange) or (call == "rename" and place == self.case.out):
            new = self.case.work / "complete"
            self.placed = {str(path.relative_to(new)): path.stat().st_ino for path in [new, *new.rglob("*")]}
            self.placed["the folder of both"] = self.case.work.stat().st_ino
            call = "placed"
        self.calls.append((call, 0 if state is None else state.st_ino))
        if call == "exchange":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize("exchange", [True, False])
def test_every_byte_and_name_is_on_the_disk_before_the_model_is_in_place(case: Case, exchange: bool) -> None:
    """A power failure after the last step finds the new model, after any earlier one the old: nothing is put in place unsynced."""
    case.clear(old=True)
    noting = Noting(case, exchange=exchange)
    with judging(noting):
        case.merge()
    at = next(place for place, (call, _) in enumerate(noting.calls) if call == "placed")
    before, after = noting.calls[:at], noting.calls[at + 1 :]
    assert len(noting.placed) > 9
    for name, number in noting.placed.items():
        done = [call for call, each in before if each == number and call in ("sync", "write", "allocate")]
        assert done[-1:] == ["sync"], name
    names = [place for place, (call, _) in enumerate(before) if call == "rename"]
    assert ("sync", noting.placed["the folder of both"]) in before[names[-1] - 2 * (not exchange) :]
    parent = case.out.parent.stat().st_ino
    removal = next(place for place, (call, _) in enumerate(after) if call == "remove")
    assert ("sync", parent) in after[:removal], "the old model is deleted only when the new name is on the disk"
