"""From a YAML file to a Recipe: a mergekit file plus `sens:`, every key checked, every fault with its line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from . import progress
from .calibration.samples import FIELDS
from .checkpoints.formats import DTYPES
from .distances import DISTANCES
from .errors import RecipeError
from .methods import METHODS, Method
from .records import Expert, Recipe, SensSettings, SensSource
from .registry import unknown_name
from .rules import RULES
from .rules.presets import Preset, preset
from .yamlfile import Section, read_yaml

# mergekit's keys that would change a merge and are not built yet: refused by name.
TOP_LEVEL = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "sens")
UNSUPPORTED = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "merge_parameters")

METHOD_PARAMETERS = ("density", "rescale", "int8_mask", "gamma", "epsilon", "t", "normalize", "lambda")

CHOICES: Mapping[str, tuple[str, ...]] = {
    "template": ("none", "chat"),
    "loss": ("response", "all"),
    "score": ("weight", "task_vector", "fisher"),
    "group": ("block", "module", "tensor"),
    "positions": ("all", "loss", "last"),
    "axis": ("row", "column"),
    "direction": ("distance", "similarity"),
    "other": ("block_mean", "own_group", "base", "uniform"),
    "compute_dtype": ("float32", "bfloat16", "float16"),
}
_WHOLE_NUMBERS = {"samples": 1, "max_length": 2, "seed": 0}


def _refuse(what: str, where: str, why: str, fix: str) -> RecipeError:
    return RecipeError(what, where=where, why=why, fix=fix)


def checked_setting(key: str, value: Any, where: str) -> Any:
    """The value of one key of `sens:`, checked. Raises RecipeError naming `where`."""
    if key == "rule":
        RULES.get(str(value), where=where)
        return str(value)
    if key == "distance":
        if str(value) not in DISTANCES.names():
            raise unknown_name("distance", str(value), DISTANCES.names(), where=where)
        return str(value)
    if key in CHOICES:
        if str(value) not in CHOICES[key]:
            raise unknown_name(f"value of '{key}'", str(value), CHOICES[key], where=where)
        return str(value)
    if key in _WHOLE_NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int) or value < _WHOLE_NUMBERS[key]:
            raise _refuse(
                f"'{key}' must be a whole number from {_WHOLE_NUMBERS[key]} up",
                where,
                f"found {value!r}",
                f"`{key}: 100`",
            )
        return value
    if key == "total" and value == "K":
        return value
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf") or (key == "temperature" and number <= 0):
        kind = "a number above 0" if key == "temperature" else "`K` or a number"
        raise _refuse(f"'{key}' must be {kind}", where, f"found {value!r}", f"`{key}: 1.0`")
    return number


def _tell_unused_temperature(settings: SensSettings, where: str) -> None:
    """Warn that a temperature was named which the rule does not use."""
    if not RULES.get(settings.rule, where=where).uses_temperature:
        progress.warning(f"{where}: `rule: {settings.rule}` has no temperature, so this one changes nothing")


def _sens_settings(section: Section) -> tuple[SensSettings, Preset]:
    section.allow(field.name for field in fields(SensSettings))
    chosen = preset(section.text("preset", "paper") or "paper", where=f"{section.path}:{section.line_of('preset')}")
    defaults: dict[str, Any] = {"preset": chosen.name, **chosen.settings}
    if chosen.by_size:
        defaults["temperature"] = None
    for field in fields(SensSettings):
        value = section.value(field.name) if field.name != "preset" else None
        if value is not None:
            where = f"{section.path}:{section.line_of(field.name)}"
            defaults[field.name] = checked_setting(field.name, value, where)
    settings = SensSettings(**defaults)
    if "temperature" in section:
        _tell_unused_temperature(settings, f"{section.path}:{section.line_of('temperature')}")
    if settings.positions == "last" and settings.loss == "all":
        raise section.error(
            "`positions: last` cannot be used with `loss: all`",
            section.line_of("positions"),
            "use `loss: response` with `positions: last`",
            "the end of a prompt is where the loss begins, and with `loss: all` it begins at once",
        )
    return settings, chosen


def with_settings(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """`recipe` with some keys of its `sens:` block replaced, checked like the file's own. Raises RecipeError."""
    if recipe.sens is None:
        raise _no_sens(recipe)
    checked = {key: checked_setting(key, value, f"--{key}") for key, value in changes.items() if value is not None}
    sens = replace(recipe.sens, **checked)
    if "temperature" in checked:
        _tell_unused_temperature(sens, "--temperature")
    return replace(recipe, sens=sens)


