"""A model's identity: a hash of its tensors' names and shapes and of blocks of their bytes, that costs no pass over the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np

from .formats import ITEM_SIZES
from .source import TensorSource

BLOCKS = 16
BLOCK_BYTES = 4096


def fingerprint_of(source: TensorSource) -> str:
    """SHA-256 (hex) over sorted (name, dtype, shape, 16 evenly spaced 4 KiB blocks).

    It does not depend on shards or paths. A change that lies between the blocks of a tensor larger than 64 KiB is not seen.
    """
    digest = hashlib.sha256()
    for name in sorted(source.tensors):
        spec = source.tensors[name]
        digest.update(json.dumps([name, spec.dtype, list(spec.shape)]).encode())
        item = ITEM_SIZES[spec.dtype]
        for offset, size in evenly_spaced_blocks(spec.elements * item):
            # A block may begin inside an element of eight bytes; the elements that hold it are read.
            first, last = offset // item, -(-(offset + size) // item)
            block = np.empty((last - first) * item, np.uint8)
            source.read_into(name, first, block)
            digest.update(block[offset - first * item :][:size].data)
    return digest.hexdigest()


def evenly_spaced_blocks(size: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of at most 16 blocks of 4 KiB, from the first byte to the last; everything if it fits."""
    if size <= BLOCKS * BLOCK_BYTES:
        yield 0, size
        return
    last = size - BLOCK_BYTES
    for block in range(BLOCKS):
        yield last * block // (BLOCKS - 1), BLOCK_BYTES
