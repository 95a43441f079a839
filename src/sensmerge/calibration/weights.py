"""A model's weights, in memory only while they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .naming import Names, Stored
from .per_sample import Recorder


class Reached(Exception):
    """A layer was reached behind which nothing is wanted."""


@contextmanager
def at_head(model: Any, take: Callable[[Tensor], None] | None, *, stop: bool) -> Iterator[None]:
    """While open, `take` gets what the output head gets, [S, T, H], detached; `stop` raises Reached instead of forming logits."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if take is not None:
            take(inputs[0].detach())
        if stop:
            raise Reached

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Weights:
    """The weights of a model whose parameters are on the meta device.

    `names` says where each lies in the checkpoint, `read(name)` gives a tensor of it in the compute dtype, on the device.
    """

    def __init__(self, model: Any, names: Names, read: Callable[[str], Tensor]) -> None:
        self._read = read
        stored = {id(parameter): names[name] for name, parameter in model.named_parameters()}
        self._stored = {
            module: {name: stored[id(each)] for name, each in module.named_parameters(recurse=False)}
            for module in model.modules()
        }

    def stored_of(self, module: nn.Module) -> Mapping[str, tuple[Stored, ...]]:
        """Where a module's own parameters lie in the checkpoint."""
        return self._stored[module]

    @contextmanager
    def loaded(self, modules: Sequence[nn.Module], recorder: Recorder | None = None) -> Iterator[None]:
        """While open, the modules' own weights are in memory."""
        held = [module for module in modules if self._stored[module]]
        before = {module: dict(module._parameters) for module in held}
        shared: dict[tuple[str, ...], nn.Parameter] = {}
        try:
            for module in held:
                for attribute, stored in self._stored[module].items():
                    # A tied matrix is read once for both its uses.
                    key = tuple(each.name for each in stored)
                    if key not in shared:
                        shared[key] = nn.Parameter(
                            self._assembled(before[module][attribute], stored), requires_grad=False
                        )
                    module._parameters[attribute] = shared[key]
                if recorder is not None:
                    recorder.freeze(module)
            yield
        finally:
            for module in held:
                module._parameters.update(before[module])

    def _assembled(self, blank: Any, stored: tuple[Stored, ...]) -> Tensor:
        if len(stored) == 1:
            return self._read(stored[0].name).reshape(blank.shape)
        whole: Tensor | None = None
        for each in stored:
            part = self._read(each.name)
            if whole is None:
                whole = torch.empty(blank.shape, dtype=part.dtype, device=part.device)
            whole[each.part] = part.reshape(whole[each.part].shape)
        assert whole is not None
        return whole
