"""From a recipe, the models' headers and coefficients to a MergePlan: all that a merge will do, checked before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .checkpoints.families import group_tensors, tied_head
from .checkpoints.formats import DTYPES, FLOATS, ITEM_SIZES
from .checkpoints.source import Checkpoint
from .checkpoints.writer import Shard, split_into_shards
from .errors import RecipeError
from .matching import Match, match_tensors
from .methods import METHODS, Method
from .methods.method import Call
from .methods.option import WEIGHT, Option, Value
from .records import Coefficients, Conditional, MergePlan, Recipe, TensorInput, TensorPlan, TensorSpec
from .rules.compute import coefficient
from .settings import LAMBDA, resolve

# The largest file that is written unless told otherwise.
SHARD_BYTES = 5_000_000_000


def _output_spec(match: Match, dtype: str | None) -> TensorSpec:
    stored = match.part.reference.reader.stored_dtype(match.reference)
    return TensorSpec(match.spec.name, stored if dtype is None else DTYPES[dtype], match.spec.shape)


class _Groups:
    """The group of each source tensor, and c_i of the experts in it: exactly 1.0 in a plain merge."""

    def __init__(self, recipe: Recipe, coefficients: Coefficients | None) -> None:
        self._coefficients = coefficients
        self._granularity = recipe.sens.group if coefficients is not None and recipe.sens is not None else "block"
        self._place = {expert.model: place for place, expert in enumerate(recipe.models)}
        self._groups: dict[str, dict[str, str]] = {}

    def of(self, match: Match) -> str:
        """The group of an output tensor: that of the tensor it comes from."""
        reader = match.part.reference.reader
        if reader.label not in self._groups:
            groups = dict(group_tensors(reader.tensors, self._granularity).group_of)
            head = tied_head(reader.config, reader.tensors)
            if head is not None:
                # The stored copy of a tied head must stay equal to the embedding, so it takes the embedding's coefficients.
                groups[head] = "embed"
            self._groups[reader.label] = groups
        return self._groups[reader.label][match.reference]

    def coefficients(self, group: str, experts: Sequence[TensorInput]) -> tuple[float, ...]:
        """c_i of each expert, in the order given."""
        if self._coefficients is None:
            return (1.0,) * len(experts)
        sigma = self._coefficients.sigma_of(group)
        return tuple(coefficient(self._coefficients.total, sigma[self._place[expert.model]]) for expert in experts)


def _copied(match: Match, group: str) -> TensorPlan:
    """A tensor that is not floating point: equal in all models, and copied."""
    inputs = {*match.experts, *(() if match.base is None else (match.base,))}
    experts = tuple(sorted(inputs, key=lambda each: each.model))
    ones = (1.0,) * len(experts)
    return TensorPlan(match.spec, group, None, experts, ones, ones, 1.0, {}, {})


def _tensor_plan(
    recipe: Recipe, method: Method, match: Match, groups: _Groups, scale: float | None, dtype: str | None
) -> TensorPlan:
    """All that is known of one output tensor; raises RecipeError for a required option without a value."""
    group = groups.of(match)
    if match.spec.dtype not in FLOATS:
        return _copied(match, group)
    shared = (match.part.parameters, recipe.parameters)

    def one(option: Option) -> Value:
        return resolve(shared, option, match.spec.name, match.t, where=recipe.where())

    def each(option: Option) -> tuple[Value, ...]:
        # A filter of a model's own parameter is held against the name that the tensor has in that model.
        return tuple(
            resolve((expert.parameters, *shared), option, tensor.tensor, match.t, where=recipe.where())
            for expert, tensor in zip(match.part.experts, match.experts, strict=True)
        )

    per_model = {option.name: each(option) for option in method.options if option.per_model}
    weights = per_model.pop(WEIGHT.name, (1.0,) * len(match.experts))
    own_scale = float(one(LAMBDA)) if method.adds and scale is None else 1.0
    return TensorPlan(
        spec=_output_spec(match, dtype),
        group=group,
        base=match.base,
        experts=match.experts,
        weights=tuple(float(weight) for weight in weights),
        coefficients=groups.coefficients(group, match.experts),
        scale=own_scale if scale is None else scale,
        options={option.name: one(option) for option in method.options if not option.per_model},
        per_model=per_model,
    )


def call_of(tensor: TensorPlan) -> Call:
    """What the method may know of a planned tensor."""
    return Call(
        shape=tensor.spec.shape,
        weights=tensor.weights,
        coefficients=tensor.coefficients,
        options=tensor.options,
        per_model=tensor.per_model,
        has_base=tensor.base is not None,
    )


def _check_options(recipe: Recipe, method: Method, tensors: Sequence[TensorPlan]) -> None:
    """What the options of each tensor must satisfy together; raises RecipeError naming the first tensor of every fault."""
    first: dict[tuple[str, str], str] = {}
    count = 0
    for tensor in tensors:
        fault = None if tensor.spec.dtype not in FLOATS else method.check(call_of(tensor))
        if fault is not None:
            count += 1
            first.setdefault(fault, tensor.spec.name)
    if first:
        (_, fix), name = next(iter(first.items()))
        raise RecipeError(
            f"merge method '{method.name}' cannot merge {count} tensor(s) with these parameters",
            where=f"{recipe.where()}, tensor '{name}'",
            why="; ".join(f"'{tensor}': {why}" for (why, _), tensor in first.items()),
            fix=fix,
        )


def unmatched_filters(recipe: Recipe, plan: MergePlan) -> list[str]:
    """The filters of the recipe that no tensor's name contains, sorted: most likely misspelt."""
    sources = [source for part in recipe.slices for source in part.sources]
    levels = [recipe.parameters, *(part.parameters for part in recipe.models), *(part.parameters for part in sources)]
    levels += [part.parameters for part in recipe.slices]
    settings = [setting for level in levels for setting in level.values() if isinstance(setting, tuple)]
    filters = {each.filter for setting in settings for each in setting if isinstance(each, Conditional)}
    names = {tensor.spec.name for tensor in plan.tensors}
    names |= {each.tensor for tensor in plan.tensors for each in inputs_of(tensor)}
    return sorted(each for each in filters if each not in (None, "*") and not any(each in name for name in names))


