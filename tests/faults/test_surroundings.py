"""What stands around a merge: closed streams, folders that vanish, odd names, links that somebody put there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import sensmerge as sm
from sensmerge.errors import OutputError
from sensmerge.records import Coefficients
from tests.conftest import QUIET, Run
from tests.faults.injector import Crash, Failing, judging
from tests.faults.merges import Case, tiny, tree
from tests.faults.test_resuming import Acting, interrupt

SENSMERGE = f"{shlex.quote(sys.executable)} -m sensmerge"
WATCHED = """
import os, sys
from sensmerge.checkpoints import files
from sensmerge.cli import main
opened, take = [], files.open_output
def told(path, *, new=True):
    opened.append(take(path, new=new))
    return opened[-1]
files.open_output = told
try:
    main()
finally:
    with open(os.environ["TOLD"], "w") as file:
        file.write(repr(sorted(set(opened))))
"""


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, shell=True, env={**os.environ, **QUIET, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path, closed: str) -> None:
    """Messages, ours and those of libraries, would be written into the weights."""
    case = tiny(tmp_path, old=False)
    told = tmp_path / "told"
    words = [sys.executable, "-c", WATCHED, "merge", str(case.recipe), str(case.out)]
    done = shell(f"{shlex.join(words)} {closed}", TOLD=str(told))
    assert done.returncode == 0, done.stderr
    assert json.loads(told.read_text())[0] > 2
    assert (case.out / "model.safetensors").exists()


def test_a_failure_without_any_stream_has_its_exit_code(tmp_path: Path) -> None:
    assert shell(f"{SENSMERGE} merge {tmp_path}/no.yml {tmp_path}/out <&- >&- 2>&-").returncode == 2


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    case = tiny(tmp_path / "case", old=False)
    gone = tmp_path / "gone"
    done = shell(f"mkdir {gone}; cd {gone}; rmdir {gone}; {SENSMERGE} merge {case.recipe} {case.out}")
    assert done.returncode == 2
    assert "the current folder cannot be found" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    """A merge that succeeded is not told as a failure, and --json stays JSON."""
    case = tiny(tmp_path, old=False)
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = shell(f"{SENSMERGE} merge {case.recipe} {case.out.parent}/größe", **ascii_only)
    assert done.returncode == 0, done.stderr
    done = shell(f"{SENSMERGE} merge {case.recipe} {case.out.parent}/größe --json", **ascii_only)
    assert json.loads(done.stdout)["folder"].endswith("größe")


@pytest.mark.parametrize("length", [240, 300])
def test_a_name_that_is_too_long_for_its_lock(tmp_path: Path, length: int) -> None:
    case = tiny(tmp_path, old=False)
    long = Case(case.folder, case.recipe, case.out.with_name("x" * length))
    with pytest.raises(OutputError, match="name is too long") as caught:
        long.merge(overwrite=False)
    assert "choose a shorter name" in caught.value.fix
    Case(case.folder, case.recipe, case.out.with_name("x" * 238)).merge(overwrite=False)


def test_the_command_that_is_told_can_be_pasted_whatever_the_names(tmp_path: Path, sensmerge: Run) -> None:
    case = tiny(tmp_path / "my models", old=False)
    out = case.out.with_name("it's; new")
    out.mkdir()
    (out / "old.txt").write_text("old")
    done = sensmerge("merge", case.recipe, out)
    assert done.returncode == 7
    fix = done.stderr.rstrip().split("\n")[-1]
    done = shell(fix[fix.index("sensmerge merge") :].replace("sensmerge", SENSMERGE, 1))
    assert done.returncode == 0, done.stderr
    assert not (out / "old.txt").exists()


def test_a_link_that_leads_nowhere_beside_the_weights(tmp_path: Path) -> None:
    """As in a hub cache from which what nobody needs was deleted."""
    case = tiny(tmp_path, old=False)
    (tmp_path / "base" / "consolidated.safetensors").symlink_to(tmp_path / "nowhere")
    case.merge(overwrite=False)
    assert case.out.exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_nothing_is_written_through_what_lies_in_the_place_of_a_file(tmp_path: Path, kind: str) -> None:
    case = tiny(tmp_path)
    case.merge()
    new = tree(case.out)
    interrupt(case, 0.9)
    precious = tmp_path / "precious"
    for file in [*sorted((case.work / "model").glob("*.safetensors"))]:
        precious.write_bytes(file.read_bytes()[:-7] + b"thesis.")
        file.unlink()
        if kind == "link":
            file.symlink_to(precious)
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.mkdir()
    before = precious.read_bytes()
    case.merge()
    assert tree(case.out) == new
    assert precious.read_bytes() == before
    assert not any(path.is_symlink() for path in case.out.rglob("*"))


@pytest.mark.parametrize("name", [".out.sensmerge.lock", ".out.sensmerge/journal"])
def test_lock_and_journal_are_never_written_through_a_link(tmp_path: Path, name: str) -> None:
    case = tiny(tmp_path)
    interrupt(case)
    precious = tmp_path / "precious"
    precious.write_text("thesis")
    link = case.out.parent / name
    link.unlink(missing_ok=True)
    link.symlink_to(precious)
    with pytest.raises(sm.SensmergeError):
        case.merge()
    assert precious.read_text() == "thesis"


def test_a_model_that_lies_in_the_work_folder_is_not_thrown_away(tmp_path: Path) -> None:
    case = tiny(tmp_path)
    inside = case.work / "old"
    case.work.mkdir()
    (tmp_path / "expert-0").rename(inside)
    case.recipe.write_text(case.recipe.read_text().replace("expert-0", str(inside)))
    before = tree(inside)
    for restart in (False, True):
        with pytest.raises(OutputError, match="would overwrite a model of the recipe"):
            case.merge(restart=restart)
    assert tree(inside) == before


FORMS = [
    {"inputs": 3},
    {"inputs": {"base": 3}},
    {"inputs": {"base": [3]}},
    {"versions": 3},
    {"inputs": {"base": ["x", 3]}},
]


@pytest.mark.parametrize("identity", FORMS, ids=json.dumps)
def test_a_state_of_another_form_is_another_merge(tmp_path: Path, identity: object) -> None:
    case = tiny(tmp_path)
    interrupt(case)
    (case.work / "state.json").write_text(json.dumps({"identity": identity}))
    with pytest.raises(OutputError, match="was another one") as caught:
        case.merge()
    assert caught.value.fix.endswith("--restart")
    case.merge(restart=True)
    assert case.out.exists()


def test_a_file_in_the_place_of_the_work_folder_is_left_alone(tmp_path: Path) -> None:
    case = tiny(tmp_path)
    case.work.write_text("thesis")
    with pytest.raises(OutputError, match="in the way"):
        case.merge()
    assert case.work.read_text() == "thesis"


def test_too_few_files_may_be_open(tmp_path: Path) -> None:
    """The limit is named, not the models; with a higher one the command ends well."""
    case = tiny(tmp_path, old=False)
    for name in ("base", "expert-0"):
        file = tmp_path / name / "model.safetensors"
        split_into_files(file)
    command = f"{SENSMERGE} merge {case.recipe} {case.out} --jobs 1"
    for limit in (10, 12, 14):
        done = shell(f"ulimit -n {limit}; {command}")
        assert done.returncode == 6, done.stderr
        assert "too many files are open" in done.stderr
        assert "Traceback" not in done.stderr
    done = shell(f"ulimit -n 64; {command}")
    assert done.returncode == 0, done.stderr


def split_into_files(file: Path) -> None:
    """One tensor a file, with an index."""
    tensors = load_file(file)
    names = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, shard in names.items():
        save_file({name: tensors[name]}, file.with_name(shard))
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    file.unlink()


def test_what_came_into_being_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    case = tiny(tmp_path, old=False)

    def somebody() -> None:
        case.out.mkdir()
        (case.out / "thesis.txt").write_text("precious")

    with judging(Acting("allocate", 2, somebody)), pytest.raises(OutputError, match="not empty any more") as caught:
        case.merge(overwrite=False)
    assert tree(case.out) == {"thesis.txt": b"precious"}
    assert "what was merged is kept" in caught.value.fix
    case.merge(overwrite=True)
    assert not (case.out / "thesis.txt").exists()


def test_an_old_model_that_a_kill_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """Killed when the new model is in place and the old one not yet deleted: another merge begins as if it were."""
    case = tiny(tmp_path)
    counting = Failing(None, None)
    with judging(counting):
        case.merge()
    case.clear(old=True)
    with judging(Failing(counting.calls.index("exchange") + 1, None)), pytest.raises(Crash):
        case.merge()
    assert (case.work / "complete" / "old-only.txt").exists()
    case.recipe.write_text(case.recipe.read_text() + "parameters: {lambda: 0.5}\n")
    case.merge(overwrite=True)
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]


def test_other_coefficients_are_another_merge(tmp_path: Path) -> None:
    """Those that a program hands over are in no recipe."""
    case = tiny(tmp_path, experts=2)
    plain = case.recipe.read_text()
    case.recipe.write_text(plain + "sens: {rule: uniform}\n")
    case.merge()
    given = Coefficients.load(case.out / "sensmerge" / "coefficients.json")
    other = replace(given, sigma=[[1.5 * number for number in row] for row in given.sigma])
    case.recipe.write_text(plain)
    case.clear(old=False)
    recipe = sm.load_recipe(case.recipe)
    counting = Failing(None, None)
    with judging(counting):
        sm.merge(recipe, case.out, coefficients=given, jobs=1, shard_bytes=220)
    case.clear(old=False)
    last = len(counting.calls) - 1 - counting.calls[::-1].index("write")
    with judging(Failing(last, None)), pytest.raises(Crash):
        sm.merge(recipe, case.out, coefficients=given, jobs=1, shard_bytes=220)
    with pytest.raises(OutputError, match="what changed since: the coefficients"):
        sm.merge(recipe, case.out, coefficients=other, jobs=1, shard_bytes=220)
    sm.merge(recipe, case.out, coefficients=given, jobs=1, shard_bytes=220)


def test_a_complete_merge_leaves_another_ones_work_alone(tmp_path: Path) -> None:
    """To ask for the old merge again, while a new one lies unfinished, loses nothing of the new one."""
    case = tiny(tmp_path)
    case.merge()
    before, recipe = tree(case.out), case.recipe.read_text()
    changed = recipe + "parameters: {lambda: 0.5}\n"
    case.recipe.write_text(changed)
    counting = Failing(None, None)
    with judging(counting):
        sm.merge(sm.load_recipe(case.recipe), tmp_path / "aside", jobs=1, shard_bytes=case.shard_bytes)
    last = len(counting.calls) - 1 - counting.calls[::-1].index("allocate") + 12
    with judging(Failing(last, None)), pytest.raises(Crash):
        case.merge()
    work = tree(case.work)
    case.recipe.write_text(recipe)
    case.merge()
    assert tree(case.out) == before
    assert tree(case.work) == work
    case.recipe.write_text(changed)
    case.merge()
    weights = sorted((tmp_path / "aside").glob("*.safetensors"))
    assert len(weights) > 1
    assert all((case.out / file.name).read_bytes() == file.read_bytes() for file in weights)


def test_what_somebody_put_into_the_work_is_no_part_of_the_model(tmp_path: Path) -> None:
    case = tiny(tmp_path)
    interrupt(case)
    (case.work / "model" / "adapter_config.json").write_text("{}")
    case.merge()
    assert not (case.out / "adapter_config.json").exists()


@pytest.mark.parametrize("given", [0, 2])
def test_a_system_that_gives_no_more_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    case = tiny(tmp_path, "ties", experts=2, more="parameters: {density: 0.5, scope: global}\n")
    case.merge()
    expected = tree(case.out)
    case.clear(old=False)
    start, left = threading.Thread.start, [given]

    def scarce(thread: threading.Thread) -> None:
        left[-1] -= 1
        if left[-1] < 0:
            left[-1] = given
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    sm.merge(sm.load_recipe(case.recipe), case.out, jobs=8, shard_bytes=case.shard_bytes)
    assert tree(case.out) == expected


def test_a_remark_in_the_recipe_is_the_same_merge(tmp_path: Path) -> None:
    case = tiny(tmp_path, old=False)
    case.merge(overwrite=False)
    before = {path: path.stat().st_mtime_ns for path in case.out.rglob("*")}
    case.recipe.write_text("# a remark\n" + case.recipe.read_text())
    case.merge(overwrite=False)
    assert {path: path.stat().st_mtime_ns for path in case.out.rglob("*")} == before
