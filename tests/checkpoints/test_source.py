"""Model folders: found, read and told apart; every damaged one refused by name before a weight is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.formats import to_float32
from sensmerge.checkpoints.source import parameters_of
from sensmerge.errors import IncompatibleModelsError, InputFileError, SensmergeError
from tests.builders import write_checkpoint, write_config

INDEX = "model.safetensors.index.json"


def tensors(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {"model.embed_tokens.weight": torch.randn(40, 8, generator=random).to(torch.bfloat16)}
    for layer in range(3):
        found[f"model.layers.{layer}.mlp.weight"] = torch.randn(8, 6, generator=random)
        found[f"model.layers.{layer}.norm.weight"] = torch.randn(8, generator=random).to(torch.float16)
    found["steps"] = torch.arange(5)
    found["flag"] = torch.tensor(True)
    found["none"] = torch.zeros(0, 3)
    found["scalar"] = torch.tensor(2.5)
    return found


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def refused(folder: Path, kind: type[SensmergeError] = InputFileError) -> SensmergeError:
    with pytest.raises(kind) as caught:
        ModelFolder(folder, "org/model")
    return caught.value


# ------------------------------------------------------------------------------------------------------------- read


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_tensor_is_there_with_its_bytes(tmp_path: Path, shards: int) -> None:
    """One file or several: dtype, shape, bits, and float32 as torch sees it."""
    stored = tensors()
    with ModelFolder(write_checkpoint(tmp_path, stored, shards=shards)) as model:
        assert set(model.tensors) == set(stored)
        for name, tensor in stored.items():
            spec = model.tensors[name]
            assert spec.shape == tuple(tensor.shape)
            raw = model.read(name, 0, spec.elements)
            assert raw.tobytes() == raw_bytes(tensor)
            if tensor.is_floating_point():
                np.testing.assert_array_equal(to_float32(raw, spec.dtype), tensor.float().numpy().reshape(-1))
        assert parameters_of(model) == sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert len(list(tmp_path.glob("*.safetensors"))) == shards


def test_a_stretch_of_a_tensor_is_that_stretch(tmp_path: Path) -> None:
    stored = tensors()
    with ModelFolder(write_checkpoint(tmp_path, stored, shards=2)) as model:
        chance = np.random.default_rng(0)
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.weight", "model.layers.2.norm.weight", "steps"):
            whole = raw_bytes(stored[name])
            item = stored[name].element_size()
            for _ in range(20):
                start = int(chance.integers(0, stored[name].numel() + 1))
                count = int(chance.integers(0, stored[name].numel() - start + 1))
                raw = model.read(name, start, count)
                assert raw.tobytes() == whole[start * item : (start + count) * item]
                assert len(raw) == count


def test_reading_again_after_close_works(tmp_path: Path) -> None:
    model = ModelFolder(write_checkpoint(tmp_path, tensors()))
    first = model.read("scalar", 0, 1).tobytes()
    model.close()
    assert model.read("scalar", 0, 1).tobytes() == first
    model.close()
    model.close()


def test_an_unknown_tensor_is_a_key_error(tmp_path: Path) -> None:
    with ModelFolder(write_checkpoint(tmp_path, tensors())) as model, pytest.raises(KeyError):
        model.read("no such tensor", 0, 1)


def test_no_file_stays_open(tmp_path: Path) -> None:
    """A merge of many sharded models must not run out of descriptors."""
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else None
    with ModelFolder(write_checkpoint(tmp_path, tensors(), shards=4)) as model:
        for name, spec in model.tensors.items():
            model.read(name, 0, spec.elements)
    if before is not None:
        assert len(list(descriptors.iterdir())) == before


def snapshot(cache: Path, shards: int = 2) -> Path:
    """A model as the hub's cache keeps it: a folder of links into its repository's blobs."""
    folder = cache / "models--org--model" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (cache / "models--org--model" / "blobs").mkdir()
    for file in write_checkpoint(cache / "real", tensors(), shards=shards).iterdir():
        file.rename(cache / "models--org--model" / "blobs" / f"etag-{file.name}")
        (folder / file.name).symlink_to(Path("../../blobs") / f"etag-{file.name}")
    return folder


def test_the_links_of_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    with ModelFolder(snapshot(tmp_path)) as one, ModelFolder(write_checkpoint(tmp_path / "plain", tensors())) as two:
        assert one.fingerprint() == two.fingerprint()


def test_a_blob_that_repositories_share_is_followed(tmp_path: Path) -> None:
    """huggingface_hub 2: a repository's blob may be a link to the cache's own."""
    blobs = snapshot(tmp_path, shards=1).parent.parent / "blobs"
    shared = tmp_path / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    (blobs / "etag-model.safetensors").rename(shared)
    (blobs / "etag-model.safetensors").symlink_to("../../blobs/ab/abcd")
    ModelFolder(tmp_path / "models--org--model" / "snapshots" / ("0" * 40))


def test_a_link_inside_the_folder_and_a_linked_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tensors())
    (folder / "stored").mkdir()
    (folder / "model.safetensors").rename(folder / "stored" / "weights")
    (folder / "model.safetensors").symlink_to("stored/weights")
    (tmp_path / "link").symlink_to(folder)
    ModelFolder(tmp_path / "link")


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", INDEX, "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path: Path, file: str) -> None:
    """Also one into another repository of the hub's cache; `allow: [symlinks]` takes what the user linked."""
    folders = [write_checkpoint(tmp_path / "model", tensors(), shards=2), snapshot(tmp_path / "cache")]
    for folder in folders:
        (folder / "tokenizer.json").write_text("{}")
        target = tmp_path / "cache" / "models--org--other" / "blobs" / f"{folder.name}{file}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / file).read_bytes())
        (folder / file).unlink()
        (folder / file).symlink_to(target)
        error = refused(folder)
        assert f"'{file}' is a link out of" in error.why
        assert str(target) in error.why
        assert "allow: [symlinks]" in error.fix
        ModelFolder(folder, allow=frozenset({"symlinks"}))