def _check_global_scope(recipe: Recipe, tensors: Sequence[TensorPlan]) -> None:
    """`scope: global` sorts all entries of a model together: one density a model, whole models; raises RecipeError."""
    floating = [tensor for tensor in tensors if tensor.spec.dtype in FLOATS]
    across = [tensor for tensor in floating if tensor.options.get("scope") == "global"]
    if not across:
        return
    what, why = "", ""
    other = next((tensor for tensor in floating if tensor.options["scope"] != "global"), None)
    unlike = next((each for each in across if each.per_model["density"] != across[0].per_model["density"]), None)
    if recipe.slices:
        what = "`scope: global` with `slices:` is not supported yet"
        why = "the threshold runs over a whole model, and a slice takes a part of one"
    elif other is not None:
        what = "`scope: global` must hold for all tensors"
        why = f"it is global for '{across[0].spec.name}' and not for '{other.spec.name}'"
    elif unlike is not None:
        what = "`scope: global` needs one density for each model"
        why = (
            f"they are {list(across[0].per_model['density'])} for '{across[0].spec.name}'"
            f" and {list(unlike.per_model['density'])} for '{unlike.spec.name}'"
        )
    if what:
        raise RecipeError(what, where=recipe.where(), why=why, fix="write `scope: tensor`, or one number as `density`")


def make_plan(
    recipe: Recipe,
    readers: Mapping[str, Checkpoint],
    *,
    coefficients: Coefficients | None,
    scale: float | None,
    shard_bytes: int,
) -> MergePlan:
    """The plan of a merge; `readers` are the recipe's models by `model:` string. Reads headers only.

    `scale` is the λ to use for every tensor; None: the recipe's own, tensor by tensor. Raises IncompatibleModelsError if the
    models do not fit together, RecipeError for parameters that cannot hold for some tensor.
    """
    method = METHODS.get(recipe.merge_method, where=recipe.where())
    matches = match_tensors(recipe, method, readers, with_base=coefficients is not None)
    groups = _Groups(recipe, coefficients)
    dtype = recipe.out_dtype or recipe.dtype
    tensors = tuple(_tensor_plan(recipe, method, match, groups, scale, dtype) for match in matches)
    _check_options(recipe, method, tensors)
    _check_global_scope(recipe, tensors)
    shards = split_into_shards([tensor.spec for tensor in tensors], shard_bytes)
    named = recipe.lambda_ if isinstance(recipe.lambda_, float) else 1.0
    bases = {tensor.base.model for tensor in tensors if tensor.base is not None}
    return MergePlan(
        method=recipe.merge_method,
        base=recipe.base_model if recipe.base_model in bases else None,
        models=tuple(sorted({each.model for tensor in tensors for each in inputs_of(tensor)})),
        scale=(named if scale is None else scale) if method.adds else 1.0,
        tensors=tensors,
        shards=tuple((shard.file, tuple(spec.name for spec in shard.tensors)) for shard in shards),
        bytes_read=sum(_bytes(readers[each.model], each) for tensor in tensors for each in inputs_of(tensor)),
        bytes_written=sum(len(shard.header()) + shard.data_bytes for shard in shards),
    )


def inputs_of(tensor: TensorPlan) -> Iterator[TensorInput]:
    """Everything that is read for an output tensor, each once: the base is not read again where it is an expert too."""
    yield from tensor.experts
    if tensor.base is not None and tensor.base not in tensor.experts:
        yield tensor.base


def _bytes(reader: Checkpoint, each: TensorInput) -> int:
    spec = reader.tensors[each.tensor]
    return spec.elements * ITEM_SIZES[spec.dtype]


def shards_of(plan: MergePlan) -> tuple[Shard, ...]:
    """The plan's output files with their tensors' specs, in the order of their data."""
    specs = {tensor.spec.name: tensor.spec for tensor in plan.tensors}
    return tuple(Shard(file, tuple(specs[name] for name in names)) for file, names in plan.shards)
