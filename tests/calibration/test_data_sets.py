"""Where samples come from: other kinds of files, folders, and data sets of the hub (a stand-in of it, on this machine)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sensmerge.calibration.data_sets import chosen, folder_files, splits_of
from sensmerge.calibration.hub_data import is_hub_id
from sensmerge.calibration.samples import Sample, read_samples
from sensmerge.errors import CalibrationDataError
from tests.builders import write_jsonl

ROWS = [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(6)]
SAMPLES = [Sample(n, n + 1, prompt=f"q{n}", response=f"a{n}") for n in range(6)]


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", ["", "\ufeff", "\r\n \t"])
def test_one_json_array(tmp_path: Path, indent: int | None, before: str) -> None:
    """An element's line is that on which it begins."""
    path = tmp_path / "data.json"
    path.write_text(before + json.dumps(ROWS, indent=indent) + "\n", encoding="utf-8")
    found = read_samples(path)
    assert [(s.row, s.prompt, s.response) for s in found] == [(s.row, s.prompt, s.response) for s in SAMPLES]
    first = 1 + before.count("\n")
    assert [s.line for s in found] == ([first + 1 + 4 * n for n in range(6)] if indent else [first] * 6)
    assert found[3].place == f"{path}:{found[3].line}"


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    assert read_samples(write_jsonl(tmp_path / "data.json", ROWS)) == SAMPLES


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('[\n{"text": "x"},\n{"text" "y"}]', 3, 9),
        ('[{"text": "x"}\n {"text": "y"}]', 2, 2),
        ('[{"text": "x"},\n]', 2, 1),
        ('[{"text": "x"}', 1, 15),
        ('[{"text": "x"}]\n  7', 2, 3),
        ("[", 1, 2),
    ],
)
def test_a_broken_array_is_told_by_line_and_column(tmp_path: Path, text: str, line: int, column: int) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(CalibrationDataError) as caught:
        read_samples(path)
    assert caught.value.where == f"{path}:{line}:{column}"
    assert "not JSON" in caught.value.why


def test_an_element_that_is_no_sample(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"text": "x"},\n 7,\n {"text": "\\ud83d"}]')
    with pytest.raises(CalibrationDataError) as caught:
        read_samples(path)
    assert caught.value.where == f"{path}:2"
    assert "found int" in caught.value.why


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / "a.jsonl", ROWS[:2]), write_jsonl(tmp_path / "b.jsonl", ROWS[2:])]
    found = read_samples(paths)
    assert [s.prompt for s in found] == [f"q{n}" for n in range(6)]
    assert [s.row for s in found] == list(range(6))
    assert [s.place for s in found][1:3] == [f"{paths[0]}:2", f"{paths[1]}:1"]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A Parquet file of two row groups by pyarrow, which is not a dependency of the project."""
    reason = "reading Parquet needs pyarrow, which the project does not depend on"
    pyarrow = pytest.importorskip("pyarrow", reason=reason)
    parquet = pytest.importorskip("pyarrow.parquet", reason=reason)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=max(1, len(rows) // 2))
    return path


def test_parquet(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"a{n}", "id": n} for n in range(6)]
    path = write_parquet(tmp_path / "d.parquet", rows)
    assert read_samples(path, {"prompt": "question", "response": "answer"}) == SAMPLES
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [sample] = read_samples(write_parquet(tmp_path / "m.parquet", [{"messages": turns}]))
    assert sample.messages == tuple(turns)


def test_a_parquet_row_that_is_no_sample_and_a_file_that_is_none(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [{"text": "x"}, {"text": None}])
    with pytest.raises(CalibrationDataError) as caught:
        read_samples(path)
    assert caught.value.where == f"{path}:2"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(CalibrationDataError, match="cannot read this calibration file"):
        read_samples(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(CalibrationDataError) as caught:
        read_samples(tmp_path / "d.parquet")
    assert caught.value.fix == "pip install pyarrow"


# ----------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["data.jsonl"], {("default", "train"): ("data.jsonl",)}),
        (["train.jsonl", "test.jsonl"], {("default", "test"): ("test.jsonl",), ("default", "train"): ("train.jsonl",)}),
        (["gsm_dev.json", "x.py", "README.md"], {("default", "validation"): ("gsm_dev.json",)}),
        (
            ["main/train-00000-of-00001.parquet", "socratic/test-00000-of-00001.parquet"],
            {
                ("main", "train"): ("main/train-00000-of-00001.parquet",),
                ("socratic", "test"): ("socratic/test-00000-of-00001.parquet",),
            },
        ),
        (
            ["data/train_sft-00000-of-00002-0a1b.parquet", "data/train_sft-00001-of-00002-0a1b.parquet"],
            {
                ("default", "train_sft"): (
                    "data/train_sft-00000-of-00002-0a1b.parquet",
                    "data/train_sft-00001-of-00002-0a1b.parquet",
                )
            },
        ),
        (
            ["main/train/0000.parquet", "main/train/0001.parquet", "main/odd/0000.parquet"],
            {
                ("main", "train"): ("main/train/0000.parquet", "main/train/0001.parquet"),
                ("main", "odd"): ("main/odd/0000.parquet",),
            },
        ),
        (["training/a.json", "eval/b.json"], {("default", "train"): ("training/a.json",), ("default", "test"): ("eval/b.json",)}),
        (["constrain.jsonl"], {("default", "train"): ("constrain.jsonl",)}),
    ],
)  # fmt: skip
def test_splits_by_how_files_are_named(files: list[str], expected: dict[Any, Any]) -> None:
    assert splits_of(files) == expected


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: parts/a-*
  - split: held
    path: [parts/b.jsonl, "deep/**"]
- config_name: other
  data_files: odd.json
---
# Text with configs: in it
"""