def test_all_links_are_listed_at_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tensors(), shards=3)
    shards = sorted(folder.glob("model-*"))
    for file in shards[:2]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(tmp_path / file.name)
    error = refused(folder)
    assert all(f"'{file.name}' is a link out of" in error.why for file in shards[:2])
    assert shards[2].name not in error.why


def test_a_single_file_wins_over_a_left_over_index(tmp_path: Path) -> None:
    """As in transformers."""
    write_checkpoint(tmp_path, tensors(1), shards=2)
    write_checkpoint(tmp_path, tensors(2))
    with ModelFolder(tmp_path) as both, ModelFolder(write_checkpoint(tmp_path / "two", tensors(2))) as single:
        assert both.fingerprint() == single.fingerprint()


# ---------------------------------------------------------------------------------------------------- what is refused


def test_no_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tensors())
    (folder / "config.json").unlink()
    error = refused(folder)
    assert "org/model" in error.what
    assert error.where == str(folder / "config.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff{}", b"[" * 50_000, b'{"x": ' + b"9" * 5000 + b"}", rb'{"x": "\ud800"}'],
    ids=["empty", "cut", "list", "null", "text", "not UTF-8", "deep", "long number", "half a character"],
)  # fmt: skip
def test_a_config_that_is_none(tmp_path: Path, content: bytes) -> None:
    folder = write_checkpoint(tmp_path, tensors())
    (folder / "config.json").write_bytes(content)
    assert refused(folder).where == str(folder / "config.json")


def test_a_missing_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    refused(file)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert "model.safetensors" in refused(tmp_path).why


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_folder_of_pickles(tmp_path: Path, name: str) -> None:
    """Never opened; the message says why and what to do."""
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"cposix\nsystem\n(S'touch /tmp/pwned'\ntR.")
    error = refused(tmp_path)
    assert name in error.why
    assert "--allow-pickle" in error.fix


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors(), config={"model_type": "llama", "quantization_config": {"bits": 4}})
    assert refused(tmp_path, IncompatibleModelsError).exit_code == 4


