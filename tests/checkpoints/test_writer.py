"""Writing shards: what comes out is what the safetensors library reads, and nothing is promised that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from sensmerge.checkpoints import digest as digest_module
from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.formats import FLOATS, ITEM_SIZES
from sensmerge.checkpoints.writer import Shard, ShardWriter, output_config, split_into_shards, write_index
from sensmerge.errors import ResourceError
from sensmerge.records import TensorSpec
from tests.builders import write_config

NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    """Mixed dtypes with odd sizes, so that alignment does not come by itself."""
    random = torch.Generator().manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "a.norm": torch.randn(5, generator=random).to(torch.bfloat16),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "a.weight": torch.randn(3, 5, generator=random),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(9, generator=random).to(torch.float16),
        "steps": torch.arange(3),
        'é"name\\': torch.randn(1, generator=random),
        "double": torch.randn(2, generator=random, dtype=torch.float64),
    }


def specs(stored: dict[str, Tensor]) -> list[TensorSpec]:
    short = {dtype: name for name, dtype in NAMES.items()}
    return [TensorSpec(name, short[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()]


def raw(tensor: Tensor, spec: TensorSpec) -> Any:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return np.frombuffer(content, dtype=FLOATS.get(spec.dtype, np.dtype(f"V{ITEM_SIZES[spec.dtype]}")))


def write_all(folder: Path, stored: dict[str, Tensor], shard_bytes: int, piece: int = 2) -> dict[str, str]:
    """Write everything as the engine does: `piece` elements at a time. Returns the hashes by file."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = split_into_shards(specs(stored), shard_bytes)
    hashes = {}
    for shard in shards:
        writer = ShardWriter(folder, shard)
        for spec in shard.tensors:
            whole = raw(stored[spec.name], spec)
            for start in range(0, len(whole), piece):
                writer.write(spec.name, start, whole[start : start + piece])
        hashes[shard.file] = writer.close()
    write_index(folder, shards)
    return hashes


