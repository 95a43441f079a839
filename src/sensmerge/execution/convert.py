"""Numbers as they lie in a file to float32 tiles, and merged tiles back: the kernels that every method shares.

All arithmetic is float32; a merged number is rounded once, to nearest even, as it is written. bf16 and fp16 travel as uint16 bits.
The conversions are integer arithmetic that the compiler vectorises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..methods.kernel import Kernel, kernel


@kernel
def widen_bf16(n: int, raw: Any, base: Any, subtract: bool, row: Any) -> bool:
    """row[:n] = raw, less base where `subtract`; returns whether all of raw is finite."""
    largest = np.uint16(0)
    for i in range(n):
        largest = max(largest, np.uint16(raw[i] & np.uint16(0x7FFF)))
    if subtract:
        for i in range(n):
            row[i] = np.uint32(np.uint32(raw[i]) << np.uint32(16)).view(np.float32) - base[i]
    else:
        for i in range(n):
            row[i] = np.uint32(np.uint32(raw[i]) << np.uint32(16)).view(np.float32)
    return bool(largest < 0x7F80)


@kernel
def widen_f16(n: int, raw: Any, base: Any, subtract: bool, row: Any) -> bool:
    """row[:n] = raw, less base where `subtract`; returns whether all of raw is finite."""
    largest = np.uint16(0)
    for i in range(n):
        largest = max(largest, np.uint16(raw[i] & np.uint16(0x7FFF)))
    # Moving the exponent up by multiplication is exact, for subnormal numbers too.
    shift = np.float32(2.0**112)
    if subtract:
        for i in range(n):
            bits = np.uint32(raw[i])
            size = np.uint32(np.uint32(bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * shift
            sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))
            row[i] = np.uint32(np.float32(size).view(np.uint32) | sign).view(np.float32) - base[i]
    else:
        for i in range(n):
            bits = np.uint32(raw[i])
            size = np.uint32(np.uint32(bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * shift
            sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))
            row[i] = np.uint32(np.float32(size).view(np.uint32) | sign).view(np.float32)
    return bool(largest < 0x7C00)


@kernel
def widen_f32(n: int, raw: Any, base: Any, subtract: bool, row: Any) -> bool:
    """row[:n] = raw, less base where `subtract`; returns whether all of raw is finite."""
    bits = raw.view(np.uint32)
    largest = np.uint32(0)
    for i in range(n):
        largest = max(largest, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    if subtract:
        for i in range(n):
            row[i] = raw[i] - base[i]
    else:
        for i in range(n):
            row[i] = raw[i]
    return bool(largest < 0x7F800000)


@kernel
def narrow_bf16(n: int, values: Any, base: Any, scale: float, adds: bool, raw: Any) -> bool:
    """raw[:n] = values rounded to nearest even, or base + scale · values where it `adds`; returns whether all are finite."""
    largest = np.uint16(0)
    if adds:
        factor = np.float32(scale)
        for i in range(n):
            bits = np.float32(base[i] + np.float32(values[i] * factor)).view(np.uint32)
            up = np.uint32(np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
            # What is not finite keeps its exponent: rounding up must not carry a NaN over into a number.
            finite = np.uint32(bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
            word = np.uint16(np.uint32(bits + (up if finite else np.uint32(0))) >> np.uint32(16))
            raw[i] = word
            largest = max(largest, np.uint16(word & np.uint16(0x7FFF)))
    else:
        for i in range(n):
            bits = np.float32(values[i]).view(np.uint32)
            up = np.uint32(np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
            finite = np.uint32(bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
            word = np.uint16(np.uint32(bits + (up if finite else np.uint32(0))) >> np.uint32(16))
            raw[i] = word
            largest = max(largest, np.uint16(word & np.uint16(0x7FFF)))
    return bool(largest < 0x7F80)


@kernel
def narrow_f32(n: int, values: Any, base: Any, scale: float, adds: bool, raw: Any) -> bool:
    """raw[:n] = values, or base + scale · values where it `adds`; returns whether all are finite."""
    if adds:
        factor = np.float32(scale)
        for i in range(n):
            raw[i] = base[i] + np.float32(values[i] * factor)
    else:
        for i in range(n):
            raw[i] = values[i]
    bits = raw.view(np.uint32)
    largest = np.uint32(0)
    for i in range(n):
        largest = max(largest, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return bool(largest < 0x7F800000)


@kernel
def narrow_f16(n: int, values: Any, base: Any, scale: float, adds: bool, raw: Any) -> bool:
    """raw[:n] = values rounded to nearest even, or base + scale · values where it `adds`; returns whether all are finite."""
    factor = np.float32(scale)
    half = np.float32(0.5)
    largest = np.uint16(0)
    for i in range(n):
        value = np.float32(base[i] + np.float32(values[i] * factor)) if adds else values[i]
        bits = np.float32(value).view(np.uint32)
        size = np.uint32(bits & np.uint32(0x7FFFFFFF))
        sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
        # Normal: drop 13 bits, rounding to nearest even, and move the exponent from 127 to 15.
        odd = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1))
        normal = np.uint32(np.uint32(size + np.uint32(0xFFF) + odd - np.uint32(0x38000000)) >> np.uint32(13))
        # Subnormal: adding 0.5 leaves float32 just the bits that fp16 has there, rounded by the hardware.
        small = np.uint32(np.float32(size.view(np.float32) + half).view(np.uint32) - np.uint32(0x3F000000))
        word = small if size < np.uint32(0x38800000) else normal
        word = np.uint32(0x7C00) if size >= np.uint32(0x47800000) else word
        raw[i] = np.uint16(word | sign)
        largest = max(largest, np.uint16(word))
    return bool(largest < 0x7C00)


WIDEN: Mapping[str, Kernel] = {"BF16": widen_bf16, "F16": widen_f16, "F32": widen_f32}
NARROW: Mapping[str, Kernel] = {"BF16": narrow_bf16, "F16": narrow_f16, "F32": narrow_f32}
# How the raw elements are handed to those kernels.
BITS: Mapping[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}