def test_a_config_that_says_null_to_quantisation_is_not_quantised(tmp_path: Path) -> None:
    """`"quantization_config": null` is how some exports write "none"."""
    ModelFolder(write_checkpoint(tmp_path, tensors(), config={"model_type": "llama", "quantization_config": None}))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in refused(tmp_path).where


def edit(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Change the weight map of an index in place."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", tensors(), shards=3)


def test_all_missing_shards_are_listed_at_once(sharded: Path) -> None:
    names = sorted(path.name for path in sharded.glob("model-*"))
    for name in names[:2]:
        (sharded / name).unlink()
    error = refused(sharded)
    assert all(name in error.why for name in names[:2])
    assert names[2] not in error.why


def test_all_differences_of_index_and_shards_are_listed_at_once(sharded: Path) -> None:
    def change(weight_map: dict[str, str]) -> None:
        weight_map["ghost.one"] = weight_map["ghost.two"] = weight_map["steps"]
        del weight_map["steps"], weight_map["flag"]

    edit(sharded, change)
    error = refused(sharded)
    assert error.where == str(sharded / INDEX)
    for name in ("ghost.one", "ghost.two"):
        assert f"'{name}' is in the index but in no shard" in error.why
    for name in ("steps", "flag"):
        assert f"'{name}' is in a shard but not in the index" in error.why


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", ""])
def test_a_shard_outside_the_folder_is_refused(sharded: Path, name: str) -> None:
    """An index from a stranger reads nothing but its own folder."""
    shutil.copy(next(sharded.glob("model-*")), sharded.parent / "outside.safetensors")
    edit(sharded, lambda weight_map: weight_map.update({"steps": name}))
    refused(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    """Which of the two would be meant is not known; neither is taken."""
    extra = write_checkpoint(sharded.parent / "extra", {"steps": torch.arange(5), "more": torch.ones(1)})
    shutil.copy(extra / "model.safetensors", sharded / "model-extra.safetensors")
    edit(sharded, lambda weight_map: weight_map.update({"more": "model-extra.safetensors"}))
    assert "two shards" in refused(sharded).why


def test_a_tensor_that_lies_in_another_shard_than_the_index_says(sharded: Path) -> None:
    """Other readers follow the index and would not find it: the model is damaged."""

    def change(weight_map: dict[str, str]) -> None:
        other = next(file for file in weight_map.values() if file != weight_map["steps"])
        weight_map["steps"] = other

    edit(sharded, change)
    assert "steps" in refused(sharded).why


def test_damaged_shards_are_listed_with_the_other_faults(sharded: Path) -> None:
    """DESIGN section 9: all faults are listed at once."""
    names = sorted(path.name for path in sharded.glob("model-*"))
    (sharded / names[0]).write_bytes(b"broken")
    (sharded / names[1]).unlink()
    error = refused(sharded)
    assert names[0] in error.why + error.where
    assert names[1] in error.why


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": ["x"]}}',
     b'{"weight_map": null}', b'{"weight_map": {"a": null}}', b'{"weight_map": {"a": 1, "b": "x"}}',
     b"\xff", b"[" * 50_000],
    ids=lambda content: content[:30].decode(errors="replace"),
)  # fmt: skip
def test_an_index_that_is_none(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    assert str(sharded / INDEX) in refused(sharded).where


def test_an_empty_index_leaves_shards_unread_and_is_refused(sharded: Path) -> None:
    """A model without a tensor is no model."""
    (sharded / INDEX).write_text('{"weight_map": {}}')
    refused(sharded)


@pytest.mark.parametrize("early", [True, False], ids=["before the first read", "between two reads"])
def test_a_file_that_becomes_shorter_is_an_error_not_a_crash(tmp_path: Path, early: bool) -> None:
    """Mapped memory would end in SIGBUS."""
    folder = write_checkpoint(tmp_path, {"a": torch.ones(100_000), "b": torch.ones(100_000)})
    with ModelFolder(folder) as model:
        if not early:
            model.read("a", 0, 10)
        os.truncate(folder / "model.safetensors", 400_000)
        with pytest.raises(InputFileError) as caught:
            model.read("b", 0, 100_000)
        assert "'b'" in caught.value.where
        assert str(folder / "model.safetensors") in caught.value.where


def test_a_file_that_vanishes_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tensors())
    with ModelFolder(folder) as model:
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputFileError) as caught:
            model.read("scalar", 0, 1)
        assert "model.safetensors" in caught.value.where


