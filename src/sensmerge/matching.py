"""Which tensors of which models make each tensor of the output: whole models side by side, or slices of their layers stacked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .checkpoints.families import group_tensors, natural_key, stack_of, tied_head
from .checkpoints.formats import FLOATS
from .checkpoints.source import Checkpoint
from .errors import IncompatibleModelsError, RecipeError
from .methods import Method
from .recipe import merged_models
from .records import Recipe, Settings, Slice, TensorInput, TensorSpec

SHOWN_FAULTS = 8


@dataclass(frozen=True)
class Input:
    """One model of a part of the output: the place of its first block there, and its own parameters."""

    model: str
    reader: Checkpoint
    first: int
    parameters: Settings


@dataclass(frozen=True)
class Part:
    """Blocks of the output that are made from equally many blocks of each input: a slice, or the whole stack.

    `experts` are in processing order, `reference` has the output's dtypes and shapes; `parameters` are the slice's own.
    """

    base: Input | None
    experts: tuple[Input, ...]
    reference: Input
    parameters: Settings
    blocks: int

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The base, if there is one, then the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)


@dataclass(frozen=True)
class Match:
    """One output tensor: its name, dtype and shape, where it comes from, and its place `t` in the layers of its part.

    `reference` is the name of its tensor in the part's reference; `base` and `experts` are what is read.
    """

    spec: TensorSpec
    part: Part
    t: float
    reference: str
    base: TensorInput | None
    experts: tuple[TensorInput, ...]


class Layout:
    """The names of a model's tensors by place: those outside the blocks, and for each block what follows its number."""

    def __init__(self, reader: Checkpoint) -> None:
        self.reader = reader
        self.stack = stack_of(reader.tensors)
        self.outside: set[str] = set()
        self._inner: dict[str, set[str]] = defaultdict(set)
        for name in reader.tensors:
            parts = self.stack.split(name)
            if parts is None:
                self.outside.add(name)
            else:
                self._inner[parts[0]].add(parts[1])

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.stack.numbers)

    def inner(self, block: int) -> set[str]:
        """What follows the number in the names of a block's tensors."""
        return self._inner[self.stack.numbers[block]]

    def name(self, block: int, inner: str) -> str:
        """A tensor's whole name."""
        return self.stack.join(self.stack.numbers[block], inner)

    @cached_property
    def shapes(self) -> Mapping[str, set[tuple[int, ...]]]:
        """The shapes that each kind of tensor has in any block."""
        found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        for block in range(self.blocks):
            for inner in self.inner(block):
                found[inner].add(self.reader.tensors[self.name(block, inner)].shape)
        return found


@dataclass(frozen=True)
class _Fault:
    """One way in which a model does not fit, told in words, and how many tensors it is about."""

    model: str
    text: str
    tensors: int = 1


def _refuse(faults: Sequence[_Fault], models: Sequence[Checkpoint]) -> None:
    """Raise IncompatibleModelsError if there are faults: all are counted, and of each model the first are told."""
    if faults:
        told: list[str] = []
        for model in dict.fromkeys(fault.model for fault in faults):
            texts = [fault.text for fault in faults if fault.model == model]
            more = [f"and {len(texts) - SHOWN_FAULTS} more of {model}"] if len(texts) > SHOWN_FAULTS else []
            told += [*texts[:SHOWN_FAULTS], *more]
        raise IncompatibleModelsError(
            f"these models do not fit together: {sum(fault.tensors for fault in faults)} tensor(s) differ",
            where=", ".join(model.label for model in models),
            why="; ".join(told),
            fix="merge models of one architecture, fine-tuned from one base without new tokens, in float32, float16 or bfloat16",
        )


def _difference(name: str, ours: TensorSpec, label: str, other_name: str, theirs: TensorSpec, other: str) -> str | None:
    """How two tensors that should be merged differ in shape or kind; None if they do not."""
    place = label if name == other_name else f"{label} ('{name}')"
    if ours.shape != theirs.shape:
        return f"'{other_name}' is {list(theirs.shape)} in {other}, {list(ours.shape)} in {place}"
    if (ours.dtype in FLOATS) != (theirs.dtype in FLOATS):
        return f"'{other_name}' is {theirs.dtype} in {other}, {ours.dtype} in {place}"
    return None


def _compared(reference: Checkpoint, other: Checkpoint, names: Sequence[str], theirs: Sequence[str]) -> list[_Fault]:
    """Every difference between tensors of two models that stand side by side: names[i] of one, theirs[i] of the other."""
    faults = []
    for name, other_name in zip(names, theirs, strict=True):
        ours, found = reference.tensors.get(name), other.tensors.get(other_name)
        if found is None:
            faults.append(_Fault(other.label, f"'{other_name}' is missing in {other.label}"))
        elif ours is None:
            faults.append(_Fault(other.label, f"'{other_name}' of {other.label} is not in {reference.label}"))
        elif fault := _difference(name, ours, reference.label, other_name, found, other.label):
            faults.append(_Fault(other.label, fault))
    return faults