def test_a_card_that_lists_files_decides() -> None:
    files = ["parts/a-1.jsonl", "parts/a-2.jsonl", "parts/b.jsonl", "deep/er/c.jsonl", "odd.json", "test.jsonl"]
    assert splits_of(files, CARD) == {
        ("main", "train"): ("parts/a-1.jsonl", "parts/a-2.jsonl"),
        ("main", "held"): ("deep/er/c.jsonl", "parts/b.jsonl"),
        ("other", "train"): ("odd.json",),
    }


@pytest.mark.parametrize(
    "card", ["", "no head", "---\nlicense: mit\n---\n", "---\n: [\n---\n", "---\nconfigs: 3\n---\n"]
)
def test_a_card_that_says_nothing(card: str) -> None:
    assert splits_of(["test.jsonl"], card) == {("default", "test"): ("test.jsonl",)}


def test_what_is_not_named_is_asked_for_with_what_there_is() -> None:
    splits = splits_of(["main/train.jsonl", "main/test.jsonl", "easy/test.jsonl"])

    def refused(name: str | None, split: str | None) -> CalibrationDataError:
        with pytest.raises(CalibrationDataError) as caught:
            chosen(splits, name, split, label="o/d", where="r.yml:3")
        assert caught.value.where == "r.yml:3"
        return caught.value

    assert "easy, main" in refused(None, "test").why
    assert "easy, main" in refused("hard", "test").why
    assert "test, train" in refused("main", None).why
    assert "test, train" in refused("main", "dev").why
    assert "split: test" in refused("main", "dev").fix
    assert chosen(splits, "easy", None, label="o/d", where="") == ("easy/test.jsonl",)
    with pytest.raises(CalibrationDataError, match="no files of samples"):
        chosen(splits_of(["code.py"]), None, None, label="o/d", where="")


@pytest.mark.parametrize(
    "files",
    [
        ["data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet"],
        ["main/train/0001.parquet", "main/train/0002.parquet"],
    ],
)
def test_a_part_that_is_missing_is_named(files: list[str]) -> None:
    with pytest.raises(CalibrationDataError) as caught:
        chosen(splits_of(files), None, None, label="o/d", where="")
    assert "not complete" in caught.value.what
    assert "train-00001-of-00003" in caught.value.why or "train/0000" in caught.value.why


