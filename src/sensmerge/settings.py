"""A parameter's setting: a value, a gradient over the layers, or values filtered by tensor name; read, checked, resolved.

The meaning is mergekit's. The most specific level of the recipe whose setting yields a value for a tensor wins: model or source,
then slice, then top level, then the option's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from .errors import RecipeError
from .methods import METHODS, Method
from .methods.option import Option, Value
from .records import Conditional, Settings
from .yamlfile import Section, shown

Level = Literal["recipe", "slice", "model"]

LAMBDA = Option("lambda", "number", 1.0, "what the merged update is multiplied by before it is added to the base")

_EXAMPLES = {"number": "0.5", "whole": "1", "truth": "true"}


def accepted(method: Method, level: Level) -> dict[str, Option]:
    """The options that `parameters:` may hold on one level of a recipe: a model has only those with a value for each model."""
    options = {name: option for name, option in method.by_name.items() if level != "model" or option.per_model}
    if method.adds and level != "model":
        options[LAMBDA.name] = LAMBDA
    return options


def read_parameters(holder: Section, method: Method, level: Level) -> dict[str, object]:
    """The settings under `parameters:` of a recipe, a slice or a model; raises RecipeError with the line of what cannot be.

    `lambda: auto` on the recipe's own level is handed on as it is.
    """
    section = holder.section("parameters")
    if section is None:
        return {}
    known = accepted(method, level)
    for key in section:
        if key not in known:
            _refuse_known_elsewhere(section, key, method)
    section.allow(known)
    settings: dict[str, object] = {}
    for key in section:
        if key == LAMBDA.name and section.value(key) == "auto":
            if level != "recipe":
                raise section.error(
                    "`lambda: auto` cannot stand in a slice",
                    section.line_of(key),
                    "write `lambda: auto` into the recipe's top-level `parameters:`",
                    "one lambda is chosen for the whole merge",
                )
            settings[key] = "auto"
        else:
            settings[key] = read_setting(section, known[key], method.name)
    return settings


def _refuse_known_elsewhere(section: Section, key: str, method: Method) -> None:
    """Raise RecipeError for a parameter that stands on the wrong level, or belongs to other methods; misspelt ones pass."""
    line = section.line_of(key)
    if key in accepted(method, "recipe"):
        raise section.error(
            f"'{key}' is not a parameter of one model",
            line,
            f"write `{key}:` into the recipe's top-level `parameters:`",
            f"merge method '{method.name}' has one value of it for all models",
        )
    if key == LAMBDA.name:
        raise section.error(
            f"merge method '{method.name}' has no lambda",
            line,
            "remove `lambda:`, or use `merge_method: task_arithmetic`",
            "it does not add an update to a base",
        )
    others = [name for name in METHODS.names() if key in METHODS.get(name, where=f"{section.path}:{line}").by_name]
    if others:
        has = ", ".join([*method.by_name, *(["lambda"] if method.adds else [])]) or "no parameters"
        raise section.error(
            f"merge method '{method.name}' has no '{key}'",
            line,
            f"remove `{key}:`, or use a method that has it: {', '.join(others)}",
            f"'{method.name}' has: {has}",
        )


def read_setting(section: Section, option: Option, method: str) -> object:
    """The setting under the option's name: a value, a tuple of values (gradient) or a tuple of Conditional.

    Every value in it has passed `Option.check`. Raises RecipeError naming option, method and line.
    """
    key = option.name
    value = section.value(key)
    if section.is_section(key):
        part = section.section(key)
        assert part is not None
        return (_conditional(part, option, method),)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return tuple(_conditional(part, option, method) for part in section.sections(key))
    return _unfiltered(section, key, option, method)


def _conditional(part: Section, option: Option, method: str) -> Conditional:
    part.allow(("filter", "value"))
    if "value" not in part:
        raise part.error(
            f"a filtered '{option.name}' has no value",
            part.line,
            f"write `- {{filter: self_attn, value: {_example(option)}}}`",
        )
    return Conditional(part.text("filter"), _unfiltered(part, "value", option, method))


def _unfiltered(section: Section, key: str, option: Option, method: str) -> object:
    value = section.value(key)
    if not isinstance(value, list):
        return _checked(value, section, key, option, method)
    if not value:
        raise section.error(
            f"'{option.name}' of merge method '{method}' is an empty list",
            section.line_of(key),
            f"write `{key}: {_example(option)}`, or a list of values from the first layer to the last",
            "a gradient needs at least one value",
        )
    return tuple(_checked(item, section, key, option, method) for item in value)


def _checked(value: object, section: Section, key: str, option: Option, method: str) -> Value:
    try:
        return option.check(value)
    except ValueError as fault:
        raise section.error(
            f"'{option.name}' of merge method '{method}' {fault}",
            section.line_of(key),
            f"write `{key}: {_example(option)}`",
            f"found {shown(value)}",
        ) from None


def _example(option: Option) -> str:
    if option.default is not None:
        return f"{option.default:g}" if isinstance(option.default, float) else str(option.default).lower()
    return next((str(choice).lower() for choice in option.choices or ()), _EXAMPLES.get(option.kind, "0.5"))


def resolve(levels: Sequence[Settings], option: Option, tensor: str, t: float, *, where: str) -> Value:
    """The option's value for one tensor, `levels` most specific first; t in [0, 1] is the tensor's place in the layers.

    Raises RecipeError, naming `where`, if the option is required and nothing yields a value, or if a gradient of whole numbers
    yields none.
    """
    for level in levels:
        if option.name in level:
            value = _evaluated(level[option.name], tensor, t)
            if value is None:
                continue
            if option.kind == "whole":
                return _whole(value, option, tensor, where)
            return value
    if option.default is None:
        raise RecipeError(
            f"'{option.name}' has no value for tensor '{tensor}'",
            where=where,
            why=f"the merge method needs '{option.name}' for every tensor, and no setting of it matches this one",
            fix=f"write `parameters: {{{option.name}: {_example(option)}}}`,"
            f" or end its list with `- value: {_example(option)}`",
        )
    return option.default


def _evaluated(setting: object, tensor: str, t: float) -> Value | None:
    if not isinstance(setting, tuple):
        assert isinstance(setting, (bool, int, float, str))
        return setting
    if isinstance(setting[0], Conditional):
        matching = (each for each in setting if each.filter in (None, "*") or each.filter in tensor)
        first = next(matching, None)
        return None if first is None else _evaluated(first.setting, tensor, t)
    place = t * (len(setting) - 1)
    # 2/49 · 49 is not 2: a place that is a value's own, but for rounding, is that value's.
    if abs(place - round(place)) < 1e-9:
        place = float(round(place))
    lower = int(place)
    if not _numeric(setting):
        choice: Value = setting[lower]
        return choice
    share = place - lower
    upper = min(len(setting) - 1, lower + 1)
    return float((1 - share) * setting[lower] + share * setting[upper])


def _numeric(values: Sequence[object]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _whole(value: Value, option: Option, tensor: str, where: str) -> Value:
    try:
        return option.check(value)
    except ValueError as fault:
        raise RecipeError(
            f"'{option.name}' {fault}, and is {value:g} for tensor '{tensor}'",
            where=where,
            why="a gradient over the layers passes through every number between its ends",
            fix=f"write one value: `{option.name}: {_example(option)}`",
        ) from None


def without_filters(levels: Sequence[Settings], option: Option) -> Value | None:
    """The value that tables show: the first without a filter, a gradient by its mean; else the option's default."""
    for level in levels:
        setting = level.get(option.name)
        if isinstance(setting, tuple) and isinstance(setting[0], Conditional):
            setting = next((each.setting for each in setting if each.filter in (None, "*")), None)
        if isinstance(setting, tuple):
            return math.fsum(setting) / len(setting) if _numeric(setting) else setting[0]
        if isinstance(setting, (bool, int, float, str)):
            return setting
    return option.default


def as_written(settings: Settings) -> dict[str, object]:
    """Settings as plain lists and mappings, in the form that a recipe has."""

    def plain(setting: object) -> object:
        if isinstance(setting, Conditional):
            filtered = {} if setting.filter is None else {"filter": setting.filter}
            return {**filtered, "value": plain(setting.setting)}
        return [plain(part) for part in setting] if isinstance(setting, tuple) else setting

    return {name: plain(setting) for name, setting in settings.items()}


def without(settings: Mapping[str, object], name: str) -> dict[str, object]:
    """`settings` less one of them."""
    return {key: setting for key, setting in settings.items() if key != name}