def _no_sens(recipe: Recipe) -> RecipeError:
    return _refuse(
        "this recipe has no `sens:` block",
        recipe.where(),
        "there is nothing to calibrate: it is a plain merge",
        "add `sens: {preset: paper}`, and `sens: {data: FILE.jsonl}` to each model",
    )


def settings_of(recipe: Recipe) -> SensSettings:
    """The recipe's `sens:` settings; raises RecipeError if it has none."""
    if recipe.sens is None:
        raise _no_sens(recipe)
    return recipe.sens


def _source(section: Section) -> SensSource:
    section.allow(("data", "profile"))
    if ("data" in section) == ("profile" in section):
        raise section.error(
            "a model's `sens:` needs either data or a profile", section.line, "write `sens: {data: FILE.jsonl}`"
        )
    if section.is_section("data"):
        data = section.section("data")
        assert data is not None
        data.allow(("path", *FIELDS), unsupported=("name", "split", "revision"))
        path = data.text("path")
        names = {field: name for field in FIELDS if (name := data.text(field)) is not None}
        if path is None:
            raise data.error("`data:` needs a path", data.line, "write `data: {path: FILE.jsonl}`")
        return SensSource(data=path, fields=names)
    source = SensSource(data=section.text("data"), profile=section.text("profile"))
    if not source.data and not source.profile:
        raise section.error(
            "a model's `sens:` names no file", section.line, "write `sens: {data: FILE.jsonl}`", "its value is empty"
        )
    return source


def _number_only(section: Section, key: str, default: float) -> float:
    if isinstance(section.value(key), (list, dict)):
        raise section.error(
            f"layer gradients and filters for '{key}' are not supported yet",
            section.line_of(key),
            f"give one number: `{key}: 0.5`",
            "a list or a filter would be another merge, so it is not ignored",
        )
    return section.number(key, default)


def _expert(section: Section, default_weight: float) -> Expert:
    section.allow(("model", "parameters", "sens"))
    model = section.text("model")
    if not model:
        raise section.error("a model entry has no `model:`", section.line, "write `- model: FOLDER`")
    parameters = section.section("parameters")
    weight = default_weight
    if parameters is not None:
        parameters.allow(("weight",), unsupported=METHOD_PARAMETERS)
        weight = _number_only(parameters, "weight", default_weight)
    sens = section.section("sens")
    if "sens" in section and sens is None:
        raise section.error("a model's `sens:` is empty", section.line_of("sens"), "write `sens: {data: FILE.jsonl}`")
    source = None if sens is None else _source(sens)
    return Expert(model, weight, source, section.line)


def _dtype(top: Section, key: str) -> str | None:
    name = top.text(key)
    if name is not None and name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES, where=f"{top.path}:{top.line_of(key)}")
    return name


def _parameters(top: Section, method: Method) -> tuple[float | str | None, dict[str, object], float]:
    """(λ, the method's options, the weight of models that name none) from the top-level `parameters:`."""
    options = dict(method.options)
    section = top.section("parameters")
    if section is None:
        return None, options, 1.0
    section.allow(("lambda", "weight", *method.options), unsupported=METHOD_PARAMETERS)
    scale: float | str | None = None
    if "lambda" in section:
        if not method.adds:
            raise section.error(
                f"merge method '{method.name}' has no lambda",
                section.line_of("lambda"),
                "remove `lambda:`, or use `merge_method: task_arithmetic`",
            )
        value = section.value("lambda")
        scale = "auto" if value == "auto" else _number_only(section, "lambda", 1.0)
    for name, default in method.options.items():
        assert isinstance(default, bool)
        options[name] = section.truth(name, default)
    weight = _number_only(section, "weight", 1.0)
    return scale, options, weight


