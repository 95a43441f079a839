"""One stretch of one tensor: read, to float32, checked, merged (eq. 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.formats import FLOATS, Raw, from_float32, is_finite, to_float32
from ..checkpoints.source import TensorSource
from ..errors import IncompatibleModelsError, NonFiniteError
from ..methods import Method
from ..records import MergePlan, TensorPlan

# Elements read, merged and written at a time: small enough to stay in the cache's reach, large enough to hide a call's cost.
TILE = 1 << 18

Tile = NDArray[np.float32]


def _position(shape: Sequence[int], flat: int) -> list[int]:
    return [int(index) for index in np.unravel_index(flat, tuple(shape))] if shape else []


def _read(source: TensorSource, tensor: TensorPlan, start: int, count: int) -> Tile:
    name = tensor.spec.name
    raw = source.read(name, start, count)
    dtype = source.tensors[name].dtype
    finite = is_finite(raw, dtype)
    if not finite.all():
        first = start + int(np.argmin(finite))
        raise NonFiniteError(
            "a weight is NaN or infinite",
            where=f"model {source.label}, tensor '{name}', element {_position(tensor.spec.shape, first)}"
            f" ({int((~finite).sum())} such elements in this part of the tensor)",
            why="it would spread into the merged model",
            fix="use an undamaged copy of the model",
        )
    return to_float32(raw, dtype)


def read_tiles(
    tensor: TensorPlan, base: TensorSource | None, experts: Sequence[TensorSource], start: int, count: int
) -> tuple[Tile | None, list[Tile]]:
    """The base's and the experts' elements, float32 [count]; raises NonFiniteError for NaN or infinity."""
    read = None if base is None else _read(base, tensor, start, count)
    return read, [_read(expert, tensor, start, count) for expert in experts]


def combined(plan: MergePlan, method: Method, tensor: TensorPlan, base: Tile | None, experts: Sequence[Tile]) -> Tile:
    """The method's result for one tile: the update (to be scaled and added) where the method adds, else the merged tile."""
    with np.errstate(over="ignore", invalid="ignore"):
        return method.combine(base, experts, plan.weights, tensor.coefficients, plan.options)


def merged(plan: MergePlan, method: Method, tensor: TensorPlan, base: Tile | None, experts: Sequence[Tile]) -> Tile:
    """The merged tile, float32: θ_0 + λ·update with λ last, or the method's own result."""
    result = combined(plan, method, tensor, base, experts)
    if method.adds:
        assert base is not None
        with np.errstate(over="ignore", invalid="ignore"):
            result *= np.float32(plan.scale)
            result += base
    return result


def rounded(values: Tile, tensor: TensorPlan, start: int) -> Raw:
    """`values` in the output dtype, rounded once; raises NonFiniteError where the result is NaN or overflows."""
    raw = from_float32(values, tensor.spec.dtype)
    finite = is_finite(raw, tensor.spec.dtype)
    if not finite.all():
        first = int(np.argmin(finite))
        raise NonFiniteError(
            "the merge made a number that its dtype cannot hold",
            where=f"tensor '{tensor.spec.name}', element {_position(tensor.spec.shape, start + first)}",
            why=f"{values[first]:.6g} does not fit into {tensor.spec.dtype}",
            fix="write `out_dtype: bfloat16` or `out_dtype: float32` into the recipe, or use smaller weights",
        )
    return raw


def same_bytes(tensor: TensorPlan, sources: Sequence[TensorSource], start: int, count: int) -> Raw:
    """The elements of a tensor that is not floating point: they must be equal in all models, and are copied."""
    first = sources[0].read(tensor.spec.name, start, count)
    for other in sources[1:]:
        if other.read(tensor.spec.name, start, count).tobytes() != first.tobytes():
            raise IncompatibleModelsError(
                f"the {tensor.spec.dtype} tensor '{tensor.spec.name}' differs between the models",
                where=f"{sources[0].label} and {other.label}",
                why="integers and truth values cannot be merged, only copied where they are equal",
                fix="use models whose buffers are equal",
            )
    return first


def tiles_of(tensor: TensorPlan) -> list[tuple[int, int]]:
    """(start, count) of each tile of a tensor."""
    total = tensor.spec.elements
    return [(start, min(TILE, total - start)) for start in range(0, total, TILE)]


def tensor_tiles(
    plan: MergePlan, method: Method, tensor: TensorPlan, base: TensorSource | None, experts: Sequence[TensorSource]
) -> Callable[[int, int], Raw]:
    """A function of (start, count) that gives the finished elements of one output tensor."""
    if tensor.spec.dtype not in FLOATS:
        sources = [*experts] if base is None else [base, *experts]
        return lambda start, count: same_bytes(tensor, sources, start, count)

    def tile(start: int, count: int) -> Raw:
        base_tile, expert_tiles = read_tiles(tensor, base, experts, start, count)
        return rounded(merged(plan, method, tensor, base_tile, expert_tiles), tensor, start)

    return tile
