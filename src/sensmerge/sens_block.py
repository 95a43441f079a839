"""The `sens:` blocks of a recipe: how coefficients are measured, and what each model is calibrated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from . import progress
from .calibration.samples import FIELDS
from .distances import DISTANCES
from .errors import RecipeError
from .methods import Method
from .records import Recipe, SensSettings, SensSource
from .registry import unknown_name
from .rules import RULES
from .rules.presets import Preset, preset
from .yamlfile import Section, shown

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
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "flash_attention_3"),
}
_WHOLE_NUMBERS = {"samples": 1, "max_length": 2, "seed": 0}
_ABOVE_ZERO = ("temperature", "until")
# How many samples are drawn at first where `until` says when to stop.
FIRST_SAMPLES = 16


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
                f"found {shown(value)}",
                f"`{key}: 100`",
            )
        return value
    if key == "total" and value == "K":
        return value
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf") or (key in _ABOVE_ZERO and number <= 0):
        kind = "a number above 0" if key in _ABOVE_ZERO else "`K` or a number"
        raise _refuse(f"'{key}' must be {kind}", where, f"found {shown(value)}", f"`{key}: 1.0`")
    return number


def _tell_unused_temperature(settings: SensSettings, where: str) -> None:
    """Warn that a temperature was named which the rule does not use."""
    if not RULES.get(settings.rule, where=where).uses_temperature:
        progress.warning(f"{where}: `rule: {settings.rule}` has no temperature, so this one changes nothing")


def read_sens(section: Section) -> tuple[SensSettings, Preset]:
    """The recipe's `sens:` block with its preset applied, and the preset. Raises RecipeError with the line of what cannot be."""
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
    if "until" in defaults and "samples" not in section:
        defaults["samples"] = FIRST_SAMPLES
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
    if "until" in checked and recipe.sens.until is None:
        # The recipe's number is that of a calibration of one size; here it grows.
        checked.setdefault("samples", FIRST_SAMPLES)
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


def read_source(section: Section) -> SensSource:
    """A model's own `sens:` block: data or a profile. Raises RecipeError."""
    section.allow(("data", "profile"))
    if ("data" in section) == ("profile" in section):
        raise section.error(
            "a model's `sens:` needs either data or a profile", section.line, "write `sens: {data: FILE.jsonl}`"
        )
    if section.is_section("data"):
        data = section.section("data")
        assert data is not None
        data.allow(("path", "name", "split", "revision", *FIELDS))
        path = data.text("path")
        names = {field: name for field in FIELDS if (name := data.text(field)) is not None}
        if path is None:
            raise data.error("`data:` needs a path", data.line, "write `data: {path: FILE.jsonl}`")
        return SensSource(path, names, None, data.text("name"), data.text("split"), data.text("revision"))
    source = SensSource(data=section.text("data"), profile=section.text("profile"))
    if not source.data and not source.profile:
        raise section.error(
            "a model's `sens:` names no file", section.line, "write `sens: {data: FILE.jsonl}`", "its value is empty"
        )
    return source


def check_sens(recipe: Recipe, method: Method) -> None:
    """What `sens:` needs of the rest of the recipe; raises RecipeError."""
    if recipe.sens is None:
        _check_nothing_unused(recipe)
    else:
        check_coefficients_apply(recipe, method)


def check_coefficients_apply(recipe: Recipe, method: Method) -> None:
    """Coefficients mean something to this recipe's method, base and slices; raises RecipeError."""
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
    if recipe.slices:
        _check_sens_of_slices(recipe, method)


def _check_nothing_unused(recipe: Recipe) -> None:
    """A recipe without `sens:` has no calibration data, and nothing that needs some."""
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


def _check_sens_of_slices(recipe: Recipe, method: Method) -> None:
    """Coefficients belong to a layer of the experts, so every source of a slice must stand at the same layers."""
    plain = "remove the `sens:` blocks: the slices are then merged plainly"
    if recipe.lambda_ == "auto":
        raise _refuse(
            "`lambda: auto` with `slices:` is not supported yet",
            recipe.where(recipe.slices[0].line),
            "it is chosen by running the merged model, whose layers are not those of the base",
            "write `parameters: {lambda: 1.0}`, or another number",
        )
    experts = {expert.model for expert in recipe.models}
    for part in recipe.slices:
        if len({source.layers for source in part.sources}) > 1:
            ranges = ", ".join(f"{list(source.layers)} of '{source.model}'" for source in part.sources)
            raise _refuse(
                f"merge method '{method.name}' does not work with `sens:` and slices of unlike ranges",
                recipe.where(part.line),
                f"a coefficient belongs to one layer of all experts; found {ranges}",
                plain,
            )
        missing = experts - {source.model for source in part.sources}
        if missing:
            raise _refuse(
                "`sens:` with slices of unlike models is not supported yet",
                recipe.where(part.line),
                f"a layer's coefficients compare all experts, and this slice has no {', '.join(sorted(missing))}",
                plain,
            )
        if part.base_model != recipe.base_model:
            raise _refuse(
                "`sens:` with slices of unlike bases is not supported yet",
                recipe.where(part.line),
                f"the experts are measured against one base, '{recipe.base_model}'",
                plain,
            )
