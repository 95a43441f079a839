"""A model's modules without its weights, and its weights as they are read from the checkpoint, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.conforming import is_untied
from ..checkpoints.formats import to_float32
from ..checkpoints.source import Checkpoint
from ..errors import InputFileError
from .models import COMPUTE_DTYPES, non_finite

# Elements that are read at once.
PIECE = 1 << 22


def compute_dtype_of(device: str, name: str | None) -> torch.dtype:
    """The dtype to compute in: the one that is named, else float32 on a CPU and bfloat16 on a GPU."""
    return COMPUTE_DTYPES[name or ("float32" if device.startswith("cpu") else "bfloat16")]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside the block modules are made without weights, but with their buffers, which are computed and not stored."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def skeleton(checkpoint: Checkpoint, device: str, dtype: torch.dtype, attention: str | None = None) -> Any:
    """The causal language model of a checkpoint's config in evaluation mode: parameters on the meta device, buffers on `device`.

    `attention` is transformers' `attn_implementation`. Raises InputFileError if transformers does not know the architecture.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    named = {} if attention is None else {"attn_implementation": attention}
    try:
        # The config as the checkpoint shows it, which may differ from the file's (a vocabulary that was aligned).
        shown = dict(checkpoint.config)
        if is_untied(checkpoint):
            # It is measured as it is, whatever the merged model will be: one matrix with both its uses.
            shown["tie_word_embeddings"] = True
        config = CONFIG_MAPPING[shown["model_type"]].from_dict(shown)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **named)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputFileError(
            "transformers cannot make this model",
            where=str(checkpoint.path),
            why=f"{type(error).__name__}: {error}".strip().split("\n")[0],
            fix="check that `AutoModelForCausalLM.from_pretrained(folder)` works with the installed transformers",
        ) from error
    model.config.use_cache = False
    model.tie_weights()
    read = tensor_reader(checkpoint, "cpu", dtype)
    for name, buffer in model.named_buffers():
        # Persistent buffers are part of the checkpoint; the others were computed from the config.
        if name in checkpoint.tensors:
            buffer.copy_(read(name).reshape(buffer.shape))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def tensor_reader(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """A function that reads a tensor of the checkpoint whole: flat, in `dtype`, on `device`.

    It raises NonFiniteError naming the first element that is NaN or infinite.
    """

    def read(name: str) -> Tensor:
        count = checkpoint.tensors[name].elements
        # In pieces: what is stored and what it becomes are never both in memory whole.
        whole = torch.empty(count, dtype=dtype, device=device)
        for start in range(0, count, PIECE):
            end = min(start + PIECE, count)
            piece = elements(checkpoint, name, start, end - start)
            # One sum is cheap; that of finite numbers may overflow, so that only each element decides.
            if not piece.sum(dtype=torch.float32).isfinite() and not piece.isfinite().all():
                stored = elements(checkpoint, name, 0, count).reshape(checkpoint.tensors[name].shape)
                raise non_finite([(name, stored)], checkpoint.label, "what is computed with it")
            whole[start:end] = piece
        return whole

    return read


def elements(checkpoint: Checkpoint, name: str, start: int, count: int) -> Tensor:
    """`count` elements of a tensor from `start` on, flat, in the dtype in which they are stored; integers as they are read."""
    raw = checkpoint.read(name, start, count)
    dtype = checkpoint.tensors[name].dtype
    if dtype == "BF16":
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
    if dtype in ("F16", "F32"):
        return torch.from_numpy(raw)
    integers = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
    if dtype in integers:
        return torch.from_numpy(raw.view(integers[dtype]))
    return torch.from_numpy(to_float32(raw, dtype))
