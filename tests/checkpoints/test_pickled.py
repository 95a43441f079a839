"""Pickled weights: read only when allowed, without running what is in them, and then the same numbers as from safetensors."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.pickled import read_pickles
from sensmerge.errors import InputFileError
from tests.builders import tiny_llama, write_checkpoint, write_config
from tests.conftest import Run


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tied = torch.randn(6, 4, generator=generator)
    return {
        "model.embed_tokens.weight": tied,
        "model.layers.0.w": torch.randn(300, 7, generator=generator).to(torch.bfloat16),
        "model.layers.1.w": torch.randn(5, generator=generator).to(torch.float16),
        "model.steps": torch.arange(5),
        "model.mask": torch.tensor([True, False]),
        "model.scalar": torch.tensor(3.0),
        "model.nothing": torch.zeros(0, 3),
        "model.one": torch.ones(1, 4, 1),
        "lm_head.weight": tied,
    }


def save_pickles(folder: Path, whole: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """A checkpoint folder as transformers wrote it before safetensors."""
    write_config(folder)
    if shards == 1:
        torch.save(dict(whole), folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: whole[name] for name in list(whole)[number::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def opened(folder: Path) -> ModelFolder:
    return ModelFolder(folder, "org/model", allow_pickle=True)


def refused(content: object, folder: Path, save: Callable[..., object] = torch.save) -> str:
    """Why a file with this content is refused."""
    write_config(folder)
    save(content, folder / "pytorch_model.bin")
    with pytest.raises(InputFileError) as caught:
        opened(folder)
    assert str(folder / "pytorch_model.bin") in caught.value.where
    return caught.value.why


# ----------------------------------------------------------------------------------------------------- what is read


LIMITS = (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS)


def test_every_number_is_that_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shards, in any folder: names, dtypes, shapes, bytes, and so the fingerprint. This process keeps its own limits."""
    # torch sets this where it was imported before; a user's process has not.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    limits = [resource.getrlimit(kind) for kind in LIMITS]
    plain = {name: value.clone() for name, value in tensors().items()}
    with (
        ModelFolder(write_checkpoint(tmp_path / "safe", plain)) as safe,
        opened(save_pickles(tmp_path / "many", tensors(), shards=3)) as many,
    ):
        assert dict(many.tensors) == dict(safe.tensors)
        for name, spec in safe.tensors.items():
            assert many.read(name, 0, spec.elements).tobytes() == safe.read(name, 0, spec.elements).tobytes()
        assert many.fingerprint() == safe.fingerprint()
    assert [resource.getrlimit(kind) for kind in LIMITS] == limits