def test_a_folder_is_laid_out_as_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    (tmp_path / ".git").mkdir()
    write_jsonl(tmp_path / ".git" / "train.jsonl", ROWS)
    path = write_jsonl(tmp_path / "main" / "train.jsonl", ROWS)
    assert folder_files(tmp_path, "main", "train", label="x", where="") == (path,)


@pytest.mark.parametrize(
    ("path", "named", "may_be"),
    [
        ("openai/gsm8k", False, True), ("gsm8k", True, True), ("gsm8k", False, False), ("a/b.jsonl", False, False),
        ("a/b/c", True, False), ("/a/b", False, False), ("./b", False, False), ("../b", True, False), ("a b/c", True, False),
    ],
)  # fmt: skip
def test_what_may_be_a_data_set_of_the_hub(path: str, named: bool, may_be: bool) -> None:
    assert is_hub_id(path, named) is may_be


# -------------------------------------------------------------------------------------------------------------- hub


class Hub:
    """A stand-in of the hub's HTTP API: what huggingface_hub asks for data sets, over folders on this disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.gated = folder, [], False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                """Quiet."""

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
                hub.asked.append((self.command, path))
                status, headers, body = hub.answer(path)
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body: /api/datasets/O/D[/revision/R] and /datasets/O/D/resolve/R/FILE."""
        asks = path.startswith("/api/")
        repo, _, rest = path.partition("/datasets/")[2].partition("/revision/" if asks else "/resolve/")
        home = self.folder / repo
        if not home.is_dir() or repo.count("/") != 1:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if self.gated and not asks:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        branch = next((each for each in ("refs/convert/parquet", "main") if rest.startswith(each)), rest or "main")
        tree = home / branch.replace("/", "_")
        if not tree.is_dir():
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit = hashlib.sha1(f"{repo} {branch}".encode()).hexdigest()
        if asks:
            names = [p.relative_to(tree).as_posix() for p in sorted(tree.rglob("*")) if p.is_file()]
            answer = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            return 200, {"Content-Type": "application/json", "X-Repo-Commit": commit}, json.dumps(answer).encode()
        file = tree / rest[len(branch) + 1 :]
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = file.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}, body

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for command, path in self.asked if command == "GET" and "/resolve/" in path]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """o/lines has JSON lines and no card, o/card a card, o/script only what the hub made of it."""
    folder = tmp_path / "hub"
    for path, rows in {
        "o/lines/main/train.jsonl": ROWS,
        "o/lines/main/test.jsonl": ROWS[:1],
        "o/card/main/parts/a-1.jsonl": ROWS[:2],
        "o/card/main/parts/a-2.jsonl": ROWS[2:],
        "o/card/main/parts/b.jsonl": ROWS[:1],
        "o/card/main/odd.json": ROWS[:1],
        "o/script/main/README.md": [],
        "o/script/refs_convert_parquet/main/train/0000.jsonl": ROWS,
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / path, rows)
    (folder / "o/card/main/README.md").write_text(CARD)
    stand_in = Hub(folder)
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()


ASK = """
import json, sys
from sensmerge.calibration.hub_data import Asked, hub_files
from sensmerge.calibration.samples import read_samples
from sensmerge.errors import SensmergeError
try:
    files = hub_files(Asked(*json.loads(sys.argv[1]), where="recipe.yml:4", tried="here/o"))
    print(json.dumps([[str(file) for file in files], [sample.prompt for sample in read_samples(files)]]))
except SensmergeError as error:
    print(json.dumps([type(error).__name__, error.what, error.where, error.why, error.fix]))
"""


