"""Memory does not grow with the model: two layers of a 70 B model, under a limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HIDDEN, KV, INTERMEDIATE = 8192, 1024, 28672
MIB = 1 << 20

# Sets the limit to what the process holds once its kernels are loaded, and 400 MiB more, then merges.
LIMITED = """
import json, resource, sys
from pathlib import Path
import sensmerge
from sensmerge.records import TensorSpec

def held(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

small, large = Path(sys.argv[1]), Path(sys.argv[2])
sensmerge.merge(sensmerge.load_recipe(small), small.parent / "out")
limit = held("VmData") + 400 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
sensmerge.merge(sensmerge.load_recipe(large), large.parent / "out", jobs=2)
print(json.dumps({"peak": held("VmHWM") - before}))
"""


def shapes(scale: int) -> dict[str, list[int]]:
    """Two layers of a Llama of 70 billion parameters, or the same at a fraction of the width."""
    hidden, kv, inner = HIDDEN // scale, KV // scale, INTERMEDIATE // scale
    found: dict[str, list[int]] = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        found |= {
            f"{prefix}input_layernorm.weight": [hidden],
            f"{prefix}self_attn.q_proj.weight": [hidden, hidden],
            f"{prefix}self_attn.k_proj.weight": [kv, hidden],
            f"{prefix}self_attn.o_proj.weight": [hidden, hidden],
            f"{prefix}mlp.gate_proj.weight": [inner, hidden],
            f"{prefix}mlp.down_proj.weight": [hidden, inner],
        }
    return found


def sparse_model(folder: Path, scale: int, mark: int) -> None:
    """A bf16 checkpoint whose weights are zero, a hole in the file, but for a few at both ends of every tensor."""
    folder.mkdir(parents=True)
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes(scale).items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
        for entry in header.values():
            for place in entry["data_offsets"][0], entry["data_offsets"][1] - 8:  # type: ignore[index]
                file.seek(start + place)
                file.write(bytes([mark, 0x3F] * 4))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_DATA")
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_two_layers_of_a_70b_model_merge_in_400_mib(method: str, tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    if free.f_bavail * free.f_frsize < 6 << 30:
        pytest.skip("needs 6 GiB of disk")
    for name, scale in (("small", 64), ("large", 1)):
        for mark, model in enumerate(("base", "a", "b")):
            sparse_model(tmp_path / name / model, scale, 16 * mark)
        recipe = {
            "merge_method": method,
            "base_model": "base",
            "models": [{"model": "a"}, {"model": "b"}],
            "parameters": {"density": 0.5},
        }
        (tmp_path / name / "recipe.yml").write_text(json.dumps(recipe))
    command = [sys.executable, "-c", LIMITED, *(str(tmp_path / name / "recipe.yml") for name in ("small", "large"))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["peak"] < 400 * MIB
    out = tmp_path / "large" / "out" / "model.safetensors"
    # What is not zero in the inputs is not zero in the result, at the end of the last tensor too.
    with out.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        assert any(file.read(8))
    out.unlink()
