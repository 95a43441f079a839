"""An expert in torch: the model that transformers loads, with what an adapter changes in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..checkpoints.formats import to_float32
from ..checkpoints.lora.adapted import adapted_model
from ..checkpoints.source import Checkpoint, TensorSource
from ..errors import IncompatibleModelsError
from .models import load_model


def load_expert(expert: Checkpoint, device: str, compute_dtype: str | None) -> Any:
    """The causal language model `expert`, as `load_model` gives it; for an adapter its base, with every adapted tensor copied in.

    Each adapted tensor is rounded once, to the compute dtype. Raises what `load_model` raises, and IncompatibleModelsError if
    transformers renames or fuses what the adapter changes. Memory: one adapted tensor beside the model.
    """
    model = load_model(expert.path, device, compute_dtype)
    adapted = adapted_model(expert)
    if adapted is not None:
        _copy(adapted, sorted(adapted.changes), model)
    return model


def _copy(source: TensorSource, tensors: Sequence[str], model: Any) -> None:
    """Put tensors of a checkpoint into the parameters that bear their names."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # A tied head is the embedding under another name: both names lead to one parameter.
    parameters = {
        form: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        for form in (prefix + name, name.removeprefix(prefix), name)
    }
    missing = [name for name in tensors if name not in parameters]
    if missing:
        raise IncompatibleModelsError(
            f"{len(missing)} adapted tensor(s) have no parameter of their name in this architecture",
            where=source.label,
            why=f"transformers renames or fuses tensors of this family while loading: {', '.join(missing)}",
            fix="merge this family without a `sens:` block",
        )
    with torch.no_grad():
        for name in tensors:
            spec = source.tensors[name]
            values = to_float32(source.read(name, 0, spec.elements), spec.dtype)
            parameters[name].copy_(torch.from_numpy(values).reshape(spec.shape))
