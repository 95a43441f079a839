"""What linear layers get as input: Gram matrices and mean magnitudes, for merge methods that need them.

Σ x xᵀ over the tokens of the samples is all that RegMean (Jin et al., arXiv 2212.09849) knows of a task; mean |x| is the scale of
each input feature (Lin et al., "AWQ", arXiv 2306.00978). The numbers lie in a file that is mapped into memory while they are added
up, so that they may be larger than memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import IncompatibleModelsError
from .batches import Batch
from .per_sample import is_linear

# Watches a part of the model while a batch goes through it.
Observing = Callable[[nn.Module, Batch], AbstractContextManager[None]]


def not_observed(part: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """An Observing that sees nothing."""
    return nullcontext()


class ActivationStatistics:
    """Sums over real tokens of what each linear layer gets, in a safetensors file; `names` gives the tensor of a layer's weight.

    The file holds for every tensor of a linear layer `gram/<tensor>`, Σ x xᵀ, float32 [in, in], and `mean_abs/<tensor>`, float32
    [in]; its metadata says how many `tokens` were seen. A tied matrix appears once, as the layer. Cost: in·in products a token,
    half of what the layer itself takes where it is square. Disk: 4·in² bytes a layer.
    """

    def __init__(self, names: Mapping[nn.Module, str], path: Path) -> None:
        self._names, self._path = dict(names), path
        self._tokens: dict[str, int] = dict.fromkeys(self._names.values(), 0)
        inputs = {name: _inputs_of(module) for module, name in self._names.items()}
        shapes: dict[str, tuple[int, ...]] = {f"gram/{name}": (size, size) for name, size in inputs.items()}
        shapes |= {f"mean_abs/{name}": (size,) for name, size in inputs.items()}
        header: dict[str, Any] = {}
        end = 0
        for name, shape in shapes.items():
            size = 4 * int(np.prod(shape))
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        self._header, self._end, self._shapes = header, end, shapes
        self._sums: dict[str, Tensor] = {}
        self._seen: set[tuple[str, int]] = set()
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums.clear()
        self._seen.clear()
        self._path.unlink(missing_ok=True)
        # The number of tokens is known at the end: it has as many characters from the beginning.
        start = self._write_header(0)
        with self._path.open("r+b") as file:
            file.truncate(start + self._end)
        data = np.memmap(self._path, np.uint8, "r+", offset=0, shape=(start + self._end,))
        for name, shape in self._shapes.items():
            first, last = (start + offset for offset in self._header[name]["data_offsets"])
            self._sums[name] = torch.from_numpy(data[first:last].view(np.float32)).reshape(shape)
        self._data = data
        self._tokens = dict.fromkeys(self._tokens, 0)

    @contextmanager
    def observing(self, part: nn.Module, batch: Batch) -> Iterator[None]:
        """While open, what linear layers of `part` get is added up, padding excepted."""

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                self._add(name, inputs[0].detach(), batch)

            return hook

        hooks = [
            module.register_forward_pre_hook(watch(self._names[module]))
            for module in part.modules()
            if module in self._names
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _add(self, name: str, inputs: Tensor, batch: Batch) -> None:
        if (name, id(batch)) in self._seen:
            # A streamed model goes once more through what lies before its blocks.
            return
        self._seen.add((name, id(batch)))
        if inputs.shape[:-1].numel() != batch.ids.numel():
            raise IncompatibleModelsError(
                "a linear layer does not get every token",
                where=f"tensor '{name}', input {list(inputs.shape)}",
                why="activation statistics are sums over the tokens of the samples",
                fix="use a method that needs no activation statistics for this family",
            )
        real = inputs.reshape(*batch.ids.shape, inputs.shape[-1])[batch.real.bool()].float()
        self._sums[f"gram/{name}"] += (real.t() @ real).cpu()
        self._sums[f"mean_abs/{name}"] += real.abs().sum(0).cpu()
        self._tokens[name] += len(real)

    def finish(self) -> None:
        """Complete the file: sums of magnitudes become means."""
        for name, tokens in self._tokens.items():
            self._sums[f"mean_abs/{name}"] /= max(tokens, 1)
        self._data.flush()
        self._sums.clear()
        del self._data
        self._write_header(max(self._tokens.values(), default=0))

    def _write_header(self, tokens: int) -> int:
        """Returns where the data begins."""
        whole = {"__metadata__": {"tokens": f"{tokens:012d}"}, **self._header}
        text = json.dumps(whole).encode()
        text += b" " * (-(8 + len(text)) % 64)
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
        return 8 + len(text)


def linear_layers(model: Any, name_of: Callable[[nn.Module], str]) -> dict[nn.Module, str]:
    """The linear layers of a model and their tensors' names; experts that are fused into one parameter are none."""
    return {module: name_of(module) for module in model.modules() if is_linear(module)}


def _inputs_of(module: Any) -> int:
    """The input features of a linear layer: Conv1D stores its weight the other way round."""
    return int(module.weight.shape[1] if isinstance(module, nn.Linear) else module.weight.shape[0])
