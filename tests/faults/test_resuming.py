"""An interrupted merge is gone on with by the same command and refused to another; a complete one is not written again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import sensmerge as sm
from sensmerge import progress
from sensmerge.errors import InputFileError, NonFiniteError, OutputError
from tests.faults.injector import Crash, Failing, judging
from tests.faults.merges import Case, tiny, tree


def interrupt(case: Case, share: float = 0.6) -> None:
    """Crash when this share of the writes of weights is done."""
    case.clear(old=False)
    counting = Failing(None, None)
    with judging(counting):
        case.merge()
    case.clear(old=False)
    allocated = len(counting.calls) - 1 - counting.calls[::-1].index("allocate")
    end = counting.calls.index("sync", allocated)
    writes = [at for at in range(allocated, end) if counting.calls[at] == "write"]
    with judging(Failing(writes[int(share * len(writes))], None)), pytest.raises(Crash):
        case.merge()
    assert case.work.exists()


class Told:
    """What the user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def task(self, label: str, total: int) -> Any:
        return nullcontext(lambda steps: None)

    def message(self, text: str) -> None:
        self.lines.append(text)

    def warning(self, text: str) -> None:
        self.lines.append(text)


def changed_recipe(case: Case) -> None:
    case.recipe.write_text(case.recipe.read_text() + "parameters: {lambda: 0.5}\n")


def changed_input(case: Case) -> None:
    """One bit of a weight, with the file's time as it was: another copy of the file."""
    file = case.folder / "expert-0" / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.with_name("copy").write_bytes(data)
    os.utime(file.with_name("copy"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    file.with_name("copy").replace(file)


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (changed_recipe, {}, "the recipe"),
        (changed_input, {}, "the model 'expert-0' (model.safetensors)"),
        (lambda case: None, {"seed": 7}, "the random seed (it was 0, now 7)"),
        (lambda case: None, {"shard": 100}, "--shard-size"),
    ],
)
def test_another_merge_is_told_what_changed(
    tmp_path: Path, change: Callable[[Case], None], settings: dict[str, int], words: str
) -> None:
    """And both ways out work: to undo the change, and --restart."""
    method = "dare_linear" if "seed" in settings else "task_arithmetic"
    case = tiny(tmp_path, method)
    interrupt(case)
    shutil.copytree(tmp_path, tmp_path.with_name("before"))
    change(case)
    other = Case(case.folder, case.recipe, case.out, settings.get("shard", case.shard_bytes))
    work = tree(case.work)
    with pytest.raises(OutputError) as caught:
        other.merge(seed=settings.get("seed"))
    assert caught.value.exit_code == 7
    assert words in caught.value.why
    assert caught.value.fix.endswith("--restart")
    assert tree(case.work) == work, "the interrupted merge is untouched"
    other.merge(seed=settings.get("seed"), restart=True)
    restarted = tree(case.out)
    case.clear(old=False)
    other.merge(seed=settings.get("seed"))
    assert tree(case.out) == restarted
    shutil.rmtree(tmp_path.with_name("before"))


def test_the_change_undone_goes_on(tmp_path: Path) -> None:
    case = tiny(tmp_path)
    interrupt(case)
    text = case.recipe.read_text()
    changed_recipe(case)
    with pytest.raises(OutputError):
        case.merge()
    case.recipe.write_text(text + "# with a remark\n")
    told = Told()
    with progress.listening(told):
        case.merge()
    assert any("going on with an interrupted merge" in line for line in told.lines)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_what_is_finished_is_not_merged_again(tmp_path: Path, scope: str) -> None:
    """Far fewer bytes are written than by a merge from the start; a scope of the whole model needs its reads all the same."""
    case = tiny(tmp_path, "ties", experts=2, more=f"parameters: {{density: 0.5, scope: {scope}}}\n")
    case.clear(old=False)
    whole = Failing(None, None)
    with judging(whole):
        case.merge()
    new = tree(case.out)
    interrupt(case, 0.9)
    rest, told = Failing(None, None), Told()
    with judging(rest), progress.listening(told):
        case.merge()
    assert tree(case.out) == new
    weights = [calls.calls[: calls.calls.index("shutil.copyfile")] for calls in (whole, rest)]
    writes = [calls.count("write") for calls in weights]
    assert writes[1] < writes[0] / 2, writes
    assert any("% of it is there" in line for line in told.lines)