def _unknown_floats(model: Checkpoint) -> list[_Fault]:
    return [
        _Fault(model.label, f"'{spec.name}' of {model.label} has dtype {spec.dtype}")
        for spec in model.tensors.values()
        if spec.dtype.startswith("F") and spec.dtype not in FLOATS
    ]


def _whole_blocks(reference: Checkpoint, other: Checkpoint) -> tuple[list[_Fault], set[str]]:
    """Blocks that one of two models lacks as a whole, if their blocks bear the same names otherwise; and the tensors in them."""
    ours, theirs = Layout(reference), Layout(other)
    faults: list[_Fault] = []
    inside: set[str] = set()
    if ours.stack.prefix != theirs.stack.prefix:
        return faults, inside
    for here, there, text in ((ours, theirs, "is missing in"), (theirs, ours, "is not in")):
        for block, number in enumerate(here.stack.numbers):
            if number in there.stack.numbers:
                continue
            names = {here.name(block, inner) for inner in here.inner(block)}
            of = "" if here is ours else f" of {other.label}"
            lacking = other.label if here is ours else reference.label
            told = f"block '{here.stack.join(number, '')}'{of} ({len(names)} tensors) {text} {lacking}"
            faults.append(_Fault(other.label, told, len(names)))
            inside |= names
    return faults, inside


def check_same_tensors(reference: Checkpoint, others: Sequence[Checkpoint]) -> None:
    """Every model has the tensors of `reference`, in the same shapes; raises IncompatibleModelsError naming every difference."""
    faults: list[_Fault] = []
    for other in others:
        blocks, inside = _whole_blocks(reference, other)
        names = sorted((reference.tensors.keys() | other.tensors.keys()) - inside, key=natural_key)
        faults += [*blocks, *_compared(reference, other, names, names)]
    _refuse(faults + _unknown_floats(reference), [reference, *others])


def donor_of(recipe: Recipe, readers: Mapping[str, Checkpoint]) -> Checkpoint:
    """The model whose config and tokenizer the output has: the base, else the first model."""
    return readers[recipe.base_model if recipe.base_model is not None else recipe.models[0].model]


def _takes_base(recipe: Recipe, method: Method, base: str | None) -> bool:
    """Whether the base is read beside the models: where task vectors need it, or coefficients move a `linear` merge to it."""
    needed = method.base in ("required", "optional") or (method.takes_sens and recipe.sens is not None)
    return needed and base is not None


def _whole(recipe: Recipe, method: Method, readers: Mapping[str, Checkpoint], with_base: bool) -> Part:
    """The one part of a merge of whole models."""
    donor = donor_of(recipe, readers)

    def whole(model: str, parameters: Settings) -> Input:
        return Input(model, readers[model], 0, parameters)

    base = recipe.base_model
    return Part(
        base=whole(base, {}) if base is not None and (with_base or _takes_base(recipe, method, base)) else None,
        experts=tuple(
            whole(each.model, each.parameters) for each in sorted(recipe.models, key=lambda each: each.model)
        ),
        reference=Input(base or recipe.models[0].model, donor, 0, {}),
        parameters={},
        blocks=Layout(donor).blocks,
    )


def _slice(recipe: Recipe, method: Method, cut: Slice, readers: Mapping[str, Checkpoint], with_base: bool) -> Part:
    """The part that a slice makes."""
    sources = {
        source.model: Input(source.model, readers[source.model], source.layers[0], source.parameters)
        for source in cut.sources
    }
    base = None
    if cut.base_model is not None and (with_base or _takes_base(recipe, method, cut.base_model)):
        # A base that is not among the sources stands at their layers, which are then the same for all.
        beside = Input(cut.base_model, readers[cut.base_model], cut.sources[0].layers[0], {})
        base = sources.get(cut.base_model, beside)
    merged = merged_models(method, [source.model for source in cut.sources], cut.base_model)
    first, last = cut.sources[0].layers
    return Part(
        base=base,
        experts=tuple(sources[model] for model in sorted(merged)),
        reference=base or sources[cut.sources[0].model],
        parameters=cut.parameters,
        blocks=last - first,
    )


def _check_ranges(recipe: Recipe, parts: Sequence[Part], layouts: Mapping[str, Layout]) -> None:
    """Every model has the layers that its slices take; raises RecipeError naming all that do not."""
    faults = []
    lines = []
    for cut, part in zip(recipe.slices, parts, strict=True):
        for each in part.inputs:
            blocks = layouts[each.model].blocks
            if each.first + part.blocks > blocks:
                faults.append(f"{[each.first, each.first + part.blocks]} of '{each.model}', which has {blocks} blocks")
                lines.append(next((s.line for s in cut.sources if s.model == each.model), cut.line))
    if faults:
        raise RecipeError(
            "a slice takes layers that its model does not have",
            where=recipe.where(lines[0]),
            why=f"layer_range {'; '.join(faults)}",
            fix="end the range at the number of blocks or before it",
        )