def _checked_models(top: Section, default_weight: float) -> tuple[Expert, ...]:
    experts = tuple(_expert(section, default_weight) for section in top.sections("models"))
    if not experts:
        raise top.error(
            "the recipe names no models", top.line_of("models"), "add `models:` with one `- model: FOLDER` each"
        )
    seen: dict[str, int] = {}
    for expert in experts:
        if expert.model in seen:
            raise top.error(
                f"'{expert.model}' is listed twice",
                expert.line,
                "list each model once and give it the sum of the weights",
                f"first in line {seen[expert.model]}",
            )
        seen[expert.model] = expert.line
    return experts


def _check_sens(recipe: Recipe, method: Method) -> None:
    if recipe.sens is None:
        with_source = next((expert for expert in recipe.models if expert.sens is not None), None)
        if with_source is not None:
            raise _refuse(
                "a model has a `sens:` block, but the recipe has none",
                recipe.where(with_source.line),
                "without it the calibration data would be ignored",
                "add `sens: {preset: paper}` at the top level, or remove the model's block",
            )
        if recipe.lambda_ == "auto":
            raise _refuse(
                "`lambda: auto` needs calibration data",
                recipe.where(),
                "it is chosen by the loss on calibration samples",
                "add `sens: {rule: uniform}` for a plain merge, and `sens: {data: FILE.jsonl}` to each model",
            )
        return
    if not method.takes_sens:
        raise _refuse(
            f"merge method '{method.name}' does not work with `sens:`",
            recipe.where(),
            "it does not sum task vectors, so there is nothing that a coefficient could multiply",
            "remove the `sens:` block, or use `merge_method: task_arithmetic`",
        )
    if recipe.base_model is None:
        raise _refuse(
            "`sens:` needs a base model",
            recipe.where(),
            "coefficients multiply task vectors: the differences from a base",
            "add `base_model: FOLDER`",
        )


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file (a mergekit file, with or without `sens:`). Raises RecipeError with line and suggestion."""
    path = Path(path)
    text, top = read_yaml(path)
    top.allow(TOP_LEVEL, unsupported=UNSUPPORTED)
    name = top.text("merge_method")
    if not name:
        raise top.error("the recipe has no merge_method", top.line, "add `merge_method: task_arithmetic`")
    method = METHODS.get(name, where=f"{path}:{top.line_of('merge_method')}")
    base = top.text("base_model")
    if base is None and method.needs_base:
        raise top.error(
            f"merge method '{name}' needs a base model",
            top.line_of("merge_method"),
            "add `base_model: FOLDER`",
            "it adds task vectors to a base",
        )
    scale, options, default_weight = _parameters(top, method)
    models = _checked_models(top, default_weight)
    sens_section = top.section("sens")
    if "sens" in top and sens_section is None:
        raise top.error("`sens:` is empty", top.line_of("sens"), "write `sens: {preset: paper}`")
    sens, chosen = (None, None) if sens_section is None else _sens_settings(sens_section)
    if chosen is not None and scale is None and (chosen.lambda_ is not None or chosen.by_size):
        if not method.adds:
            raise top.error(
                f"`preset: {chosen.name}` chooses lambda, and merge method '{name}' has none",
                top.line_of("sens"),
                "use `merge_method: task_arithmetic`, or `sens: {preset: paper, rule: normalized}`",
            )
        scale = chosen.lambda_
    dtype, out_dtype = _dtype(top, "dtype"), _dtype(top, "out_dtype")
    if base is not None and name != "linear":
        # A base listed among the models has no task vector: mergekit's habit, which means nothing but the base.
        models = tuple(expert for expert in models if expert.model != base)
        if not models:
            raise top.error(
                "the only model is the base itself", top.line_of("models"), "add a model that was fine-tuned from it"
            )
    if options.get("normalize") and math.fsum(expert.weight for expert in models) == 0.0:
        raise top.error(
            "the weights sum to zero",
            top.line_of("models"),
            "change a weight, or write `parameters: {normalize: false}`",
            f"merge method '{name}' with `normalize: true` divides by their sum",
        )
    recipe = Recipe(path, text, name, base, models, scale, options, dtype, out_dtype, sens)
    _check_sens(recipe, method)
    return recipe
