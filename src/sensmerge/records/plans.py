"""What a merge will do, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .tensors import TensorSpec


@dataclass(frozen=True)
class TensorInput:
    """One input of an output tensor: the model that is read (its `model:` string) and the tensor's name in it."""

    model: str
    tensor: str


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made.

    `spec` is the output's name, dtype and shape, `group` the group of its coefficients, `base` the input that task vectors are
    taken from, if any. `experts`, `weights` (w_i), `coefficients` (c_i, exactly 1 in a plain merge) and every entry of
    `per_model` are in processing order: sorted by model string. `scale` is λ, `options` the method's own parameters.
    """

    spec: TensorSpec
    group: str
    base: TensorInput | None
    experts: tuple[TensorInput, ...]
    weights: tuple[float, ...]
    coefficients: tuple[float, ...]
    scale: float
    options: Mapping[str, bool | float | str]
    per_model: Mapping[str, tuple[bool | float | str, ...]]


@dataclass(frozen=True)
class MergePlan:
    """All that a merge will do, known from headers and fingerprints alone.

    `models` are all models that are read, by their `model:` strings, sorted, the base among them where one is read; that order,
    not the recipe's, is the one in which experts are processed, so that the order in the recipe never changes a bit. `scale` is
    the recipe's λ (without filters). `shards` lists output file names with the tensors they hold.
    """

    method: str
    base: str | None
    models: tuple[str, ...]
    scale: float
    tensors: tuple[TensorPlan, ...]
    shards: tuple[tuple[str, tuple[str, ...]], ...]
    bytes_read: int
    bytes_written: int