def ask(hub: Hub, cache: Path, *asked: str | None, offline: bool = False, url: str | None = None) -> Any:
    """What a process of its own finds, in whose environment HF_ENDPOINT is the stand-in."""
    environment = {
        **{
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))
        },
        "HF_ENDPOINT": url or hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
    }
    given = json.dumps([*asked, *[None] * (4 - len(asked))])
    done = subprocess.run(
        [sys.executable, "-c", ASK, given], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_split_is_downloaded_once_and_found_offline(hub: Hub, tmp_path: Path) -> None:
    """In the hub's own cache, where HF_HOME says."""
    files, prompts = ask(hub, tmp_path / "home", "o/lines", None, "train")
    assert prompts == [f"q{n}" for n in range(6)]
    assert files[0].startswith(str(tmp_path / "home" / "hub" / "datasets--o--lines" / "snapshots"))
    assert hub.downloads() == ["train.jsonl"], "and nothing else"
    assert ask(hub, tmp_path / "home", "o/lines", None, "train") == [files, prompts]
    assert hub.downloads() == ["train.jsonl"]
    requests = len(hub.asked)
    assert ask(hub, tmp_path / "home", "o/lines", None, "train", offline=True) == [files, prompts]
    assert len(hub.asked) == requests
    hub.server.shutdown()
    assert ask(hub, tmp_path / "home", "o/lines", None, "train", url="http://127.0.0.1:9") == [files, prompts]


def test_the_card_says_which_files(hub: Hub, tmp_path: Path) -> None:
    for offline in (False, True):
        files, prompts = ask(hub, tmp_path / "home", "o/card", "main", "train", offline=offline)
        assert [Path(file).name for file in files] == ["a-1.jsonl", "a-2.jsonl"]
        assert prompts == [f"q{n}" for n in range(6)]


def test_the_hub_s_conversion_stands_in_where_there_are_no_files(hub: Hub, tmp_path: Path) -> None:
    """Named as the hub names it, but for the ending: this environment may have no pyarrow."""
    converted = hub.folder / "o/script/refs_convert_parquet/main/train"
    shutil.move(converted / "0000.jsonl", converted / "train.jsonl")
    for offline in (False, True):
        _, prompts = ask(hub, tmp_path / "home", "o/script", "main", "train", offline=offline)
        assert prompts == [f"q{n}" for n in range(6)]


def test_the_hub_s_conversion_to_parquet(hub: Hub, tmp_path: Path) -> None:
    converted = hub.folder / "o/script/refs_convert_parquet/main/train"
    write_parquet(converted / "0000.parquet", ROWS[:3])
    write_parquet(converted / "0001.parquet", ROWS[3:])
    (converted / "0000.jsonl").unlink()
    files, prompts = ask(hub, tmp_path / "home", "o/script", "main", "train")
    assert prompts == [f"q{n}" for n in range(6)]
    Path(files[0]).unlink()
    kind, _, _, why, _ = ask(hub, tmp_path / "home", "o/script", "main", "train", offline=True)
    assert kind == "CalibrationDataError"
    assert "main/train/0000.parquet" in why


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("o/none",), ["o/none", "no such data set", "here/o", "hf auth login"]),
        (("o/lines", None, "dev"), ["no split 'dev'", "test, train", "split: test"]),
        (("o/lines", None, None), ["which split", "test, train"]),
        (("o/lines", "hard", "train"), ["no 'hard'", "default"]),
        (("o/card", None, "train"), ["which configuration", "main, other"]),
        (("o/lines", None, "train", "v9"), ["no revision 'v9'"]),
        (("o/script", "main", "test"), ["no split 'test'", "train"]),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, asked: tuple[str | None, ...], words: list[str]) -> None:
    kind, *lines = ask(hub, tmp_path / "home", *asked)
    assert kind == "CalibrationDataError"
    assert lines[1] == "recipe.yml:4"
    for word in words:
        assert word in " ".join(lines), lines


def test_a_gated_data_set(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    kind, what, _, _, fix = ask(hub, tmp_path / "home", "o/lines", None, "train")
    assert kind == "CalibrationDataError"
    assert "gated" in what
    assert f"{hub.url}/datasets/o/lines" in fix


def test_offline_and_not_cached(hub: Hub, tmp_path: Path) -> None:
    kind, what, _, why, fix = ask(hub, tmp_path / "home", "o/lines", None, "train", offline=True)
    assert kind == "CalibrationDataError"
    assert "cannot be asked" in what
    assert "here/o" in why
    assert "unset HF_HUB_OFFLINE" in fix
    assert hub.asked == []
    ask(hub, tmp_path / "home", "o/lines", None, "test")
    _, _, _, why, _ = ask(hub, tmp_path / "home", "o/lines", None, "train", offline=True)
    assert "no split 'train'" in why
