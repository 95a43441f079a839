"""From a YAML file to a Recipe: a mergekit file plus `sens:`, every key checked, every fault with its line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import progress
from .checkpoints.formats import DTYPES
from .errors import RecipeError
from .methods import METHODS, Method
from .methods.option import WEIGHT
from .records import Expert, Recipe, SensSource, Settings, Slice, SliceSource
from .registry import unknown_name
from .sens_block import check_sens, read_sens, read_source
from .settings import LAMBDA, read_parameters, without, without_filters
from .tokenizer_block import read_chat_template, read_tokenizer
from .yamlfile import Section, read_yaml, shown

TOP_LEVEL = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "sens", "allow",
)  # fmt: skip
# mergekit's keys that would change a merge and are not built yet: refused by name.
UNSUPPORTED = ("modules", "merge_parameters")


def merged_models(method: Method, listed: Sequence[str], base: str | None) -> list[str]:
    """Which of the models that are listed together are merged; the others are the base that the method takes them from."""
    return [model for model in listed if method.base in ("member", "joins") or model != base]


@dataclass(frozen=True)
class _Entry:
    """One `model:` of the recipe: in `models:`, or as a source of a slice."""

    section: Section
    model: str
    parameters: Settings
    sens: SensSource | None

    @property
    def line(self) -> int:
        return self.section.line


def _entry(section: Section, method: Method, keys: Sequence[str] = ()) -> _Entry:
    section.allow(("model", "parameters", "sens", *keys))
    model = section.text("model")
    if not model:
        raise section.error("a model entry has no `model:`", section.line, "write `- model: FOLDER`")
    parameters = read_parameters(section, method, "model")
    sens = section.section("sens")
    if "sens" in section and sens is None:
        raise section.error("a model's `sens:` is empty", section.line_of("sens"), "write `sens: {data: FILE.jsonl}`")
    return _Entry(section, model, parameters, None if sens is None else read_source(sens))


def _expert(entry: _Entry, levels: Sequence[Settings], method: Method, parameters: Settings) -> Expert:
    # A method without weights counts every model alike.
    option = method.by_name.get(WEIGHT.name)
    weight = 1.0 if option is None else without_filters(levels, option)
    # A plug-in's weight may be required, and then stand behind filters only.
    return Expert(entry.model, 1.0 if weight is None else float(weight), parameters, entry.sens, entry.line)


def _refuse_twice(entries: Sequence[_Entry], place: str, fix: str) -> None:
    seen: dict[str, int] = {}
    for entry in entries:
        if entry.model in seen:
            raise entry.section.error(
                f"'{entry.model}' is listed twice{place}", entry.line, fix, f"first in line {seen[entry.model]}"
            )
        seen[entry.model] = entry.line


def _check_count(section: Section, line: int, method: Method, listed: Sequence[str], base: str | None) -> None:
    """As many models as the method can merge; raises RecipeError."""
    if method.base == "required" and base is None:
        raise section.error(
            f"merge method '{method.name}' needs a base model",
            section.line_of("merge_method"),
            "add `base_model: FOLDER`",
            f"it is: {method.summary}",
        )
    merged = merged_models(method, listed, base)
    if not merged:
        raise section.error(
            "the only model is the base itself",
            line,
            "add a model that was fine-tuned from it",
            "nothing is left to merge",
        )
    least, most = method.experts
    if len(merged) >= least and (most is None or len(merged) <= most):
        return
    beside = method.base in ("required", "optional") and base is not None
    raise section.error(
        f"{method.name} merges {_wanted(least, most, beside)}",
        line,
        "stack the layers of several models with `slices:`"
        if method.name == "passthrough"
        else "list just as many models",
        f"{len(merged)} {'is' if len(merged) == 1 else 'are'} listed{' beside the base' if beside else ''}:"
        f" {', '.join(merged)}",
    )


_WORDS = {1: "one", 2: "two", 3: "three"}


def _wanted(least: int, most: int | None, beside: bool) -> str:
    """How many models a method takes, in words."""
    exact = least == most
    if beside and exact:
        return f"{least + 1} models: base_model and {_WORDS.get(least, str(least))} other{'s' if least > 1 else ''}"
    count = f"{least}" if exact else f"at least {least}" if most is None else f"{least} to {most}"
    return f"{count} model{'' if count == '1' else 's'}{' beside base_model' if beside else ''}"


def _models(top: Section, method: Method, base: str | None, shared: Settings) -> tuple[Expert, ...]:
    """The models that are merged, of those under `models:`."""
    entries = [_entry(section, method) for section in top.sections("models")]
    if not entries:
        raise top.error(
            "the recipe names no models", top.line_of("models"), "add `models:` with one `- model: FOLDER` each"
        )
    _refuse_twice(entries, "", "list each model once and give it the sum of the weights")
    listed = [entry.model for entry in entries]
    experts = [_expert(entry, (entry.parameters, shared), method, entry.parameters) for entry in entries]
    if method.base == "joins" and base is not None and base not in listed:
        experts.append(Expert(base, 1.0, {}, None, top.line_of("base_model")))
        listed.append(base)
    _check_count(top, top.line_of("models"), method, listed, base)
    merged = merged_models(method, listed, base)
    for entry in entries:
        if entry.model not in merged:
            progress.message(
                f"{top.path}:{entry.line}: '{entry.model}' is base_model, and counts for nothing among the models"
            )
    return tuple(expert for expert in experts if expert.model in merged)


def _layers(section: Section) -> tuple[int, int]:
    value = section.value("layer_range")
    whole = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    if not whole or not 0 <= value[0] < value[1]:
        raise section.error(
            "`layer_range` must be two whole numbers, the first layer and the one after the last",
            section.line_of("layer_range"),
            "write `layer_range: [0, 16]` for layers 0 to 15",
            "a source of a slice needs one" if value is None else f"found {shown(value)}",
        )
    return value[0], value[1]


def _slice(section: Section, top: Section, method: Method, base: str | None) -> tuple[Slice, list[_Entry]]:
    section.allow(("sources", "base_model", "parameters"), unsupported=("residual_weight",))
    entries = [_entry(source, method, ("layer_range",)) for source in section.sections("sources")]
    if not entries:
        raise section.error(
            "a slice has no sources",
            section.line_of("sources"),
            "write `sources: [{model: FOLDER, layer_range: [0, 16]}]`",
        )
    ranges = [_layers(entry.section) for entry in entries]
    unlike = next((at for at, (a, b) in enumerate(ranges) if b - a != ranges[0][1] - ranges[0][0]), None)
    if unlike is not None:
        raise section.error(
            "the sources of a slice have unlike numbers of layers",
            entries[unlike].section.line_of("layer_range"),
            "give every source of a slice a range of the same length",
            f"{list(ranges[unlike])} of '{entries[unlike].model}', {list(ranges[0])} of '{entries[0].model}'",
        )
    _refuse_twice(
        entries, " in one slice", "name each model once in a slice; stack its layers with a slice of their own"
    )
    base = section.text("base_model") or base
    listed = [entry.model for entry in entries]
    if method.base == "required" and base is None:
        _check_count(top, section.line, method, listed, base)
    _check_count(section, section.line, method, listed, base)
    if method.base in ("required", "optional") and base is not None and base not in listed and len(set(ranges)) > 1:
        raise section.error(
            "it is not clear which layers of the base belong to this slice",
            section.line,
            f"add the source `{{model: {base}, layer_range: [FROM, TO]}}`",
            "its sources have unlike ranges, and the base is not among them",
        )
    sources = tuple(
        SliceSource(entry.model, layers, entry.parameters, entry.line)
        for entry, layers in zip(entries, ranges, strict=True)
    )
    return Slice(sources, base, read_parameters(section, method, "slice"), section.line), entries


def _stacked(
    top: Section, method: Method, base: str | None, shared: Settings
) -> tuple[tuple[Slice, ...], tuple[Expert, ...]]:
    """The slices, and the models that are merged in them: each once, in the order of the recipe."""
    slices: list[Slice] = []
    experts: dict[str, Expert] = {}
    first_lines: dict[str, int] = {}
    for section in top.sections("slices"):
        part, entries = _slice(section, top, method, base)
        slices.append(part)
        merged = merged_models(method, [entry.model for entry in entries], part.base_model)
        for entry in entries:
            first_line = first_lines.setdefault(entry.model, entry.line)
            if entry.sens is not None and first_line != entry.line:
                raise entry.section.error(
                    f"the `sens:` of '{entry.model}' stands in a later source",
                    entry.section.line_of("sens"),
                    f"write it into the model's first source, in line {first_line}",
                    "a model is calibrated once, whatever slices it is in",
                )
            if entry.model in merged and entry.model not in experts:
                levels = (entry.parameters, part.parameters, shared)
                experts[entry.model] = _expert(entry, levels, method, {})
    if not slices:
        raise top.error(
            "the recipe names no slices",
            top.line_of("slices"),
            "write `slices:` with one `- sources: [{model: FOLDER, layer_range: [0, 16]}]` each",
        )
    return tuple(slices), tuple(experts.values())


def _dtype(top: Section, key: str) -> str | None:
    name = top.text(key)
    if name is not None and name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES, where=f"{top.path}:{top.line_of(key)}")
    return name


def _allowed(top: Section) -> frozenset[str]:
    """The checks that `allow:` switches off: a list of names."""
    names = top.value("allow")
    if names is None:
        return frozenset()
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise top.error("`allow:` must be a list of names", top.line_of("allow"), "write `allow: [rope_theta]`")
    return frozenset(names)


def _scale(top: Section, shared: Settings, slices: Sequence[Slice]) -> float | str | None:
    """λ as the recipe names it: `auto`, its value without filters, or None."""
    levels = [level for level in (shared, *(part.parameters for part in slices)) if LAMBDA.name in level]
    if not levels:
        return None
    if "auto" not in (level[LAMBDA.name] for level in levels):
        return without_filters(levels, LAMBDA)
    fixed = next((part for part in slices if LAMBDA.name in part.parameters), None)
    if fixed is not None:
        raise top.error(
            "a slice names a lambda, and the recipe says `lambda: auto`",
            fixed.line,
            "remove one of the two",
            "the lambda that is chosen is that of the whole merge",
        )
    return "auto"


def _method_and_base(top: Section) -> tuple[Method, str | None]:
    top.allow(TOP_LEVEL, unsupported=UNSUPPORTED)
    name = top.text("merge_method")
    if not name:
        raise top.error("the recipe has no merge_method", top.line, "add `merge_method: task_arithmetic`")
    if "models" in top and "slices" in top:
        raise top.error(
            "the recipe has both `models` and `slices`",
            top.line_of("slices"),
            "keep one of the two: `models:` merges whole models, `slices:` stacks layers",
            "they are two ways to say what the merged model is made of",
        )
    return METHODS.get(name, where=f"{top.path}:{top.line_of('merge_method')}"), top.text("base_model") or None


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file (a mergekit file, with or without `sens:`). Raises RecipeError with line and suggestion."""
    path = Path(path)
    text, top = read_yaml(path)
    method, base = _method_and_base(top)
    shared = read_parameters(top, method, "recipe")
    slices: tuple[Slice, ...] = ()
    if "slices" in top:
        slices, models = _stacked(top, method, base, shared)
    else:
        models = _models(top, method, base, shared)
    scale = _scale(top, shared, slices)
    sens_section = top.section("sens")
    if "sens" in top and sens_section is None:
        raise top.error("`sens:` is empty", top.line_of("sens"), "write `sens: {preset: paper}`")
    sens, chosen = (None, None) if sens_section is None else read_sens(sens_section)
    if chosen is not None and scale is None and (chosen.lambda_ is not None or chosen.by_size):
        if not method.adds:
            raise top.error(
                f"`preset: {chosen.name}` chooses lambda, and merge method '{method.name}' has none",
                top.line_of("sens"),
                "use `merge_method: task_arithmetic`, or `sens: {preset: paper, rule: normalized}`",
            )
        scale = chosen.lambda_
    bases = [base, *(part.base_model for part in slices)]
    read = list(dict.fromkeys([*(each for each in bases if each), *(expert.model for expert in models)]))
    recipe = Recipe(
        path=path,
        text=text,
        # The name it was found by: an entry point may bear another than the method it holds.
        merge_method=top.text("merge_method") or method.name,
        base_model=base,
        models=models,
        slices=slices,
        lambda_=scale,
        parameters=without(shared, LAMBDA.name) if scale == "auto" else shared,
        dtype=_dtype(top, "dtype"),
        out_dtype=_dtype(top, "out_dtype"),
        sens=sens,
        tokenizer=read_tokenizer(top, read),
        chat_template=read_chat_template(top),
        allow=_allowed(top),
    )
    check_sens(recipe, method)
    return recipe


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """`recipe` with another seed of the method's draws, on every level. Raises RecipeError for a method that draws nothing."""
    method = METHODS.get(recipe.merge_method, where=recipe.where())
    option = method.by_name.get("seed")
    if not method.draws or option is None:
        raise RecipeError(
            f"merge method '{method.name}' takes no random seed",
            where=f"--random-seed {seed}",
            why="it draws nothing at random",
            fix="leave out `--random-seed`",
        )
    try:
        value = option.check(seed)
    except ValueError as fault:
        raise RecipeError(
            f"the random seed {fault}", where="--random-seed", why=f"found {seed}", fix="--random-seed 0"
        ) from None
    return replace(
        recipe,
        parameters={**recipe.parameters, "seed": value},
        slices=tuple(replace(part, parameters=without(part.parameters, "seed")) for part in recipe.slices),
    )