def _check_slices(donor: Layout, parts: Sequence[Part], layouts: Mapping[str, Layout]) -> None:
    """All inputs of a slice have the same tensors, and the stacked blocks look like blocks of the config's model."""
    faults: list[_Fault] = []
    for layout in layouts.values():
        if layout is not donor:
            names = sorted(donor.outside | layout.outside, key=natural_key)
            faults += _compared(donor.reader, layout.reader, names, names)
        faults += _unknown_floats(layout.reader)
    for part in parts:
        reference, ours = part.reference, layouts[part.reference.model]
        for block in range(part.blocks):
            for other in part.inputs:
                theirs = layouts[other.model]
                inner = sorted(ours.inner(reference.first + block) | theirs.inner(other.first + block), key=natural_key)
                if other.model != reference.model:
                    faults += _compared(
                        ours.reader,
                        theirs.reader,
                        [ours.name(reference.first + block, each) for each in inner],
                        [theirs.name(other.first + block, each) for each in inner],
                    )
            for each in sorted(ours.inner(reference.first + block), key=natural_key):
                name = ours.name(reference.first + block, each)
                if ours.reader.tensors[name].shape not in donor.shapes.get(each, ()):
                    shape = list(ours.reader.tensors[name].shape)
                    told = f"'{name}' of {ours.reader.label}, {shape}, is like no tensor of {donor.reader.label}"
                    faults.append(_Fault(ours.reader.label, f"{told}, whose config.json the output has"))
    _refuse(list(dict.fromkeys(faults)), [layout.reader for layout in layouts.values()])


def match_tensors(
    recipe: Recipe, method: Method, readers: Mapping[str, Checkpoint], *, with_base: bool
) -> tuple[Match, ...]:
    """Every tensor of the output with its inputs, sorted by name; `with_base`: the base is read whatever the method.

    Raises IncompatibleModelsError naming every tensor that has no counterpart, RecipeError for layers that a model lacks.
    """
    if not recipe.slices:
        part = _whole(recipe, method, readers, with_base)
        donor = part.reference.reader
        check_same_tensors(donor, [each.reader for each in part.inputs if each.reader is not donor])
        return tuple(_whole_matches(part))
    parts = [_slice(recipe, method, cut, readers, with_base) for cut in recipe.slices]
    used = {each.model: each.reader for part in parts for each in part.inputs}
    layouts = {model: Layout(reader) for model, reader in used.items()}
    config = donor_of(recipe, readers)
    donor_layout = next((layout for layout in layouts.values() if layout.reader is config), None) or Layout(config)
    _check_ranges(recipe, parts, layouts)
    _check_slices(donor_layout, parts, layouts)
    matches = [*_outside_matches(donor_layout, parts), *_stacked_matches(parts, layouts)]
    return tuple(sorted(matches, key=lambda match: natural_key(match.spec.name)))


def _whole_matches(part: Part) -> Iterator[Match]:
    reader = part.reference.reader
    stack = stack_of(reader.tensors)
    places = {number: place for place, number in enumerate(stack.numbers)}
    for name in sorted(reader.tensors, key=natural_key):
        parts = stack.split(name)
        t = 0.0 if parts is None else _place(places[parts[0]], part.blocks)
        yield _alike(name, part, t)


def _place(block: int, blocks: int) -> float:
    """Where a block stands between the first and the last of its part: t in [0, 1], 1 for a single one (as in mergekit)."""
    return block / (blocks - 1) if blocks > 1 else 1.0


def _alike(name: str, part: Part, t: float) -> Match:
    """An output tensor that has the same name in every input."""
    return Match(
        spec=part.reference.reader.tensors[name],
        part=part,
        t=t,
        reference=name,
        base=None if part.base is None else TensorInput(part.base.model, name),
        experts=tuple(TensorInput(each.model, name) for each in part.experts),
    )


def _outside_matches(donor: Layout, parts: Sequence[Part]) -> Iterator[Match]:
    """Tensors outside the blocks: from the first slice, but the last norm and the head from the last one."""
    grouping = group_tensors(donor.reader.tensors)
    # A stored copy of a tied head must stay equal to the embedding.
    tied = tied_head(donor.reader.config, donor.reader.tensors)
    for name in sorted(donor.outside, key=natural_key):
        closes = grouping.group_of[name] in ("final_norm", "lm_head") and name != tied
        yield _alike(name, parts[-1 if closes else 0], 0.0)


def _stacked_matches(parts: Sequence[Part], layouts: Mapping[str, Layout]) -> Iterator[Match]:
    """The blocks of all slices, numbered from 0 in the order of the slices."""
    number = 0
    for part in parts:
        reference, layout = part.reference, layouts[part.reference.model]
        for block in range(part.blocks):
            for inner in layout.inner(reference.first + block):

                def tensor(each: Input, block: int = block, inner: str = inner) -> TensorInput:
                    return TensorInput(each.model, layouts[each.model].name(each.first + block, inner))

                source = tensor(reference).tensor
                spec = reference.reader.tensors[source]
                yield Match(
                    spec=TensorSpec(layout.stack.join(str(number), inner), spec.dtype, spec.shape),
                    part=part,
                    t=_place(block, part.blocks),
                    reference=source,
                    base=None if part.base is None else tensor(part.base),
                    experts=tuple(tensor(each) for each in part.experts),
                )
            number += 1
