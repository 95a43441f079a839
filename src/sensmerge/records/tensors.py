"""A tensor as a checkpoint's header tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["block", "embed", "final_norm", "lm_head", "other"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint, as its header tells: safetensors dtype name ("BF16") and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count
