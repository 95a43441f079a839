"""Devices, tokenizers, whole models as transformers loads them, and what to say where memory or numbers run over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputFileError, NonFiniteError, RecipeError, ResourceError

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> str:
    """`auto` is a CUDA GPU if there is one, else the CPU. Raises RecipeError for others, ResourceError for an absent GPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise RecipeError(
            f"unknown device '{name}'", where="--device", why="known: auto, cpu, cuda", fix="--device auto"
        )
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(
            "there is no CUDA GPU", where="--device", why="torch.cuda.is_available() is false", fix="--device cpu"
        )
    return name


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside the block transformers shows no progress bars of its own; a front end listens to `progress` instead."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(folder: Path, device: str, compute_dtype: str | None) -> Any:
    """The causal language model in `folder`, in evaluation mode; float32 on a CPU and bfloat16 on a GPU unless named.

    Raises InputFileError if transformers cannot load it, or if it would have to invent or ignore a weight.
    """
    from transformers import AutoModelForCausalLM

    dtype = compute_dtype or ("float32" if device == "cpu" else "bfloat16")
    try:
        with without_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=COMPUTE_DTYPES[dtype],
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputFileError(
            "transformers cannot load this model",
            where=str(folder),
            why=str(error).strip().split("\n")[0],
            fix="check that `AutoModelForCausalLM.from_pretrained(folder)` works with the installed transformers",
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise InputFileError(
                f"this checkpoint does not hold what its architecture needs ({kind.replace('_', ' ')})",
                where=str(folder),
                why=", ".join(str(key) for key in sorted(info[kind], key=str)[:5]),
                fix="download or save the model again; config.json and the weights must belong together",
            )
    model.config.use_cache = False
    with out_of_memory_told(str(folder)):
        return model.eval().to(device)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; raises InputFileError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputFileError(
            "this model has no tokenizer that transformers can load",
            where=str(folder),
            why=str(error).strip().split("\n")[0],
            fix="copy the tokenizer files into the model's folder",
        ) from error


def non_finite(weights: Iterable[tuple[str, Tensor]], place: str, what: str) -> NonFiniteError:
    """The error for a loss or gradient that is not finite: names the first of `weights` that is to blame, or else the sample."""
    for name, weight in weights:
        bad = ~torch.isfinite(weight.detach())
        if bad.any():
            return NonFiniteError(
                "a weight of this model is NaN or infinite",
                where=f"{place}: tensor '{name}', {int(bad.sum())} of {bad.numel()} elements,"
                f" the first at {bad.nonzero()[0].tolist()}",
                why=f"{what} is not finite because of it",
                fix="use an undamaged copy of the model",
            )
    return NonFiniteError(
        f"{what} is NaN or infinite",
        where=place,
        why="all weights are finite; the sample overflows in this compute dtype",
        fix="set `compute_dtype: float32` in the recipe's `sens:` block, or remove the sample",
    )


@contextmanager
def out_of_memory_told(place: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into ours, with what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "the GPU's memory is too small for this model and sample",
            where=place,
            why=str(error).split(".")[0],
            fix="--device cpu, or a smaller max_length in the recipe's `sens:` block",
        ) from error
