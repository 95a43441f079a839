"""Conversions between stored bits and float32: torch's rounding, bit for bit, in every case there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sensmerge.checkpoints.formats import DTYPES, FLOATS, ITEM_SIZES, from_float32, is_finite, to_float32

Bits = NDArray[np.uint16]
ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def raw_16(dtype: str) -> NDArray[np.generic]:
    """All 65536 patterns as our reader hands them over."""
    return ALL_16_BITS if dtype == "BF16" else ALL_16_BITS.view(np.float16)


def torch_bits(values: NDArray[np.float32], dtype: str) -> Bits:
    """What torch rounds `values` to, as bits."""
    return torch.from_numpy(values.copy()).to(TORCH[dtype]).view(torch.uint16).numpy()


def bits_of(raw: NDArray[np.generic]) -> Bits:
    return raw.view(np.uint16)


def hard_values() -> NDArray[np.float32]:
    """Ties, their neighbours, subnormals, the borders of overflow, both signs, infinities; and random bit patterns."""
    every = np.concatenate([to_float32(raw_16(dtype), dtype) for dtype in ("BF16", "F16")])
    finite = every[np.isfinite(every)].astype(np.float64)
    ordered = np.unique(finite)
    ties = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    around = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    half = [
        np.float32(x)
        for x in (65504, 65519.996, 65520, 65536, 3.3895314e38, 3.3961775e38, 3.4028235e38, 1e-45, 1e-41, 6e-8, 2.98e-8)
    ]
    random = np.random.default_rng(0).integers(0, 1 << 32, size=300_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([*around, np.array(half + [-x for x in half]), finite.astype(np.float32), random])
    return np.concatenate([values, np.array([np.inf, -np.inf, 0.0, -0.0], dtype=np.float32)])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern_survives_the_way_to_float32_and_back(dtype: str) -> None:
    """All 65536; a NaN stays a NaN of its sign."""
    raw = raw_16(dtype)
    wide = to_float32(raw, dtype)
    assert wide.dtype == np.float32
    back = bits_of(from_float32(wide, dtype))
    nan = np.isnan(wide)
    assert (back[~nan] == ALL_16_BITS[~nan]).all()
    assert np.isnan(to_float32(back.view(raw.dtype), dtype)[nan]).all()
    assert ((back[nan] ^ ALL_16_BITS[nan]) & 0x8000 == 0).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern_means_what_torch_means(dtype: str) -> None:
    wide = to_float32(raw_16(dtype), dtype)
    theirs = torch.from_numpy(ALL_16_BITS.copy()).view(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(wide, theirs)
    finite = ~np.isnan(wide)
    assert (np.signbit(wide) == np.signbit(theirs))[finite].all(), "-0.0 keeps its sign"


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_is_torch_s_bit_for_bit(dtype: str) -> None:
    """To nearest, ties to even, subnormals kept, overflow to infinity."""
    values = hard_values()
    numbers = values[~np.isnan(values)]
    with np.errstate(all="raise", over="ignore", under="ignore"):
        ours = bits_of(from_float32(numbers, dtype))
    assert ours.dtype == np.uint16
    differ = np.nonzero(ours != torch_bits(numbers, dtype))[0]
    assert len(differ) == 0, [(numbers[i], hex(ours[i])) for i in differ[:5]]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7F80FFFF, 0xFFFF8000])
def test_a_nan_stays_a_nan(dtype: str, bits: int) -> None:
    """Whatever its payload: it never becomes infinity or zero by a carry."""
    value = np.array([bits], dtype=np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        raw = from_float32(value, dtype)
        assert np.isnan(to_float32(raw, dtype)).all()
    assert not is_finite(raw, dtype).any()


@pytest.mark.parametrize(
    ("value", "dtype", "bits"),
    [
        (1.0, "BF16", 0x3F80), (1.00390625, "BF16", 0x3F80), (1.01171875, "BF16", 0x3F82), (3.4e38, "BF16", 0x7F80),
        (1.0, "F16", 0x3C00), (1.00048828125, "F16", 0x3C00), (1.00146484375, "F16", 0x3C02), (65519.0, "F16", 0x7BFF),
        (65520.0, "F16", 0x7C00), (2.0**-24, "F16", 0x0001), (2.0**-25, "F16", 0x0000), (-(2.0**-149), "BF16", 0x8000),
    ],
)  # fmt: skip
def test_known_values(value: float, dtype: str, bits: int) -> None:
    """By hand: ties go to the even neighbour, overflow to infinity, half the smallest subnormal to zero."""
    assert bits_of(from_float32(np.array([value], dtype=np.float32), dtype)).tolist() == [bits]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_is_finite_knows_every_pattern(dtype: str) -> None:
    raw = raw_16(dtype)
    assert (is_finite(raw, dtype) == np.isfinite(to_float32(raw, dtype))).all()


def test_is_finite_for_float32() -> None:
    values = hard_values()
    assert (is_finite(values, "F32") == np.isfinite(values)).all()


def test_float32_passes_through_unchanged() -> None:
    values = hard_values()
    assert from_float32(to_float32(values, "F32"), "F32").tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_to_float32_gives_memory_of_its_own(dtype: str) -> None:
    """The engine writes into tiles; what was read must not change."""
    raw = np.ones(4, dtype=FLOATS[dtype])
    wide = to_float32(raw, dtype)
    wide[:] = 7
    assert (raw == np.ones(4, dtype=FLOATS[dtype])).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_nothing_converts_to_nothing(dtype: str) -> None:
    empty = np.zeros(0, dtype=FLOATS[dtype])
    assert from_float32(to_float32(empty, dtype), dtype).shape == (0,)


def test_names_and_sizes_are_those_of_torch_and_safetensors() -> None:
    for name, dtype in DTYPES.items():
        assert getattr(torch, name) is TORCH[dtype]
        assert ITEM_SIZES[dtype] == TORCH[dtype].itemsize
        assert np.dtype(FLOATS[dtype]).itemsize == ITEM_SIZES[dtype]
