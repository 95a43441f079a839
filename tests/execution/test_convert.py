"""Conversions between stored numbers and float32 tiles: every half-precision number there is, and rounding against torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensmerge.execution.convert import BITS, NARROW, WIDEN

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def as_torch(values: Any, dtype: str) -> Any:
    """float32 values rounded to `dtype` by torch, as that dtype's bits."""
    rounded = torch.from_numpy(values).to(TORCH[dtype])
    return rounded.numpy() if dtype == "F32" else rounded.view(torch.uint16).numpy()


def awkward() -> Any:
    """Finite float32 of every size, halfway cases, subnormals, signed zeros, the largest."""
    random = np.random.default_rng(0)
    any_bits = random.integers(0, 1 << 32, 1 << 18, dtype=np.uint64).astype(np.uint32).view(np.float32)
    half = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(np.float32)
    half16 = (np.arange(1 << 17, dtype=np.uint32) * np.uint32(0x1000) + np.uint32(0x33000000)).view(np.float32)
    special = np.array([0.0, -0.0, 65504.0, 65519.0, 65520.0, 1e-45, 2**-24, 2**-25, 1.5 * 2**-25, 3.4e38], np.float32)
    values = np.concatenate([any_bits, half, half16, -half16, special, -special])
    return values[np.isfinite(values)]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_half_precision_number_widens_exactly(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    exact = torch.from_numpy(bits.view(np.int16).copy()).view(TORCH[dtype]).float().numpy()
    finite = np.isfinite(exact)
    row = np.empty(len(bits), np.float32)
    assert not WIDEN[dtype](len(bits), bits, row, False, row)
    assert np.array_equal(row[finite].view(np.uint32), exact[finite].view(np.uint32))
    kept = np.ascontiguousarray(bits[finite])
    row = np.empty(len(kept), np.float32)
    assert WIDEN[dtype](len(kept), kept, row, False, row)
    base = np.full(len(kept), 0.37, np.float32)
    assert WIDEN[dtype](len(kept), kept, base, True, row)
    assert np.array_equal(row, exact[finite] - base)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_to_nearest_even_and_once(dtype: str) -> None:
    values = awkward()
    expected = as_torch(values, dtype)
    raw = np.empty(len(values), BITS[dtype])
    finite = NARROW[dtype](len(values), values, values, 1.0, False, raw)
    assert np.array_equal(raw.view(np.uint8), expected.view(np.uint8))
    assert finite == (dtype == "F32")
    small = values[np.abs(values) < 60000]
    raw = np.empty(len(small), BITS[dtype])
    assert NARROW[dtype](len(small), small, small, 1.0, False, raw)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_an_update_is_scaled_and_added_before_it_is_rounded(dtype: str) -> None:
    random = np.random.default_rng(1)
    base, update = (random.normal(size=100_000).astype(np.float32) for _ in range(2))
    raw = np.empty(len(base), BITS[dtype])
    assert NARROW[dtype](len(base), update, base, 0.3, True, raw)
    expected = as_torch(base + update * np.float32(0.3), dtype)
    assert np.array_equal(raw, expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 999])
def test_one_number_that_is_not_finite_is_noticed(dtype: str, value: float, place: int) -> None:
    values = np.ones(1000, np.float32)
    values[place] = value
    raw = np.empty(1000, BITS[dtype])
    assert not NARROW[dtype](1000, values, values, 1.0, False, raw)
    row = np.empty(1000, np.float32)
    assert not WIDEN[dtype](1000, as_torch(values, dtype), row, False, row)
    # Only the elements that are asked for count.
    assert WIDEN[dtype](place, as_torch(values, dtype), row, False, row)


CACHED = """
import sys
from pathlib import Path
import sensmerge
from sensmerge.methods.kernel import Kernel

made = []
first = Kernel.compiled.func
Kernel.compiled.func = lambda self: made.append(first(self)) or made[-1]
sensmerge.merge(sensmerge.load_recipe(sys.argv[1]), sys.argv[2])
print(sum(sum(each.stats.cache_misses.values()) for each in made), sum(sum(each.stats.cache_hits.values()) for each in made))
"""


def test_kernels_are_compiled_once_on_a_machine(tmp_path: Path) -> None:
    from tests.builders import write_checkpoint

    for number, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / name, {"model.layers.0.w": np.full((3, 4), number, np.float32)})
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {density: 0.5}\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def misses_and_hits(out: str) -> list[int]:
        command = [sys.executable, "-c", CACHED, str(recipe), str(tmp_path / out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return [int(number) for number in done.stdout.split()]

    first, second = misses_and_hits("one"), misses_and_hits("two")
    assert first[0] > 3
    assert second == [0, first[0]]


def test_a_machine_without_a_place_for_the_cache_merges_all_the_same(tmp_path: Path) -> None:
    """Read-only packages and no home: compiled in every process."""
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from sensmerge.execution.convert import narrow_f32\n"
        "out = np.empty(3, np.float32)\n"
        "narrow_f32(3, np.ones(3, np.float32), out, 1.0, False, out)\n"
        "print(out.sum())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3.0", done.stderr
