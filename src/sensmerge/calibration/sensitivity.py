"""Sensitivity of one expert, eq. 1: S_jk = |θ_j · ∂L(x_k)/∂θ_j|, taken per sample and then summed, never |θ · Σ_k g_k|.

One backward pass a sample. Each parameter's gradient is reduced to one number the moment autograd has finished it, and freed: the
gradients of the whole model never exist at once. Eq. 2 calls this an estimate of the loss change on zeroing θ_j; summed over a
layer it is a saliency, not that estimate (the signed sum does not rank layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import progress
from ..errors import IncompatibleModelsError
from ..records import CalibrationSet
from .models import non_finite, out_of_memory_told

# Reducing in pieces keeps the float32 temporaries small beside the gradient itself (about 16 MB).
PIECE = 1 << 22

Reduce = Callable[[str, Tensor, Tensor], float]


def sample_loss(logits_TV: Tensor, ids_T: Tensor, mask_T: Tensor) -> Tensor:
    """Mean next-token cross entropy (nats) over the loss tokens of one sample; token t is predicted from position t-1."""
    targets = torch.where(mask_T[1:], ids_T[1:], -100)
    return cross_entropy(logits_TV[:-1].float(), targets, ignore_index=-100)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.reshape(-1).split(PIECE) for tensor in tensors), strict=True)


def weight_score(name: str, weight: Tensor, gradient: Tensor) -> float:
    """Σ_j |θ_j g_j| of one parameter, accumulated in float64: the paper's eq. 1."""
    return sum(float((w.float() * g.float()).abs().sum(dtype=torch.float64)) for w, g in _pieces(weight, gradient))


def fisher_score(name: str, weight: Tensor, gradient: Tensor) -> float:
    """Σ_j g_j² of one parameter, in float64: the diagonal empirical Fisher information of one sample."""
    return sum(float(g.double().square().sum()) for (g,) in _pieces(gradient))


def task_vector_score(task_vector: Callable[[str], Tensor]) -> Reduce:
    """Σ_j |δ_j g_j| with δ = θ - θ_0, in float64; `task_vector(name)` gives δ of one parameter, float32, on the CPU."""

    def score(name: str, weight: Tensor, gradient: Tensor) -> float:
        return weight_score(name, task_vector(name).to(weight.device), gradient)

    return score


@contextmanager
def _reducing_gradients(model: Any, names: Mapping[str, str], reduce: Reduce, sums: dict[str, float]) -> Iterator[None]:
    """While open, every finished gradient becomes `sums[name]` and is freed. A tied parameter is finished once, with both uses."""

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            sums[name] = reduce(name, parameter.detach(), parameter.grad)
            parameter.grad = None

        return hook

    hooks = [
        parameter.register_post_accumulate_grad_hook(hook_for(names[name]))
        for name, parameter in model.named_parameters()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def checkpoint_names(model: Any, stored: Sequence[str]) -> dict[str, str]:
    """Each parameter's name in the checkpoint: one of its own (a tied one has two), with or without the base model's prefix.

    Raises IncompatibleModelsError for a parameter that the checkpoint stores under another name still.
    """
    known, prefix = set(stored), f"{getattr(model, 'base_model_prefix', '')}."
    aliases: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    names: dict[str, str] = {}
    for own in aliases.values():
        forms = [form for name in own for form in (name, name.removeprefix(prefix), prefix + name)]
        match = next((form for form in forms if form in known), None)
        if match is None:
            raise IncompatibleModelsError(
                "this architecture's parameters do not bear the names of its checkpoint",
                where=f"parameter '{own[0]}' of {type(model).__name__}",
                why="transformers renames or fuses tensors of this family while loading, so sums cannot be assigned to tensors",
                fix="merge this family without a `sens:` block",
            )
        names[own[0]] = match
    return names


def sensitivities(
    model: Any, samples: CalibrationSet, names: Mapping[str, str], reduce: Reduce, *, label: str
) -> list[dict[str, float]]:
    """For each sample, one sum per parameter (by checkpoint name; 0.0 for a parameter that got no gradient).

    Exact: one forward and one backward pass a sample. Memory: the weights, one sample's activations, one gradient. Raises
    NonFiniteError naming the weight or the sample.
    """
    device = next(model.parameters()).device
    results: list[dict[str, float]] = []
    with progress.task(f"sensitivity of {label}", len(samples.rows)) as advance:
        for row, ids, mask in zip(samples.rows, samples.token_ids, samples.loss_mask, strict=True):
            place = f"{label}, sample {row}"
            sums = dict.fromkeys(names.values(), 0.0)
            ids_T, mask_T = torch.tensor(ids, device=device), torch.tensor(mask, device=device, dtype=torch.bool)
            with out_of_memory_told(place), _reducing_gradients(model, names, reduce, sums):
                loss = sample_loss(model(input_ids=ids_T[None]).logits[0], ids_T, mask_T)
                if not torch.isfinite(loss):
                    raise non_finite(model, place, "the loss")
                loss.backward()
            if not all(math.isfinite(value) for value in sums.values()):
                raise non_finite(model, place, "a gradient")
            results.append(sums)
            advance(1)
    return results
