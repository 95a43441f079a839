"""A model of which one block at a time is in memory, for models larger than memory: the same sums as the model held whole.

Weights are read from the checkpoint when a pass reaches them and dropped after it. The model's own `forward` prepares what the blocks
are called with (masks, position embeddings) while its blocks only pass on what they get; then the blocks are called one after the
other for all batches. Only activations at the blocks' boundaries are kept, in memory or in a scratch file; a block is computed again
for its backward pass (Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IncompatibleModelsError
from .activations import Activations
from .batches import Batch, call_arguments
from .per_sample import Names, Recorder, Sums

# Logits of the last layer that are formed at once, in bytes of float32.
LOGITS_BYTES = 64 << 20

Read = Callable[[str], Tensor]


class Reached(Exception):
    """A layer was reached behind which nothing is wanted."""


class StreamedModel:
    """A causal language model whose weights are read when they are needed.

    `model` has its parameters on the meta device; `blocks` are its transformer blocks; `read(name)` gives a tensor of the checkpoint
    in the compute dtype, on the device.
    """

    def __init__(self, model: Any, names: Names, read: Read, device: str) -> None:
        self.model, self.device = model, device
        self._read = read
        self.blocks = _blocks_of(model)
        inside = {module for block in self.blocks for module in block.modules()}
        self.outside = [module for module in model.modules() if module not in inside]
        self.embedding = model.get_input_embeddings()
        self.head = model.get_output_embeddings()
        self._in_tuple = False
        stored = {id(parameter): names[name] for name, parameter in model.named_parameters()}
        self._stored = {
            module: {name: stored[id(each)] for name, each in module.named_parameters(recurse=False)}
            for module in model.modules()
        }

    @contextmanager
    def loaded(self, modules: Sequence[nn.Module], recorder: Recorder | None = None) -> Iterator[None]:
        """While open, the modules' own weights are in memory."""
        held = [module for module in modules if self._stored[module]]
        before = {module: dict(module._parameters) for module in held}
        shared: dict[Any, nn.Parameter] = {}
        try:
            for module in held:
                for attribute, stored in self._stored[module].items():
                    key = stored
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

    def _assembled(self, blank: Any, stored: Any) -> Tensor:
        if len(stored) == 1:
            return self._read(stored[0].name).reshape(blank.shape)
        whole = torch.empty(blank.shape, dtype=blank.dtype, device=self.device)
        for each in stored:
            whole[each.part] = self._read(each.name).reshape(whole[each.part].shape)
        return whole

    def front(self, batch: Batch) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """What the first block gets, [S, T, H], and what each block is called with beside it. Needs the embedding loaded.

        Raises IncompatibleModelsError where a block gets more from the weights than its input.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        found: list[Tensor] = []

        def stub(hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
            if not found:
                found.append(hidden)
            calls.append((arguments, named))
            if len(calls) == len(self.blocks):
                raise Reached
            return hidden

        with self._blocks_replaced(stub):
            try:
                self.model(input_ids=batch.ids, **call_arguments(self.model, batch))
            except Reached:
                pass
        if len(calls) != len(self.blocks):
            raise self._refused(f"{len(calls)} of its {len(self.blocks)} blocks are called in one pass")
        for arguments, named in calls:
            for value in (*arguments, *named.values()):
                parts = value if isinstance(value, tuple | list) else [value]
                if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
                    raise self._refused("its blocks get more from the embedding than their input")
        return found[0], calls

    def block(self, at: int, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """The output of a block, which has to be loaded."""
        output = self.blocks[at](hidden, *call[0], **call[1])
        self._in_tuple = isinstance(output, tuple)
        first = output[0] if self._in_tuple else output
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            raise self._refused("its blocks do not give back what they get")
        return first

    def tail(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The logits [S, T, V] for the last block's output. Needs everything outside the blocks loaded but the embedding."""
        count = 0

        def stub(passed: Tensor, *arguments: Any, **named: Any) -> Tensor:
            nonlocal count
            count += 1
            result = hidden if count == len(self.blocks) else passed
            return (result,) if self._in_tuple else result  # type: ignore[return-value]

        blank = torch.zeros_like(hidden, requires_grad=False)
        with self._blocks_replaced(stub):
            return self.model(inputs_embeds=blank, **call_arguments(self.model, batch)).logits

    @contextmanager
    def _blocks_replaced(self, stub: Callable[..., Tensor]) -> Iterator[None]:
        # The modules stay where they are: their attributes are asked for on the way (a layer's kind of attention).
        for block in self.blocks:
            block.forward = stub
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _refused(self, why: str) -> IncompatibleModelsError:
        return IncompatibleModelsError(
            f"models of the class {type(self.model).__name__} cannot be streamed",
            where=f"model type '{self.model.config.model_type}'",
            why=why,
            fix="use `--memory resident`",
        )


