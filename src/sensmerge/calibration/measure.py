"""One model's passes over calibration samples: per-sample sums (eq. 1), and hidden states to form distances from (eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import progress
from ..checkpoints.source import Checkpoint
from ..errors import RecipeError, ResourceError
from ..records import CalibrationSet
from .activation_statistics import ActivationStatistics, Observing, linear_layers, not_observed
from .batches import Batch, batch_of, by_length, call_arguments
from .heads import Head, check_head, logit_changes
from .memory import available_bytes, bytes_per_token, fits_in_memory
from .models import non_finite
from .naming import stored_names
from .per_sample import Recorder, Score, Unbatchable
from .resident import ResidentModel
from .skeleton import compute_dtype_of, elements, skeleton, tensor_reader
from .streamed import Keep, StreamedModel
from .weights import Weights, at_head

MEMORY = ("auto", "resident", "streamed")
# Padded tokens that a streamed model takes through its blocks before anything is saved.
ROUND_TOKENS = 1 << 15
# Most padded tokens in a batch: more is not faster.
BATCH_TOKENS = 4096
# Tokens on which the output head is held against the model.
CHECKED_TOKENS = 8

# Takes a sample's place and what the output head gets for it, [T, H].
KeepHidden = Callable[[int, Tensor], None]
# Takes sums, {place: {tensor: sum}}, and how many modules were measured in batches and how many a sample at a time.
SaveSums = Callable[[Mapping[int, Mapping[str, float]], Mapping[str, int]], None]


class _Runner(Protocol):
    def sums(
        self, recorder: Recorder, batches: Sequence[Batch], keep: Keep | None, advance: Callable[[int], None]
    ) -> list[Mapping[str, Tensor]]: ...

    def hidden(
        self,
        batches: Sequence[Batch],
        keep: Keep,
        advance: Callable[[int], None],
        observing: Observing = not_observed,
    ) -> None: ...


class MeasuredModel:
    """A model of the recipe, ready to be measured: whole in memory, or streamed a block at a time.

    `streamed` says which. Use it in a `with` block, which holds the weights of a resident model. `label` names it in messages;
    `scratch` is the folder of scratch files.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        label: str,
        device: str,
        compute_dtype: str | None = None,
        memory: str = "auto",
        attention: str | None = None,
        scratch: Path | None = None,
    ) -> None:
        if memory not in MEMORY:
            raise RecipeError(
                f"unknown memory mode '{memory}'",
                where="--memory",
                why=f"known: {', '.join(MEMORY)}",
                fix="--memory auto",
            )
        self.checkpoint, self.label, self.device = checkpoint, label, device
        self.dtype = compute_dtype_of(device, compute_dtype)
        self.model = skeleton(checkpoint, device, self.dtype, attention)
        self.names = stored_names(self.model, checkpoint)
        self.weights = Weights(self.model, self.names, tensor_reader(checkpoint, device, self.dtype))
        self.streamed = memory == "streamed" or (
            memory == "auto" and not fits_in_memory(self.model, self.dtype, device)
        )
        self._runner: _Runner = ResidentModel(self.model)
        if self.streamed:
            self._runner = StreamedModel(self.model, self.weights, scratch)
        per_token = bytes_per_token(self.model.config, streamed=self.streamed)
        self._tokens = max(1, min(BATCH_TOKENS, available_bytes(device) // 4 // per_token))

    @contextmanager
    def held(self) -> Iterator[MeasuredModel]:
        """While open, a resident model's weights are in memory."""
        modules = [] if self.streamed else list(self.model.modules())
        with self.weights.loaded(modules):
            yield self

    def sums(
        self,
        samples: CalibrationSet,
        score: Score,
        *,
        places: Sequence[int],
        save: SaveSums,
        keep: KeepHidden | None = None,
    ) -> None:
        """Per-sample sums of the samples at `places`, given to `save` as they are measured.

        Raises NonFiniteError naming the sample,
        or a weight; ResourceError where one sample does not fit the memory. Cost: a forward and a backward
        pass; streamed, a forward pass more.
        """
        recorder = Recorder(self.model, self.names, score)
        left = list(places)
        with progress.task(f"sensitivity of {self.label}", len(left)) as advance:
            while left:
                groups = self._round(samples, left, batched=recorder.batched)
                batches = [batch_of(samples, group, self.device) for group in groups]
                try:
                    found = self._runner.sums(recorder, batches, _by_sample(groups, batches, keep), advance)
                except Unbatchable as found_out:
                    recorder.demote(found_out.module)
                    continue
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    self._halve(error, groups)
                    continue
                done = {
                    place: {name: float(values[row]) for name, values in sums.items()}
                    for group, sums in zip(groups, found, strict=True)
                    for row, place in enumerate(group)
                }
                for place, sums_of in done.items():
                    if not all(math.isfinite(value) for value in sums_of.values()):
                        where = f"{self.label}, sample {samples.rows[place]}"
                        raise non_finite((), where, "a gradient")
                save(done, recorder.paths)
                left = [place for place in left if place not in done]

    def hidden(self, samples: CalibrationSet, *, places: Sequence[int], keep: KeepHidden, task: str) -> None:
        """Give `keep(place, hidden)` what the output head gets for each sample, [T, H]. Cost: a forward pass without its head."""
        left = list(places)
        with progress.task(f"{self.label} on the samples of {task}", len(left)) as advance:
            while left:
                groups = self._round(samples, left, batched=True)
                batches = [batch_of(samples, group, self.device) for group in groups]
                try:
                    self._runner.hidden(batches, _required(_by_sample(groups, batches, keep)), advance)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    self._halve(error, groups)
                    continue
                done = {place for group in groups for place in group}
                left = [place for place in left if place not in done]

    def statistics(self, samples: CalibrationSet, path: Path) -> None:
        """Write the activation statistics of the samples to `path`; see ActivationStatistics.

        Raises IncompatibleModelsError for a layer that does not get every token; ResourceError. Cost: a forward pass without head.
        """
        layers = linear_layers(self.model, lambda module: self.weights.stored_of(module)["weight"][0].name)
        found = ActivationStatistics(layers, path)
        places = range(len(samples.rows))
        with progress.task(f"activations of {self.label}", len(places)) as advance:
            while True:
                groups = list(by_length(samples, places, self._tokens))
                batches = [batch_of(samples, group, self.device) for group in groups]
                try:
                    self._runner.hidden(batches, lambda at, hidden: None, advance, found.observing)
                    break
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    self._halve(error, groups)
                    # A batch that failed was counted in part.
                    found.clear()
        found.finish()

    @torch.no_grad()
    def check_head(self, samples: CalibrationSet) -> None:
        """The output head gives the model's own logits; raises IncompatibleModelsError otherwise."""
        batch = batch_of(samples, [0], self.device)
        batch = Batch(batch.ids[:, :CHECKED_TOKENS], (min(batch.lengths[0], CHECKED_TOKENS),), batch.predicting)
        heard: list[Tensor] = []
        with at_head(self.model, heard.append, stop=False):
            if isinstance(self._runner, StreamedModel):
                logits = self._runner.logits_of_one_block(batch)
            else:
                logits = self.model(input_ids=batch.ids, **call_arguments(self.model, batch)).logits
        check_head(self.head(), heard[0].reshape(-1, heard[0].shape[-1]), logits[0], label=self.label)

    def head(self) -> Head:
        """The model's output head, read from the checkpoint as it is needed."""
        module = self.model.get_output_embeddings()
        stored = self.weights.stored_of(module)
        name, columns = stored["weight"][0].name, module.weight.shape[1]

        def rows(first: int, last: int) -> Tensor:
            flat = elements(self.checkpoint, name, first * columns, (last - first) * columns)
            return flat.reshape(last - first, columns).to(self.dtype).to(self.device)

        bias = None
        if "bias" in stored:
            bias = elements(self.checkpoint, stored["bias"][0].name, 0, module.weight.shape[0]).to(self.device)
        changes = logit_changes(self.checkpoint.config)
        return Head(module.weight.shape[0], rows, bias, scale=changes["scale"] or 1.0, soft_cap=changes["soft_cap"])

    def _round(self, samples: CalibrationSet, left: Sequence[int], *, batched: bool) -> list[list[int]]:
        """The batches that are measured before anything is saved: one, or for a streamed model many."""
        groups, tokens = [], 0
        for group in by_length(samples, left, self._tokens if batched else 1):
            groups.append(group)
            tokens += len(group) * max(len(samples.token_ids[place]) for place in group)
            if not self.streamed or tokens >= ROUND_TOKENS:
                break
        return groups

    def _halve(self, error: BaseException, groups: Sequence[Sequence[int]]) -> None:
        """Smaller batches after one that did not fit; raises ResourceError where it was a single sample already."""
        told = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not told and "alloc" not in str(error).lower():
            raise error
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if max(len(group) for group in groups) == 1:
            fix = "use a smaller max_length in the recipe's `sens:` block"
            raise ResourceError(
                "the memory is too small for this model and sample",
                where=f"{self.label} on {self.device}",
                why=str(error).split(".")[0] or "an allocation failed",
                fix=fix if self.streamed else f"--memory streamed, or {fix}",
            ) from error
        self._tokens = max(1, self._tokens // 2)
        progress.message(
            f"{self.label}: a batch did not fit the memory; batches have at most {self._tokens} tokens now"
        )


def _by_sample(groups: Sequence[Sequence[int]], batches: Sequence[Batch], keep: KeepHidden | None) -> Keep | None:
    """Hands the hidden states of a batch on, sample by sample, without padding."""
    if keep is None:
        return None

    def take(at: int, hidden_STH: Tensor) -> None:
        rows: Any = hidden_STH.reshape(len(groups[at]), -1, hidden_STH.shape[-1])
        for row, place in enumerate(groups[at]):
            keep(place, rows[row, : batches[at].lengths[row]])

    return take


def _required(keep: Keep | None) -> Keep:
    assert keep is not None
    return keep