@pytest.mark.parametrize("shard_bytes", [1, 16, 40, 100, 10**9])
def test_the_library_reads_back_every_byte(tmp_path: Path, shard_bytes: int) -> None:
    stored = tensors()
    hashes = write_all(tmp_path, stored, shard_bytes)
    found: dict[str, Tensor] = {}
    for file in hashes:
        with safe_open(tmp_path / file, framework="pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            for name in reader.keys():  # noqa: SIM118
                assert name not in found
                found[name] = reader.get_tensor(name)
    assert set(found) == set(stored)
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("shard_bytes", [1, 40, 10**9])
def test_every_tensor_is_aligned_to_its_items(tmp_path: Path, shard_bytes: int) -> None:
    """Readers that map the file need it; mixed dtypes with odd sizes are where it goes wrong."""
    hashes = write_all(tmp_path, tensors(), shard_bytes)
    for file in hashes:
        content = (tmp_path / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert (8 + length) % 8 == 0
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                assert (8 + length + entry["data_offsets"][0]) % ITEM_SIZES[entry["dtype"]] == 0, name


@pytest.mark.parametrize("shard_bytes", [1, 40, 10**9])
def test_the_hash_is_that_of_the_file(tmp_path: Path, shard_bytes: int) -> None:
    for file, digest in write_all(tmp_path, tensors(), shard_bytes).items():
        assert digest == xxhash.xxh3_128((tmp_path / file).read_bytes()).hexdigest()


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_pieces_of_any_size_give_the_same_file(tmp_path: Path, piece: int) -> None:
    assert write_all(tmp_path / "a", tensors(), 40, piece) == write_all(tmp_path / "b", tensors(), 40, 2)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_all(tmp_path, tensors(), 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("shard_bytes", [1, 24, 40, 100])
def test_shards_and_index_agree(tmp_path: Path, shard_bytes: int) -> None:
    """Names with their count, each tensor in one shard, the total in bytes; our own reader agrees as well."""
    stored = tensors()
    hashes = write_all(tmp_path, stored, shard_bytes)
    count = len(hashes)
    assert list(hashes) == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert set(index["weight_map"]) == set(stored)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as reader:
            assert name in reader.keys()  # noqa: SIM118
    write_config(tmp_path)
    with ModelFolder(tmp_path) as model:
        assert {name: spec.shape for name, spec in model.tensors.items()} == {
            n: tuple(t.shape) for n, t in stored.items()
        }


@pytest.mark.parametrize("limit", [1, 8, 20, 36, 64, 1000])
def test_a_shard_keeps_to_its_size_unless_one_tensor_is_larger(limit: int) -> None:
    """In the order given; a larger tensor has a shard to itself; none is lost or doubled; none is empty."""
    random = np.random.default_rng(limit)
    given = [TensorSpec(f"t{n}", str(random.choice(list(NAMES))), (int(random.integers(0, 9)),)) for n in range(40)]
    shards = split_into_shards(given, limit)
    assert sorted(spec.name for shard in shards for spec in shard.tensors) == sorted(spec.name for spec in given)
    place = {spec.name: n for n, spec in enumerate(given)}
    order = [sorted(place[spec.name] for spec in shard.tensors) for shard in shards]
    assert [n for part in order for n in part] == list(range(40))
    for shard in shards:
        assert shard.tensors
        assert shard.data_bytes <= limit or sum(spec.elements > 0 for spec in shard.tensors) == 1
        sizes = [ITEM_SIZES[spec.dtype] for spec in shard.tensors]
        assert sizes == sorted(sizes, reverse=True)


def test_nothing_is_one_file_without_tensors(tmp_path: Path) -> None:
    (shard,) = split_into_shards([], 10)
    ShardWriter(tmp_path, shard).close()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as reader:
        assert list(reader.keys()) == []


SHARD = Shard("model.safetensors", (TensorSpec("t", "F32", (4,)),))


@pytest.mark.parametrize("elements", [0, 3, 5, 8])
def test_too_few_or_too_many_bytes_are_a_value_error(tmp_path: Path, elements: int) -> None:
    """A header that does not match the data is never called finished."""
    writer = ShardWriter(tmp_path, SHARD)
    try:
        with pytest.raises(ValueError, match=r"model\.safetensors"):  # noqa: PT012
            writer.write("t", 0, np.ones(elements, dtype=np.float32))
            writer.close()
    finally:
        writer.abandon()


@pytest.mark.parametrize("waiting", [0, 1000, 1 << 24])
@pytest.mark.parametrize("threads", [1, 4])
def test_pieces_in_any_order_and_from_any_thread_give_the_same_file(
    tmp_path: Path, waiting: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same hash: pieces that wait for an earlier one are kept, or read again where there is no room."""
    monkeypatch.setattr(digest_module, "WAITING_BYTES", waiting)
    monkeypatch.setattr(digest_module, "WRITEBACK_BYTES", 5000)
    stored = {
        name: torch.randn(size, generator=torch.Generator().manual_seed(size))
        for name, size in (("a", 5003), ("b", 977))
    }
    expected = write_all(tmp_path / "in-order", stored, 10**9, piece=100)
    (shard,) = split_into_shards(specs(stored), 10**9)
    (tmp_path / "out").mkdir()
    writer = ShardWriter(tmp_path / "out", shard)
    pieces = [(spec, start) for spec in shard.tensors for start in range(0, spec.elements, 61)]
    np.random.default_rng(waiting + threads).shuffle(pieces)

    def write(mine: list[tuple[TensorSpec, int]]) -> None:
        for spec, start in mine:
            writer.write(spec.name, start, raw(stored[spec.name], spec)[start : start + 61])

    running = [threading.Thread(target=write, args=(pieces[n::threads],)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert {"model.safetensors": writer.close()} == expected
    same = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "in-order")]
    assert same[0] == same[1]


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises((FileExistsError, ResourceError)):
        ShardWriter(tmp_path, SHARD)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from sensmerge.checkpoints.writer import Shard, ShardWriter
from sensmerge.errors import ResourceError
from sensmerge.records import TensorSpec
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
shard = Shard("model.safetensors", (TensorSpec("t", "U8", (100_000,)),))
try:
    writer = ShardWriter(Path(sys.argv[1]), shard)
    writer.write("t", 0, np.zeros(100_000, dtype=np.uint8))
    writer.close()
except ResourceError as error:
    print(error.exit_code, error)
else:
    print("written")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE and posix_fallocate")
@pytest.mark.parametrize(("limit", "fits"), [(50_000, False), (10, False), (200_000, True)])
def test_a_file_that_cannot_grow_is_a_resource_error_before_any_work(tmp_path: Path, limit: int, fits: bool) -> None:
    """Exit code 6 and the path; found while the file is allocated, so no tensor is read for nothing."""
    code = textwrap.dedent(LIMITED).replace("{limit}", str(limit))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("written" if fits else "6 the output could not be written"), done.stdout
    if not fits:
        assert str(tmp_path / "model.safetensors") in done.stdout


FULL = """
set -e
mount -t tmpfs -o size=64k tmpfs "$1"
exec "$2" -c "$3" "$1"
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small tmpfs in a private namespace")
def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    """On a disk of 64 KiB: 'the disk is full', and what to do."""
    code = textwrap.dedent(LIMITED).replace("{limit}", "10_000_000")
    mount = ["unshare", "--mount", "sh", "-c", FULL, "sh", str(tmp_path), sys.executable, code]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no private mount here: {done.stderr.strip()}")
    assert done.stdout.startswith("6 the disk is full"), (done.stdout, done.stderr)
    assert "free some space" in done.stdout


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        ({"torch_dtype": "float32", "a": 1}, "bfloat16", {"torch_dtype": "bfloat16", "a": 1}),
        ({"dtype": "float32"}, "float16", {"dtype": "float16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, "float16", {"dtype": "float16", "torch_dtype": "float16"}),
        ({"a": 1}, "float16", {"a": 1, "dtype": "float16"}),
        ({"torch_dtype": "float32", "a": None}, None, {"torch_dtype": "float32", "a": None}),
        ({"_name_or_path": "/home/me/secret", "transformers_version": "4.1", "a": 1}, None, {"a": 1}),
    ],
)
def test_the_written_config_follows_the_dtype(
    config: dict[str, Any], dtype: str | None, expected: dict[str, Any]
) -> None:
    """And leaks no path; everything else stays as it is."""
    before = dict(config)
    assert output_config(config, dtype) == expected
    assert config == before