# ------------------------------------------------------------------------------------------------------ fingerprint


def fingerprint(folder: Path) -> str:
    with ModelFolder(folder) as model:
        return model.fingerprint()


def test_the_fingerprint_depends_on_neither_shards_nor_paths_nor_order(tmp_path: Path) -> None:
    stored = tensors()
    reordered = dict(reversed(list(stored.items())))
    found = {
        fingerprint(write_checkpoint(tmp_path / "one", stored)),
        fingerprint(write_checkpoint(tmp_path / "deep" / "er", reordered)),
        fingerprint(write_checkpoint(tmp_path / "two", stored, shards=2)),
        fingerprint(write_checkpoint(tmp_path / "five", reordered, shards=5)),
        fingerprint(write_checkpoint(tmp_path / "config", stored, config={"other": 1})),
    }
    assert len(found) == 1


def test_the_fingerprint_sees_every_small_change(tmp_path: Path) -> None:
    """One bit of any tensor, a dtype, a shape, a name, a tensor more or less."""
    stored = tensors()
    variants = [stored]
    for name, tensor in stored.items():
        if tensor.numel():
            flipped = tensor.clone()
            flipped.view(-1)[-1:].view(torch.uint8)[0] ^= 1
            variants.append(stored | {name: flipped})
        variants.append({other: value for other, value in stored.items() if other != name})
    variants += [
        stored | {"scalar": torch.tensor([2.5])},
        stored | {"steps": torch.arange(5).view(torch.float64)},
        stored | {"model.layers.0.mlp.weight": stored["model.layers.0.mlp.weight"].reshape(6, 8)},
        stored | {"extra": torch.zeros(0)},
        {("renamed" if name == "flag" else name): value for name, value in stored.items()},
    ]
    found = [fingerprint(write_checkpoint(tmp_path / str(at), variant)) for at, variant in enumerate(variants)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("byte", [0, 4095, -1, -4096])
def test_the_fingerprint_of_a_large_tensor_sees_both_ends(tmp_path: Path, byte: int) -> None:
    """16 blocks of 4 KiB, from the first byte to the last."""
    values = torch.zeros(300_000, dtype=torch.uint8)
    changed = values.clone()
    changed[byte] = 1
    one, two = write_checkpoint(tmp_path / "one", {"t": values}), write_checkpoint(tmp_path / "two", {"t": changed})
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.parametrize("size", [1, 4096, 65536])
def test_the_fingerprint_sees_every_byte_up_to_64_kib(tmp_path: Path, size: int) -> None:
    values = torch.zeros(size, dtype=torch.uint8)
    found = {fingerprint(write_checkpoint(tmp_path / "plain", {"t": values}))}
    places = sorted({0, size // 3, size // 2, size - 1})
    for place in places:
        changed = values.clone()
        changed[place] = 1
        found.add(fingerprint(write_checkpoint(tmp_path / str(place), {"t": changed})))
    assert len(found) == 1 + len(places)


def test_two_tensors_exchanged_are_told_apart(tmp_path: Path) -> None:
    a, b = torch.ones(4), torch.zeros(4)
    one = fingerprint(write_checkpoint(tmp_path / "one", {"a": a, "b": b}))
    assert one != fingerprint(write_checkpoint(tmp_path / "two", {"a": b, "b": a}))
