"""Models of the hub, against a stand-in for its HTTP API: what is fetched, what is refused, and how each failure is told."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sensmerge.checkpoints.hub import hub_name, weight_files
from tests.adapters import edit_config, merged_by_peft, save_adapter, save_base
from tests.builders import byte_tokenizer, tiny_llama, write_checkpoint
from tests.checkpoints.hub_stand_in import Hub, running_hub
from tests.conftest import Run

Done = subprocess.CompletedProcess[str]
Ask = Callable[..., Done]


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    return {name: torch.randn(40, 50, generator=generator) for name in names}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models as they are published: with a tokenizer, and with files that a merge has no use for."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "chat", "code")):
        made = write_checkpoint(folder / name, weights(seed), shards=1 if name == "base" else 3)
        byte_tokenizer(chat_template="{{ messages }}").save_pretrained(made)
        (made / "generation_config.json").write_text('{"do_sample": false}')
        for useless in ("README.md", "model.gguf", "consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx"):
            (made / useless).parent.mkdir(exist_ok=True)
            (made / useless).write_bytes(b"of no use to a merge")
        (made / "original").mkdir()
        shutil.copy(made / "config.json", made / "original" / "config.json")
        shutil.copy(made / "config.json", made / "original" / "model.safetensors")
    return folder


@pytest.fixture
def hub(models: Path) -> Iterator[Hub]:
    with running_hub() as running:
        running.add("org/base", models / "base")
        running.add("chat", models / "chat")
        running.add("org/code", models / "base", branch="main")
        running.add("org/code", models / "code", branch="refs/pr/1")
        yield running


@pytest.fixture
def ask(hub: Hub, sensmerge: Run, tmp_path: Path) -> Ask:
    """Run `sensmerge merge` on a recipe of these models, in an empty folder and with a cache of its own."""

    def run(*experts: str, base: str = "org/base", options: tuple[str, ...] = ("--dry-run",), **env: str) -> Done:
        text = f"merge_method: task_arithmetic\nallow: [unrelated]\nbase_model: {base}\nmodels:\n"
        text += "".join(f"  - model: {expert}\n" for expert in experts)
        (tmp_path / "recipe.yml").write_text(text + "parameters: {lambda: 0.5}\n")
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        return sensmerge("merge", "recipe.yml", "out", *options, cwd=tmp_path, env=environment | env)

    return run


def refused(done: Done, code: int, *words: str) -> str:
    """The four lines of each fault, which hold these words."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    kinds = [line.strip().partition(":")[0] for line in message.splitlines() if line.startswith("  ")]
    assert kinds == ["where", "why", "fix"] * (len(kinds) // 3), message
    assert kinds
    for word in words:
        assert word in message, message
    return message


# ----------------------------------------------------------------------------------------------------- what works


def test_a_merge_from_hub_ids_then_offline(hub: Hub, ask: Ask, models: Path, tmp_path: Path) -> None:
    """One-word ids, revisions, shards; nothing useless is fetched; the second run needs no network and writes the same bytes."""
    done = ask("chat", "org/code@refs/pr/1", options=("--overwrite",))
    assert done.returncode == 0, done.stderr
    commit = hub.repositories["org/code"].branches["refs/pr/1"]
    assert f"'org/code@refs/pr/1' is the hub's, commit {commit}, in {tmp_path / 'home'}" in done.stderr
    assert "downloading chat: done" in done.stderr
    assert "it/s" not in done.stderr
    assert "B/s" not in done.stderr
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base, chat, code = (weights(seed) for seed in range(3))
    for name, value in base.items():
        expected = value + 0.5 * ((chat[name] - value) + (code[name] - value))
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (models / "base" / file).read_bytes()
    fetched = set(hub.downloads())
    assert "model-00003-of-00003.safetensors" in fetched
    assert fetched.isdisjoint(
        {"README.md", "model.gguf", "consolidated.safetensors", "pytorch_model.bin", "model.onnx"}
    )
    assert not any("/original/" in path for _, path, _ in hub.asked)
    commits = json.loads((tmp_path / "out" / "sensmerge" / "merge.json").read_text())["commits"]
    assert commits["org/code@refs/pr/1"] == commit
    assert commits["chat"] == hub.repositories["chat"].branches["main"]

    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    downloads = len(hub.downloads())
    assert ask("chat", "org/code@refs/pr/1", options=("--overwrite",)).returncode == 0
    assert len(hub.downloads()) == downloads, "what is cached is not downloaded again"
    hub.asked.clear()
    offline = ask("chat", f"org/code@{commit}", options=("--overwrite",), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert hub.asked == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    hub.down = True
    down = ask("chat", "org/code@refs/pr/1", options=("--dry-run", "--overwrite"))
    assert down.returncode == 0, down.stderr
    assert "cannot be reached: 'chat' is what was cached of it" in down.stderr


def test_a_folder_always_wins(hub: Hub, ask: Ask, models: Path, tmp_path: Path) -> None:
    """Also one whose name looks like an id with a revision."""
    shutil.copytree(models / "base", tmp_path / "org" / "base")
    shutil.copytree(models / "chat", tmp_path / "x@y")
    assert ask("x@y").returncode == 0
    assert hub.asked == []


def test_a_token_is_sent_and_opens_gated_and_private_models(hub: Hub, ask: Ask, models: Path) -> None:
    hub.add("org/gated", models / "code", state="gated")
    hub.add("org/private", models / "chat", state="private")
    assert ask("org/gated", "org/private", HF_TOKEN="hf_right").returncode == 0
    asked = {(path, token) for _, path, token in hub.asked if path.startswith(("/api/models/org/", "/org/"))}
    assert {token for _, token in asked} == {"Bearer hf_right"}


def test_a_download_that_breaks_is_resumed(hub: Hub, ask: Ask) -> None:
    hub.cut["model-00002-of-00003.safetensors"] = 1
    done = ask("chat")
    assert done.returncode == 0, done.stderr
    assert hub.cut["model-00002-of-00003.safetensors"] == 0


def test_a_run_that_was_cut_keeps_the_complete_files(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    """Size and hash of what comes are checked; the same command repeats what failed, and that alone."""
    hub.short.add("model-00002-of-00003.safetensors")
    refused(ask("chat"), 3, "could not be downloaded", "run the same command again")
    # Half a model in the cache is no model.
    refused(ask("chat", HF_HUB_OFFLINE="1"), 3, "not whole", "model-00002-of-00003.safetensors is missing")
    hub.short.clear()
    hub.asked.clear()
    assert ask("chat").returncode == 0
    assert set(hub.downloads()) == {"model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"}


def test_a_file_that_came_damaged_is_refused_and_not_kept(hub: Hub, ask: Ask, models: Path, tmp_path: Path) -> None:
    """Their sizes are right: only the hashes tell. The fix works."""
    hub.damaged |= {"model.safetensors", "tokenizer.json"}
    shutil.copytree(models / "base", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    hub.add("chat", tmp_path / "bare")
    message = refused(ask("org/code@refs/pr/1", base="chat"), 3, "run the same command again")
    assert "'model.safetensors' of 'chat' came damaged" in message
    assert "'tokenizer.json' of 'org/code' came damaged" in message
    hub.damaged.clear()
    assert ask("org/code@refs/pr/1", base="chat").returncode == 0


# --------------------------------------------------------------------------------------------------- what is refused


def test_offline_and_not_cached(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    message = refused(
        ask("org/code", HF_HUB_OFFLINE="1"), 3, "HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE", "not in the cache"
    )
    assert str(tmp_path / "org" / "base") in message, "the places that were tried"
    assert "2 faults were found" in message, "all models at once"
    assert hub.asked == []


def test_no_such_model_and_no_such_revision(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    message = refused(ask("models/mine"), 3, "the hub has no such model", f"{hub.url}/models/mine", "hf auth login")
    assert str(tmp_path / "models" / "mine") in message
    refused(ask("org/code@v9"), 3, "no revision 'v9'", "write `org/code` for its main branch")
    assert ask("org/code").returncode == 0


def test_a_gated_model(hub: Hub, ask: Ask, models: Path) -> None:
    hub.add("org/gated", models / "code", state="gated")
    refused(ask("org/gated"), 3, "is gated", f"accept the terms at {hub.url}/org/gated", "hf auth login", "HF_TOKEN")


def test_no_network(hub: Hub, ask: Ask) -> None:
    message = refused(
        ask("org/code", HF_ENDPOINT="http://127.0.0.1:9"),
        3,
        "cannot be reached",
        "hf download org/code --local-dir code",
    )
    assert "http://127.0.0.1:9" in message


def test_a_disk_without_room(hub: Hub, ask: Ask) -> None:
    hub.sizes["model.safetensors"] = 1 << 60
    message = refused(ask("chat"), 6, "no room for 'org/base'", "HF_HOME", "bytes must be downloaded")
    assert "1 faults" not in message
    assert "model.safetensors" not in hub.downloads()


def test_a_cache_that_cannot_be_written(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(ask("chat", HF_HUB_CACHE=str(tmp_path / "file" / "cache")), 6, "cannot be written", "HF_HOME")
    assert ask("chat", HF_HUB_CACHE=str(tmp_path / "elsewhere")).returncode == 0
    assert (tmp_path / "elsewhere").is_dir()


def test_pickles_need_the_flag(hub: Hub, ask: Ask, models: Path, tmp_path: Path) -> None:
    """Nothing of such a model is fetched without it; with it, the same command works."""
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(models / "chat" / "config.json", old)
    torch.save(weights(1), old / "pytorch_model.bin")
    hub.add("org/old", old)
    refused(ask("org/old"), 3, "--allow-pickle")
    assert "pytorch_model.bin" not in hub.downloads()
    done = ask("org/old", options=("--dry-run", "--allow-pickle"))
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin" in hub.downloads()


def test_a_repository_without_a_model(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    hub.add("org/gguf", tmp_path / "gguf")
    refused(ask("org/gguf"), 3, "holds no model", "GGUF")
    assert "model.gguf" not in hub.downloads()


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/name", "org/name", None),
        ("org/Name-7b.v0_1", "org/Name-7b.v0_1", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e", "gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    ],
)
def test_names_of_the_hub(name: str, repo: str, revision: str | None) -> None:
    found = hub_name(name)
    assert found is not None
    assert (found.repo, found.revision) == (repo, revision)


@pytest.mark.parametrize(
    "name",
    ["", "./x", "../x", "/x", "~/x", "a/b/c", "a//b", "a/", "/a/b", "a b", "a/b@", "a@", "a@../../x", "a@/x", "a@x..y", "a--b",
     "a..b", "a/b.git", "-a", "a-", "a/.b", "a+b", "org/a+org/b", "a\x1b", "é", "a" * 97, "a@b@c", "a@b c", "http://x/y"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    """They are never sent anywhere."""
    assert hub_name(name) is None


@pytest.mark.parametrize(
    ("names", "pickles", "chosen"),
    [
        (["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"], True, ["model.safetensors"]),
        (["model.safetensors.index.json", "pytorch_model.bin"], True, ["model.safetensors.index.json"]),
        (["pytorch_model.bin"], False, []),
        (["pytorch_model.bin.index.json"], True, ["pytorch_model.bin.index.json"]),
        (["adapter_config.json", "adapter_model.safetensors"], False, ["adapter_model.safetensors"]),
        (["adapter_model.safetensors", "model.safetensors"], False, ["adapter_model.safetensors", "model.safetensors"]),
        (["original/model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"], True, []),
    ],
)
def test_which_weights_are_fetched(names: list[str], pickles: bool, chosen: list[str]) -> None:
    assert weight_files(names, pickles) == chosen


def test_adapters_of_the_hub(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    """`base+adapter` and a bare adapter's id, whose base is the hub's too: read from the cache's links, online and then offline."""
    base = save_base(tiny_llama(0), tmp_path / "published")
    adapter = edit_config(save_adapter(base, tmp_path / "lora"), base_model_name_or_path="org/llama")
    commit = hub.add("org/llama", base)
    hub.add("org/lora", adapter)
    expected = merged_by_peft(base, adapter)
    for name, online in (("org/llama+org/lora", "0"), ("org/lora", "0"), ("org/lora", "1")):
        done = ask(name, base="org/llama", options=("--overwrite",), HF_HUB_OFFLINE=online)
        assert done.returncode == 0, done.stderr
        merged = load_file(tmp_path / "out" / "model.safetensors")
        for key, value in load_file(base / "model.safetensors").items():
            torch.testing.assert_close(merged[key], value + 0.5 * (expected[key] - value), rtol=0, atol=1e-6)
        commits = json.loads((tmp_path / "out" / "sensmerge" / "merge.json").read_text())["commits"]
        assert commits["org/llama"] == commit
    [link] = (tmp_path / "home").rglob("snapshots/*/adapter_model.safetensors")
    assert link.is_symlink()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/llama\n- org/lora\n" in card
