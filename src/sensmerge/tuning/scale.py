"""`lambda: auto`: the λ with the least calibration loss of the merged model, averaged over the tasks.

The merged update is formed once, in memory, by the same code that writes a merge, and then only scaled. Grid 0.1, 0.2 … 1.5, then
the best ± 0.05; ties go to the smaller λ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import progress
from ..calibration.experts import load_expert
from ..calibration.models import non_finite, out_of_memory_told
from ..calibration.sensitivity import checkpoint_names, sample_loss
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

    Memory: the model, the base's weights and the update.
    """

    def __init__(self, model: Any, updates: Mapping[str, Tensor]) -> None:
        self.model = model
        stored = checkpoint_names(model, list(updates))
        self._parts = [
            (parameter, parameter.detach().clone(), updates[stored[name]].reshape(parameter.shape).to(parameter.device))
            for name, parameter in model.named_parameters()
        ]

    def set_scale(self, scale: float) -> None:
        """θ = θ_0 + λ·update in every parameter."""
        with torch.no_grad():
            for parameter, base, update in self._parts:
                parameter.copy_(base + (update * scale).to(base.dtype))


def _batches(samples: CalibrationSet) -> list[list[int]]:
    """Samples sorted by length, in batches of at most BATCH_TOKENS padded tokens."""
    batches: list[list[int]] = []
    for sample in sorted(range(len(samples.rows)), key=lambda at: len(samples.token_ids[at])):
        if not batches or (len(batches[-1]) + 1) * len(samples.token_ids[sample]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(sample)
    return batches


@torch.no_grad()
def mean_loss(model: Any, samples: CalibrationSet, *, label: str) -> float:
    """The mean over samples of each sample's mean loss (nats per loss token). Raises NonFiniteError."""
    device = next(model.parameters()).device
    losses: list[float] = []
    for batch in _batches(samples):
        longest = max(len(samples.token_ids[at]) for at in batch)
        ids_ST = torch.zeros(len(batch), longest, dtype=torch.long, device=device)
        real_ST = torch.zeros(len(batch), longest, dtype=torch.long, device=device)
        for row, at in enumerate(batch):
            length = len(samples.token_ids[at])
            ids_ST[row, :length] = torch.tensor(samples.token_ids[at], device=device)
            real_ST[row, :length] = 1
        with out_of_memory_told(label):
            logits_STV = model(input_ids=ids_ST, attention_mask=real_ST).logits
        for row, at in enumerate(batch):
            mask_T = torch.tensor(samples.loss_mask[at], dtype=torch.bool, device=device)
            length = len(mask_T)
            losses.append(float(sample_loss(logits_STV[row, :length], ids_ST[row, :length], mask_T)))
    if not all(math.isfinite(loss) for loss in losses):
        raise non_finite(model, label, "the loss of the merged model")
    return math.fsum(losses) / len(losses)


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
    17 forward passes over all samples.
    """
    model = load_expert(base, device, compute_dtype)
    names = set(checkpoint_names(model, [tensor.spec.name for tensor in plan.tensors]).values())
    with out_of_memory_told("lambda: auto, which holds the base, a copy of it and the update"):
        formed = updates(plan, readers, names, device=device)
        scaled = ScaledModel(model, {name: torch.from_numpy(values) for name, values in formed.items()})
    tried: dict[float, list[float]] = {}

    def best() -> float:
        return min(sorted(tried), key=lambda scale: tried[scale][0])

    with progress.task("choosing lambda", len(GRID) + 2) as advance:

        def try_scale(scale: float) -> None:
            scaled.set_scale(scale)
            losses = [mean_loss(model, samples, label=f"task {name}") for name, samples in tasks.items()]
            tried[scale] = [math.fsum(losses) / len(losses), *losses]
            advance(1)

        for scale in GRID:
            try_scale(scale)
        centre = best()
        for scale in (centre - REFINEMENT, centre + REFINEMENT):
            try_scale(round(scale, 2))
    return Scale(
        schema=Scale.SCHEMA,
        lambda_=best(),
        objective=OBJECTIVE,
        models=list(tasks),
        tried=[[scale, *tried[scale]] for scale in sorted(tried)],
        inputs=inputs,
    )