def test_views_parameters_models_of_transformers_and_weights_that_lay_on_a_gpu(tmp_path: Path) -> None:
    """Each tensor's bytes lie where the listing says. Tensors may share a storage or begin inside one."""
    big = torch.arange(20.0)
    views = {"a": big[5:9], "b": big[8:].reshape(3, 4), "c": torch.nn.Parameter(big), "d": big}
    contents: dict[str, Mapping[str, torch.Tensor]] = {
        "every kind": tensors(),
        "views": views,
        "llama": tiny_llama().state_dict(),
        "gpu": {"a": big},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)

    def on_gpu(name: str, content: bytes) -> bytes:
        return content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0") if "data.pkl" in name else content

    rewrite(tmp_path / "gpu", on_gpu)
    assert b"cuda:0" in (tmp_path / "gpu").read_bytes()
    for file, found in read_pickles([tmp_path / name for name in contents]).items():
        assert not isinstance(found, InputFileError), found
        whole = file.read_bytes()
        listed = {t.spec.name: (t.spec.shape, whole[t.offset : t.offset + t.size]) for t in found}
        assert listed == {
            name: (tuple(value.shape), value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, value in contents[file.name].items()
        }


def rewrite(file: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """The same zip file with other members."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def test_safetensors_win(tmp_path: Path) -> None:
    """A pickle beside them is never opened."""
    folder = write_checkpoint(tmp_path, {"a": torch.ones(2)})
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert opened(folder).read("a", 0, 2).tolist() == [1.0, 1.0]


# --------------------------------------------------------------------------------------------------- what is refused


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def save_raw(content: object, file: Path) -> None:
    """A bare pickle, as torch wrote before 1.6."""
    file.write_bytes(pickle.dumps(content))


def save_zipped(content: object, file: Path) -> None:
    """A pickle inside a zip file as torch writes it."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer)
    file.write_bytes(buffer.getvalue())
    rewrite(file, lambda name, old: pickle.dumps(content, protocol=2) if name.endswith("data.pkl") else old)


def test_a_payload_does_not_run(tmp_path: Path) -> None:
    """Neither here nor in the process that reads it; with and without the flag."""
    mark = tmp_path / "ran"
    payloads = (
        Payload(os.system, f"touch {mark}"),
        Payload(subprocess.call, ["touch", str(mark)]),
        Payload(open, str(mark), "w"),
        Payload(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
    )
    files = []
    for save in (torch.save, save_raw, save_zipped):
        for number, payload in enumerate(payloads):
            files.append(tmp_path / f"{save.__name__}-{number}")
            save({"a": payload}, files[-1])
    for fault in read_pickles(files).values():
        assert isinstance(fault, InputFileError)
    write_config(tmp_path / "model")
    shutil.copy(files[0], tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputFileError):
        ModelFolder(tmp_path / "model")
    assert not mark.exists()
    # The payloads are no blanks.
    pickle.loads(pickle.dumps(payloads[0]))
    assert mark.exists()


def test_the_reading_process_can_write_no_file(tmp_path: Path) -> None:
    """Were weights_only to fail: its limits hold, which its own code sets."""
    code = (
        "from sensmerge.checkpoints import pickle_listing as p; p.limit()\n"
        f"f = open({str(tmp_path / 'x')!r}, 'wb')\nf.write(b'x'); f.flush()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr
    assert (tmp_path / "x").read_bytes() == b""


def test_what_is_no_plain_set_of_tensors_is_refused_by_name(tmp_path: Path) -> None:
    """All files in one process: what is wrong with each is told."""
    contents: dict[str, tuple[object, str]] = {
        "nested": ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is a dict"),
        "number": ({"a": torch.ones(1), "epoch": 3}, "'epoch' is a int"),
        "list": ([torch.ones(1)], "holds a list"),
        "transposed": ({"a": torch.ones(2, 3).t(), "b": torch.ones(1)}, "'a' is not contiguous"),
        "stretched": ({"a": torch.ones(1).expand(5)}, "'a' is not contiguous"),
        "complex": ({"a": torch.ones(1, dtype=torch.complex64)}, "'a' has dtype complex64"),
        "sparse": ({"a": torch.eye(3).to_sparse()}, "pytorch_model.bin"),
        "escape": ({"a\x1b[2J": torch.ones(1)}, "control characters"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "pytorch_model.bin")
    found = read_pickles([tmp_path / name / "pytorch_model.bin" for name in contents])
    for name, (_, words) in contents.items():
        fault = found[tmp_path / name / "pytorch_model.bin"]
        assert isinstance(fault, InputFileError), name
        assert words in str(fault), fault
        assert "\x1b" not in str(fault)


def test_files_that_torch_does_not_write_today(tmp_path: Path) -> None:
    """Refused before any process is started."""

    def legacy(content: object, file: Path) -> None:
        torch.save(content, file, _use_new_zipfile_serialization=False)

    def packed(content: object, file: Path) -> None:
        torch.save(content, file)
        rewrite(file, lambda _, old: old, zipfile.ZIP_DEFLATED)

    def big_endian(content: object, file: Path) -> None:
        torch.save(content, file)
        rewrite(file, lambda name, old: b"big" if name.endswith("byteorder") else old)

    def cut(content: object, file: Path) -> None:
        torch.save(content, file)
        file.write_bytes(file.read_bytes()[:-100])

    def empty(_: object, file: Path) -> None:
        file.write_bytes(b"")

    weights = {"a": torch.arange(1000.0)}
    assert "older than 1.6" in refused(weights, tmp_path / "legacy", legacy)
    assert "compressed" in refused(weights, tmp_path / "packed", packed)
    assert "byte order" in refused(weights, tmp_path / "big", big_endian)
    assert "no zip file" in refused(weights, tmp_path / "cut", cut)
    assert "no zip file" in refused(weights, tmp_path / "empty", empty)


def test_storages_that_lie_about_their_size(tmp_path: Path) -> None:
    """The pickle says more numbers than the zip file's member has."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(100.0), "b": torch.ones(3)}, file)
    rewrite(file, lambda name, old: old[:40] if name.endswith("data/0") else old)
    assert isinstance(read_pickles([file])[file], InputFileError)


def test_faults_of_all_shards_are_listed_at_once(tmp_path: Path) -> None:
    folder = save_pickles(tmp_path, tensors(), shards=4)
    shards = sorted(folder.glob("pytorch_model-*"))
    shards[0].unlink()
    save_raw({"x": Payload(os.system, "true")}, shards[1])
    torch.save({"x": 1}, shards[2])
    with pytest.raises(InputFileError) as caught:
        opened(folder)
    assert "is missing" in caught.value.why
    for shard in shards[:3]:
        assert shard.name in caught.value.why


# ------------------------------------------------------------------------------------------------- the whole command


def test_a_merge_of_pickles_is_byte_for_byte_that_of_safetensors(sensmerge: Run, tmp_path: Path) -> None:
    """Refused without the flag; both of the ways out that the message names work when pasted."""
    recipe = (
        "merge_method: ties\nallow: [unrelated]\nbase_model: base\nmodels: [{model: a}]\nparameters: {density: 0.5}\n"
    )
    for seed, name in enumerate(("base", "a")):
        plain = {key: value.clone() if seed else tensors()[key] for key, value in tensors(seed).items()}
        write_checkpoint(tmp_path / "safe" / name, {key: value.clone() for key, value in plain.items()})
        save_pickles(tmp_path / "old" / name, plain, shards=1 + seed)
    for place in ("safe", "old"):
        (tmp_path / place / "r.yml").write_text(recipe)
    assert sensmerge("merge", "r.yml", "out", cwd=tmp_path / "safe").returncode == 0
    expected = (tmp_path / "safe" / "out" / "model.safetensors").read_bytes()

    done = sensmerge("merge", "r.yml", "out", cwd=tmp_path / "old")
    assert done.returncode == 3
    assert done.stderr.count("add `--allow-pickle` to the command") == 2
    commands = [line.partition("convert it once: ")[2] for line in done.stderr.splitlines() if "convert it" in line]

    allowed = sensmerge("merge", "r.yml", "out", "--allow-pickle", cwd=tmp_path / "old")
    assert allowed.returncode == 0, allowed.stderr
    assert (tmp_path / "old" / "out" / "model.safetensors").read_bytes() == expected

    path = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=path, capture_output=True)
    shutil.rmtree(tmp_path / "old" / "out")
    converted = sensmerge("merge", "r.yml", "out", cwd=tmp_path / "old")
    assert converted.returncode == 0, converted.stderr
    assert (tmp_path / "old" / "out" / "model.safetensors").read_bytes() == expected
