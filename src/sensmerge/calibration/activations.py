"""Activations that are kept between passes: in memory, and in a scratch file where they are many."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IN_MEMORY_BYTES = 64 << 20


class Activations:
    """Tensors by key, kept in memory up to a limit and in a scratch file beyond it."""

    def __init__(self, folder: Path | None = None, limit: int = IN_MEMORY_BYTES) -> None:
        self._kept: dict[Any, Tensor] = {}
        self._spilled: dict[Any, tuple[int, torch.Size, torch.dtype, torch.device]] = {}
        self._left = limit
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by `close`
        self._end = 0

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def put(self, key: Any, value: Tensor) -> None:
        """Keep a tensor; it replaces one of the same key."""
        value = value.detach()
        before = self._kept.pop(key, None)
        self._left += 0 if before is None else before.nbytes
        if value.nbytes <= self._left:
            self._left -= value.nbytes
            self._kept[key] = value
            self._spilled.pop(key, None)
            return
        data = value.contiguous().cpu()
        self._file.seek(self._end)
        self._file.write(data.view(torch.uint8).numpy().data)
        self._spilled[key] = self._end, data.shape, data.dtype, value.device
        self._end += data.nbytes

    def take(self, key: Any) -> Tensor:
        """The tensor that was kept, which is then forgotten."""
        value = self.get(key)
        if self._kept.pop(key, None) is not None:
            self._left += value.nbytes
        self._spilled.pop(key, None)
        return value

    def get(self, key: Any) -> Tensor:
        """The tensor that was kept, which stays."""
        if key in self._kept:
            return self._kept[key]
        at, shape, dtype, device = self._spilled[key]
        self._file.seek(at)
        data = np.frombuffer(bytearray(self._file.read(shape.numel() * dtype.itemsize)), np.uint8)
        return torch.from_numpy(data).view(dtype).reshape(shape).to(device)

    def close(self) -> None:
        """Give up everything."""
        self._kept.clear()
        self._file.close()
