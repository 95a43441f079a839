"""Methods of the second kind: functions of whole tensors, in torch, on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoints.formats import to_float32
from ..checkpoints.source import TensorSource
from ..errors import NonFiniteError
from ..methods import Method
from ..plan import call_of
from ..records import TensorInput, TensorPlan
from .tiles import TILE, Worker, divided, position

if TYPE_CHECKING:
    import torch

    from .phases import Sink


class WholePhase:
    """Reads every input of a tensor whole, merges it on a device, and hands it on in tiles."""

    def __init__(
        self, tensor: TensorPlan, method: Method, readers: Mapping[str, TensorSource], sink: Sink, device: str
    ) -> None:
        self.units: Sequence[tuple[int, int]] = [(0, tensor.spec.elements)]
        self._tensor, self._method, self._readers, self._sink, self._device = tensor, method, readers, sink, device

    def work(self, worker: Worker, unit: int) -> None:
        """Merge the tensor."""
        assert self._method.whole is not None
        tensor = self._tensor
        base = None if tensor.base is None else self._read(tensor.base)
        experts = [self._read(part) for part in tensor.experts]
        merged = self._method.whole(call_of(tensor), base, experts)
        if tuple(merged.shape) != tensor.spec.shape:
            raise ValueError(
                f"merge method '{self._method.name}' made shape {tuple(merged.shape)} of '{tensor.spec.name}',"
                f" which is {tensor.spec.shape}"
            )
        result = merged.detach().float().cpu().contiguous().reshape(-1).numpy()
        original = np.zeros(0, np.float32) if base is None else base.cpu().reshape(-1).numpy()
        worker.widen_to(TILE)
        for chunk in divided(0, tensor.spec.elements, TILE):
            size = chunk[1] - chunk[0]
            worker.out[:size] = result[chunk[0] : chunk[1]]
            if base is not None:
                worker.base[:size] = original[chunk[0] : chunk[1]]
            self._sink.tile(worker, tensor, chunk[0], size, chunk)
            self._sink.chunk(worker, tensor, chunk)

    def finish(self) -> None:
        """Nothing is left to do."""

    def _read(self, part: TensorInput) -> torch.Tensor:
        import torch

        source = self._readers[part.model]
        spec = source.tensors[part.tensor]
        values = to_float32(source.read(part.tensor, 0, spec.elements), spec.dtype)
        if not np.isfinite(values).all():
            raise NonFiniteError(
                "a weight is NaN or infinite",
                where=f"model {source.label}, tensor '{part.tensor}',"
                f" element {position(spec.shape, int(np.argmin(np.isfinite(values))))}",
                why="it would spread into the merged model",
                fix="use an undamaged copy of the model",
            )
        return torch.from_numpy(values).reshape(spec.shape).to(self._device)
