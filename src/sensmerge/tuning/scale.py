"""`lambda: auto`: the λ with the least calibration loss of the merged model, averaged over the tasks.

The merged update is formed once, in memory, by the same code that writes a merge, and then only scaled. Grid 0.1, 0.2 … 1.5, then
the best ± 0.05; ties go to the smaller λ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import progress
from ..calibration.batches import batch_of, by_length, call_arguments
from ..calibration.models import non_finite, out_of_memory_told
from ..calibration.naming import Names, Stored, stored_names
from ..calibration.skeleton import compute_dtype_of, skeleton, tensor_reader
from ..calibration.weights import Weights
from ..checkpoints.source import Checkpoint, TensorSource
from ..execution.run import updates
from ..records import CalibrationSet, MergePlan, Scale

GRID = tuple(round(0.1 * step, 2) for step in range(1, 16))
REFINEMENT = 0.05
OBJECTIVE = "mean over tasks of the mean sample loss, in nats per loss token"
# Tokens of a padded batch, so that the logits of one stay small.
BATCH_TOKENS = 4096


class ScaledModel:
    """The base model with λ times the update added, for any λ, without another merge.

    `updates` are those of the checkpoint's tensors, `names` says which of them make a parameter. Memory: the model, the base's
    weights and the update.
    """

    def __init__(self, model: Any, names: Names, updates: Mapping[str, NDArray[np.float32]]) -> None:
        self._parts = [
            (parameter, parameter.detach().clone(), _assembled(parameter, names[name], updates))
            for name, parameter in model.named_parameters()
        ]

    def set_scale(self, scale: float) -> None:
        """θ = θ_0 + λ·update in every parameter."""
        with torch.no_grad():
            for parameter, base, update in self._parts:
                parameter.copy_(base + (update * scale).to(base.dtype))


def _assembled(parameter: Tensor, stored: tuple[Stored, ...], updates: Mapping[str, NDArray[np.float32]]) -> Tensor:
    """The update of a parameter, float32, from those of the tensors that make it."""
    whole = torch.empty(parameter.shape)
    for each in stored:
        part = whole[each.part]
        part.copy_(torch.from_numpy(updates[each.name]).reshape(part.shape))
    return whole.to(parameter.device)


@torch.no_grad()
def mean_loss(model: Any, samples: CalibrationSet, *, label: str) -> float:
    """The mean over samples of each sample's mean loss (nats per loss token). Raises NonFiniteError."""
    device = str(next(model.parameters()).device)
    losses: list[float] = []
    with out_of_memory_told(label):
        for group in by_length(samples, range(len(samples.rows)), BATCH_TOKENS):
            batch = batch_of(samples, group, device)
            losses.append(float(batch.loss(model(input_ids=batch.ids, **call_arguments(model, batch)).logits)))
    if not all(math.isfinite(loss) for loss in losses):
        raise non_finite(model.named_parameters(), label, "the loss of the merged model")
    return math.fsum(losses) / len(samples.rows)


def choose_scale(
    plan: MergePlan,
    readers: Mapping[str, TensorSource],
    base: Checkpoint,
    tasks: Mapping[str, CalibrationSet],
    *,
    device: str,
    compute_dtype: str | None,
    inputs: str,
) -> Scale:
    """The λ that minimises the calibration loss of the merged model; `tasks` maps each expert's name to its samples.

    `plan` must belong to a method that adds; its own λ is not used. `readers` are the models it reads, by `model:` string. Cost:
    17 forward passes over all samples. Memory: the base, a copy of it and the update; raises ResourceError where a GPU has less.
    """
    dtype = compute_dtype_of(device, compute_dtype)
    model = skeleton(base, device, dtype)
    names = stored_names(model, base)
    weights = Weights(model, names, tensor_reader(base, device, dtype))
    place = "lambda: auto, which holds the base, a copy of it and the update"
    with out_of_memory_told(place), weights.loaded(list(model.modules())):
        stored = {each.name for parts in names.values() for each in parts}
        scaled = ScaledModel(model, names, updates(plan, readers, stored, device=device))
        tried = _tried(model, scaled, tasks)
    return Scale(
        schema=Scale.SCHEMA,
        lambda_=_best(tried),
        objective=OBJECTIVE,
        models=list(tasks),
        tried=[[scale, *tried[scale]] for scale in sorted(tried)],
        inputs=inputs,
    )


def _tried(model: Any, scaled: ScaledModel, tasks: Mapping[str, CalibrationSet]) -> dict[float, list[float]]:
    """By λ: the objective and the loss of every task, on the grid and beside its best."""
    tried: dict[float, list[float]] = {}
    with progress.task("choosing lambda", len(GRID) + 2) as advance:

        def try_scale(scale: float) -> None:
            scaled.set_scale(scale)
            losses = [mean_loss(model, samples, label=f"task {name}") for name, samples in tasks.items()]
            tried[scale] = [math.fsum(losses) / len(losses), *losses]
            advance(1)

        for scale in GRID:
            try_scale(scale)
        centre = _best(tried)
        for scale in (centre - REFINEMENT, centre + REFINEMENT):
            try_scale(round(scale, 2))
    return tried


def _best(tried: Mapping[float, list[float]]) -> float:
    return min(sorted(tried), key=lambda scale: tried[scale][0])
