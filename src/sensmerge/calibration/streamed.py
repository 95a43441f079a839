"""A model of which one block at a time is in memory, for models larger than memory: the same sums as the model held whole.

Weights are read from the checkpoint when a pass reaches them and dropped after it. The model's own `forward` prepares what the
blocks are called with (masks, position embeddings) while its blocks only pass on what they get; then the blocks are called one
after the other for all batches. Only activations at the blocks' boundaries are kept, in memory or in a scratch file; a block is
computed again for its backward pass (Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IncompatibleModelsError
from .activation_statistics import Observing, not_observed
from .activations import Activations
from .batches import Batch, call_arguments
from .per_sample import Recorder, Sums
from .weights import Reached, Weights, at_head

# What a block is called with beside its input.
Call = tuple[tuple[Any, ...], dict[str, Any]]
# Takes the number of a batch and what its output head gets, [S, T, H].
Keep = Callable[[int, Tensor], None]
# Logits of the last layer that are formed at once, in bytes of float32.
LOGITS_BYTES = 32 << 20


class StreamedModel:
    """A causal language model whose weights are read when a pass reaches them; see `Weights`.

    `scratch` is the folder of scratch files (the system's for temporary files unless named).
    """

    def __init__(self, model: Any, weights: Weights, scratch: Path | None = None) -> None:
        self.model, self.weights, self._scratch = model, weights, scratch
        self.blocks = _blocks_of(model)
        inside = {module for block in self.blocks for module in block.modules()}
        outside = [module for module in model.modules() if module not in inside]
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self._front = [module for module in outside if module is not head]
        self._tail = [module for module in outside if module is not embedding]
        self._norms = [module for module in self._tail if module is not head]
        self._vocabulary = model.config.get_text_config().vocab_size
        self._in_tuple = False

    def sums(
        self, recorder: Recorder, batches: Sequence[Batch], keep: Keep | None, advance: Callable[[int], None]
    ) -> list[Mapping[str, Tensor]]:
        """The per-sample sums of every batch: forward block by block, then backward block by block, each computed twice.

        `keep(batch, hidden)` gets what the output head gets. Memory: the largest of a block, the embedding and the head; a batch's
        activations inside one block; the activations at the blocks' boundaries, in a scratch file where they are many.
        """
        sums = [Sums(batch) for batch in batches]
        with Activations(self._scratch) as boundary, Activations(self._scratch) as gradients:
            calls = self._forward(batches, boundary, keep_all=True)
            last = len(self.blocks)
            with self.weights.loaded(self._tail, recorder):
                for at, batch in enumerate(batches):
                    hidden = boundary.take((at, last))
                    gradients.put(at, self._tail_backward(recorder, batch, hidden, sums[at], _kept(keep, at)))
            for block in reversed(range(last)):
                module = self.blocks[block]
                with self.weights.loaded(list(module.modules()), recorder):
                    for at in range(len(batches)):
                        hidden = boundary.take((at, block)).requires_grad_(True)
                        with recorder.recording(module, sums[at]):
                            output = self._block(block, hidden, calls[at][block])
                            recorder.check_all_seen(module)
                            output.backward(gradients.take(at))
                        assert hidden.grad is not None
                        gradients.put(at, hidden.grad)
            with self.weights.loaded(self._front, recorder):
                for at, batch in enumerate(batches):
                    with recorder.recording(self.model, sums[at]):
                        hidden, _ = self._start(batch)
                        hidden.backward(gradients.take(at))
                    advance(len(batch.lengths))
        return [each.by_name for each in sums]

    @torch.no_grad()
    def hidden(
        self,
        batches: Sequence[Batch],
        keep: Keep,
        advance: Callable[[int], None],
        observing: Observing = not_observed,
    ) -> None:
        """Give `keep(batch, hidden)` what the output head gets for every batch, [S, T, H]; the head itself is not read."""
        with Activations(self._scratch) as boundary:
            self._forward(batches, boundary, keep_all=False, observing=observing)
            with self.weights.loaded(self._norms):
                for at, batch in enumerate(batches):
                    hidden = boundary.take((at, len(self.blocks)))
                    at_the_head = at_head(self.model, _kept(keep, at), stop=True)
                    with observing(self.model, batch), at_the_head, suppress(Reached):
                        self._logits(batch, hidden)
                    advance(len(batch.lengths))

    @torch.no_grad()
    def _forward(
        self,
        batches: Sequence[Batch],
        boundary: Activations,
        *,
        keep_all: bool,
        observing: Observing = not_observed,
    ) -> list[list[Call]]:
        """All blocks for all batches; `boundary` gets what each block gets (or only what the last one gives)."""
        calls: list[list[Call]] = []
        with self.weights.loaded(self._front):
            for at, batch in enumerate(batches):
                if keep_all and at == 0:
                    self._check_blocks_stand_alone(batch.slice(0, 1))
                with observing(self.model, batch):
                    hidden, call = self._start(batch)
                calls.append(call)
                boundary.put((at, 0), hidden)
        for block, module in enumerate(self.blocks):
            with self.weights.loaded(list(module.modules())):
                for at in range(len(batches)):
                    hidden = boundary.get((at, block)) if keep_all else boundary.take((at, block))
                    with observing(module, batches[at]):
                        boundary.put((at, block + 1), self._block(block, hidden, calls[at][block]))
        return calls

    def _tail_backward(
        self, recorder: Recorder, batch: Batch, hidden: Tensor, sums: Sums, keep: Callable[[Tensor], None] | None
    ) -> Tensor:
        """Norm, head and loss for a few samples at a time; returns the gradient of the last block's output."""
        step = max(1, LOGITS_BYTES // (4 * self._vocabulary * batch.ids.shape[1]))
        if not recorder.batched:
            step = 1
        gradient, heard = torch.empty_like(hidden), list[Tensor]()
        for first in range(0, len(batch.lengths), step):
            part = batch.slice(first, first + step)
            own = Sums(part)
            leaf = hidden[first : first + step].detach().clone().requires_grad_(True)
            with recorder.recording(self.model, own), at_head(self.model, heard.append, stop=False):
                part.loss(self._logits(part, leaf)).backward()
            assert leaf.grad is not None
            gradient[first : first + step] = leaf.grad
            for name, values in own.by_name.items():
                for sample, value in enumerate(values):
                    sums.add(name, first + sample, value)
            sums.tied |= {first + sample: rows for sample, rows in own.tied.items()}
        if keep is not None:
            keep(torch.cat(heard))
        return gradient

    def logits_of_one_block(self, batch: Batch) -> Tensor:
        """The logits [S, T, V] of the model without all of its blocks but the first: enough to see what its head does."""
        with self.weights.loaded(self._front):
            hidden, calls = self._start(batch)
        with self.weights.loaded(list(self.blocks[0].modules())):
            hidden = self._block(0, hidden, calls[0])
        with self.weights.loaded(self._tail):
            return self._logits(batch, hidden)

    @torch.enable_grad()
    def _check_blocks_stand_alone(self, batch: Batch) -> None:
        """A gradient that a block's input does not get back would be lost: found out before anything is computed."""
        embedding = self.model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
        try:
            self._start(batch)
        finally:
            handle.remove()

    def _start(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """What the first block gets, [S, T, H], and what each block is called with beside it. Needs the embedding loaded.

        Raises IncompatibleModelsError where a block gets more from the weights than its input.
        """
        calls: list[Call] = []
        found: list[Tensor] = []

        def stub(hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
            if not found:
                found.append(hidden)
            calls.append((arguments, named))
            if len(calls) == len(self.blocks):
                raise Reached
            return hidden

        with self._blocks_replaced(stub), suppress(Reached):
            self.model(input_ids=batch.ids, **call_arguments(self.model, batch))
        if len(calls) != len(self.blocks):
            raise self._refused(f"{len(calls)} of its {len(self.blocks)} blocks are called in one pass")
        for arguments, named in calls:
            for value in (*arguments, *named.values()):
                parts = value if isinstance(value, tuple | list) else [value]
                if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
                    raise self._refused("its blocks get more from the embedding than their input")
        return found[0], calls

    def _block(self, at: int, hidden: Tensor, call: Call) -> Tensor:
        """The output of a block, which has to be loaded."""
        output = self.blocks[at](hidden, *call[0], **call[1])
        self._in_tuple = isinstance(output, tuple)
        first = output[0] if self._in_tuple else output
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            raise self._refused("its blocks do not give back what they get")
        return first

    def _logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The logits [S, T, V] for the last block's output. Needs everything outside the blocks loaded but the embedding."""
        count = 0

        def stub(passed: Tensor, *arguments: Any, **named: Any) -> Tensor:
            nonlocal count
            count += 1
            result = hidden if count == len(self.blocks) else passed
            return (result,) if self._in_tuple else result  # type: ignore[return-value]

        columns = self.model.get_input_embeddings().weight.shape[1]
        blank = torch.zeros(*hidden.shape[:2], columns, dtype=hidden.dtype, device=hidden.device)
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
    return list(max(lists, key=lambda each: len(list(each)))) if lists else []


def _kept(keep: Keep | None, at: int) -> Callable[[Tensor], None] | None:
    return None if keep is None else lambda hidden: keep(at, hidden)
