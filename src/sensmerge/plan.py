"""From a recipe, the models' headers and coefficients to a MergePlan: all that a merge will do, checked before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .checkpoints.families import group_tensors, natural_key, tied_head
from .checkpoints.formats import DTYPES, FLOATS, ITEM_SIZES
from .checkpoints.source import ModelFolder
from .checkpoints.writer import Shard, split_into_shards
from .errors import IncompatibleModelsError
from .records import Coefficients, MergePlan, Recipe, TensorPlan, TensorSpec
from .rules.compute import coefficient

SHOWN_FAULTS = 8


def check_same_tensors(reference: ModelFolder, others: Sequence[ModelFolder]) -> None:
    """Every model has the tensors of `reference`, in the same shapes; raises IncompatibleModelsError naming every difference."""
    faults: list[str] = []
    for other in others:
        for name in sorted(reference.tensors.keys() | other.tensors.keys(), key=natural_key):
            ours, theirs = reference.tensors.get(name), other.tensors.get(name)
            if theirs is None:
                faults.append(f"'{name}' is missing in {other.label}")
            elif ours is None:
                faults.append(f"'{name}' of {other.label} is not in {reference.label}")
            elif ours.shape != theirs.shape:
                faults.append(
                    f"'{name}' is {list(theirs.shape)} in {other.label}, {list(ours.shape)} in {reference.label}"
                )
            elif (ours.dtype in FLOATS) != (theirs.dtype in FLOATS):
                faults.append(f"'{name}' is {theirs.dtype} in {other.label}, {ours.dtype} in {reference.label}")
    faults += [
        f"'{spec.name}' of {reference.label} has dtype {spec.dtype}"
        for spec in reference.tensors.values()
        if spec.dtype.startswith("F") and spec.dtype not in FLOATS
    ]
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise IncompatibleModelsError(
            f"these models do not fit together: {len(faults)} tensor(s) differ",
            where=", ".join(model.label for model in (reference, *others)),
            why="; ".join(faults[:SHOWN_FAULTS]) + more,
            fix="merge models of one architecture, fine-tuned from one base without new tokens, in float32, float16 or bfloat16",
        )


def _output_spec(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    return spec if dtype is None or spec.dtype not in FLOATS else TensorSpec(spec.name, DTYPES[dtype], spec.shape)


def coefficients_by_group(
    coefficients: Coefficients | None, groups: Sequence[str], order: Sequence[int]
) -> dict[str, tuple[float, ...]]:
    """c_i for each group, experts in processing order; exactly 1.0 in a plain merge."""
    if coefficients is None:
        return {group: (1.0,) * len(order) for group in groups}
    by_group = {}
    for group in groups:
        sigma = coefficients.sigma_of(group)
        by_group[group] = tuple(coefficient(coefficients.total, sigma[expert]) for expert in order)
    return by_group


def make_plan(
    recipe: Recipe,
    base: ModelFolder | None,
    experts: Sequence[ModelFolder],
    *,
    coefficients: Coefficients | None,
    scale: float,
    shard_bytes: int,
) -> MergePlan:
    """The plan of a merge; `experts` in recipe order, `scale` the λ to use. Reads headers only.

    Raises IncompatibleModelsError if the models do not fit together.
    """
    donor = base or experts[0]
    check_same_tensors(donor, [expert for expert in experts if expert is not donor])
    order = sorted(range(len(experts)), key=lambda index: recipe.models[index].model)
    group = recipe.sens.group if coefficients is not None and recipe.sens is not None else "block"
    names = sorted(donor.tensors, key=natural_key)
    group_of = dict(group_tensors(names, group).group_of)
    head = tied_head(donor.config, names)
    if head is not None:
        # The stored copy of a tied head must stay equal to the embedding, so it takes the embedding's coefficients.
        group_of[head] = "embed"
    by_group = coefficients_by_group(coefficients, sorted(set(group_of.values())), order)
    out_dtype = recipe.out_dtype or recipe.dtype
    tensors = tuple(
        TensorPlan(_output_spec(donor.tensors[name], out_dtype), group_of[name], by_group[group_of[name]])
        for name in names
    )
    shards = split_into_shards([tensor.spec for tensor in tensors], shard_bytes)
    readers: list[ModelFolder] = [*experts] if base is None else [base, *experts]
    return MergePlan(
        method=recipe.merge_method,
        base=recipe.base_model,
        models=tuple(recipe.models[index].model for index in order),
        order=tuple(order),
        weights=tuple(recipe.models[index].weight for index in order),
        scale=scale,
        options=recipe.options,
        tensors=tensors,
        shards=tuple((shard.file, tuple(spec.name for spec in shard.tensors)) for shard in shards),
        bytes_read=sum(_data_bytes(reader.tensors) for reader in readers),
        bytes_written=sum(len(shard.header()) + shard.data_bytes for shard in shards),
    )


def _data_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    return sum(spec.elements * ITEM_SIZES[spec.dtype] for spec in tensors.values())


def shards_of(plan: MergePlan) -> tuple[Shard, ...]:
    """The plan's output files with their tensors' specs, in the order of their data."""
    specs = {tensor.spec.name: tensor.spec for tensor in plan.tensors}
    return tuple(Shard(file, tuple(specs[name] for name in names)) for file, names in plan.shards)