def _blocks_of(model: Any) -> list[Any]:
    """The transformer blocks: the longest list of modules of one class whose names end in numbers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    return list(max(lists, key=len)) if lists else []


def streamed_sums(
    streamed: StreamedModel, recorder: Recorder, batches: Sequence[Batch], advance: Callable[[], None]
) -> list[Mapping[str, Tensor]]:
    """The per-sample sums of every batch: forward block by block, then backward block by block, each computed twice.

    Memory: the largest of a block, the embedding and the head; a batch's activations inside one block; the boundary activations.
    """
    boundary = Activations()
    sums = [Sums(batch) for batch in batches]
    calls = []
    front = [module for module in streamed.outside if module is not streamed.head or module is streamed.embedding]
    tail = [module for module in streamed.outside if module is not streamed.embedding]
    try:
        with streamed.loaded(front), torch.no_grad():
            for at, batch in enumerate(batches):
                hidden, call = streamed.front(batch)
                calls.append(call)
                boundary.put((at, 0), hidden)
        for block, module in enumerate(streamed.blocks):
            with streamed.loaded(list(module.modules())), torch.no_grad():
                for at in range(len(batches)):
                    hidden = boundary.get((at, block), streamed.device)
                    boundary.put((at, block + 1), streamed.block(block, hidden, calls[at][block]))
            advance()
        last = len(streamed.blocks)
        gradients = Activations()
        with streamed.loaded(tail, recorder):
            for at, batch in enumerate(batches):
                gradients.put(
                    at, _tail_backward(streamed, recorder, batch, boundary.take((at, last), streamed.device), sums[at])
                )
        for block in reversed(range(last)):
            module = streamed.blocks[block]
            with streamed.loaded(list(module.modules()), recorder):
                for at in range(len(batches)):
                    hidden = boundary.take((at, block), streamed.device).requires_grad_(True)
                    with recorder.recording(module, sums[at]):
                        output = streamed.block(block, hidden, calls[at][block])
                        recorder.check_all_seen(module)
                        output.backward(gradients.take(at, streamed.device))
                    assert hidden.grad is not None
                    gradients.put(at, hidden.grad)
            advance()
        with streamed.loaded(front, recorder):
            for at, batch in enumerate(batches):
                with recorder.recording(streamed.model, sums[at]):
                    hidden, _ = streamed.front(batch)
                    hidden.backward(gradients.take(at, streamed.device))
    finally:
        boundary.close()
    return [each.by_name for each in sums]


def _tail_backward(streamed: StreamedModel, recorder: Recorder, batch: Batch, hidden: Tensor, sums: Sums) -> Tensor:
    """Norm, head and loss for a few samples at a time; returns the gradient of the last block's output."""
    vocabulary = streamed.head.weight.shape[0]
    step = max(1, LOGITS_BYTES // (4 * vocabulary * batch.ids.shape[1]))
    gradient = torch.empty_like(hidden)
    for first in range(0, len(batch.lengths), step):
        part = batch.slice(first, first + step)
        own = Sums(part)
        leaf = hidden[first : first + step].detach().clone().requires_grad_(True)
        with recorder.recording(streamed.model, own):
            part.loss(streamed.tail(part, leaf)).backward()
        assert leaf.grad is not None
        gradient[first : first + step] = leaf.grad
        for name, values in own.by_name.items():
            for sample, value in enumerate(values):
                sums.add(name, first + sample, value)
        sums.tied |= {first + sample: rows for sample, rows in own.tied.items()}
    return gradient
