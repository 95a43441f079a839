"""Numbers as they lie in a safetensors file, to float32 and back.

bf16 has no NumPy type: its bits travel as uint16 and become float32 by a shift; back, they are rounded to nearest even by integer
arithmetic. float16 uses NumPy's own conversion, which rounds to nearest even as well.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.generic]

ITEM_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

# The dtypes that can be merged, and how their bits are held in memory.
FLOATS: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}

# A recipe's names (those of transformers) to safetensors' names.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def to_float32(raw: Raw, dtype: str) -> NDArray[np.float32]:
    """float32 copy of raw elements of `dtype` (BF16 as uint16 bits, F16, F32); exact."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> Raw:
    """`values` rounded once, to nearest even, to `dtype` (BF16 as uint16 bits); what overflows becomes infinity."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    # A NaN's low bits could carry over into infinity or minus zero: keep NaNs quiet NaNs.
    rounded = np.where(np.isnan(values), bits | np.uint32(0x400000), rounded)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def is_finite(raw: Raw, dtype: str) -> NDArray[np.bool_]:
    """Which raw elements are neither NaN nor infinite."""
    bits = np.uint16(0x7F80)
    finite: NDArray[np.bool_] = np.isfinite(raw) if dtype != "BF16" else (raw.astype(np.uint16) & bits) != bits
    return finite