@pytest.mark.parametrize(
    "damage", ["a page lost", "a line lost", "a line cut off", "the state lost", "a file cut off", "a longer file"]
)
def test_what_a_power_failure_took_is_found(tmp_path: Path, damage: str) -> None:
    """Pages that never reached the disk, lines of the journal, the state: nothing is trusted that is not proven."""
    case = tiny(tmp_path)
    case.merge()
    new = tree(case.out)
    interrupt(case, 0.9)
    first = sorted((case.work / "model").glob("*.safetensors"))[0]
    journal = case.work / "journal"
    if damage == "a page lost":
        data = bytearray(first.read_bytes())
        data[-60:-40] = bytes(20)
        first.write_bytes(data)
    elif damage == "a line lost":
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[1:]))
    elif damage == "a line cut off":
        journal.write_bytes(journal.read_bytes()[:-9])
    elif damage == "the state lost":
        (case.work / "state.json").write_bytes(bytes(100))
    elif damage == "a longer file":
        first.write_bytes(first.read_bytes() + bytes(99))
    else:
        os.truncate(first, first.stat().st_size // 2)
    case.merge()
    assert tree(case.out) == new
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]


def test_a_complete_merge_is_not_written_again(tmp_path: Path) -> None:
    """With or without --overwrite; unless a file of it is missing, or it is another merge."""
    case = tiny(tmp_path)
    case.merge()
    before = {path: path.stat().st_mtime_ns for path in case.out.rglob("*")}
    told = Told()
    for overwrite in (False, True):
        with progress.listening(told):
            case.merge(overwrite=overwrite)
        assert "complete: nothing is written" in told.lines.pop()
    assert {path: path.stat().st_mtime_ns for path in case.out.rglob("*")} == before
    (case.out / "tokenizer.json").unlink()
    with pytest.raises(OutputError, match="not empty"):
        case.merge(overwrite=False)
    case.merge()
    assert (case.out / "tokenizer.json").exists()
    changed_input(case)
    with pytest.raises(OutputError, match="not empty"):
        case.merge(overwrite=False)


class Acting:
    """Does something once when the n-th call of a kind comes."""

    def __init__(self, call: str, number: int, action: Callable[[], object]) -> None:
        self.call, self.left, self.action = call, number, action

    def __call__(self, call: str, place: Any) -> None:
        self.left -= call == self.call
        if call == self.call and self.left == 0:
            self.action()


@pytest.mark.parametrize("action", ["shrinks", "replaced", "touched"])
def test_an_input_that_changes_during_the_merge(tmp_path: Path, action: str) -> None:
    """Bad input, exit 3, at the latest at the end; the output is untouched and nothing is left beside it."""
    case = tiny(tmp_path)
    file = tmp_path / "expert-0" / "model.safetensors"
    actions: dict[str, Callable[[], object]] = {
        "shrinks": lambda: os.truncate(file, 400),
        "replaced": lambda: shutil.copy2(file, tmp_path / "copy") and (tmp_path / "copy").replace(file),
        "touched": lambda: os.utime(file),
    }
    old = tree(case.out)
    with judging(Acting("allocate", 2, actions[action])), pytest.raises(InputFileError) as caught:
        case.merge()
    assert caught.value.exit_code == 3
    assert "expert-0" in str(caught.value)
    assert tree(case.out) == old
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]


def test_an_input_that_is_away_for_a_while(tmp_path: Path) -> None:
    """A network folder that is not there at the end is no other input: what was merged is kept, and gone on with."""
    case = tiny(tmp_path)
    with judging(Acting("allocate", 2, lambda: (tmp_path / "expert-0").rename(tmp_path / "away"))):
        with pytest.raises(InputFileError, match="cannot be found any more") as caught:
            case.merge()
        assert "goes on from here: sensmerge merge" in caught.value.fix
    (tmp_path / "away").rename(tmp_path / "expert-0")
    told = Told()
    with progress.listening(told):
        case.merge()
    assert any("100 % of it is there" in line for line in told.lines)


def test_a_weight_that_is_no_number_leaves_nothing(tmp_path: Path) -> None:
    import numpy as np

    case = tiny(tmp_path)
    file = tmp_path / "expert-0" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    file.write_bytes(data)
    with pytest.raises(NonFiniteError):
        case.merge()
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]


def test_a_foreign_folder_is_never_thrown_away(tmp_path: Path) -> None:
    case = tiny(tmp_path)
    case.work.mkdir()
    (case.work / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="in the way"):
        case.merge()
    assert tree(case.work) == {"thesis.txt": b"precious"}


def test_another_output_beside_it_is_another_merge(tmp_path: Path) -> None:
    case = tiny(tmp_path)
    interrupt(case)
    sm.merge(sm.load_recipe(case.recipe), case.out.parent / "other")
    assert case.work.exists()
