"""A first recipe for some models: written from what they are, with a reason beside every line that is not the usual one."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from .. import progress
from ..checkpoints.formats import DTYPES
from ..checkpoints.opening import Opening
from ..checkpoints.source import Checkpoint
from ..errors import (
    Faults,
    IncompatibleModelsError,
    OutputError,
    RecipeError,
    SensmergeError,
    SeveralErrors,
    allowed_by,
)
from ..methods import METHODS, Method
from ..methods.option import INT8_MASK, Option
from ..recipe import load_recipe
from ..records import Recipe
from .checking import check_tokenizers
from .models import open_models

_HOLE = "data: FILL-IN"


@dataclass(frozen=True)
class Draft:
    """A recipe that was written: its lines to fill in, and what was noticed of the models."""

    path: Path
    recipe: Recipe
    to_fill_in: tuple[int, ...]


@dataclass(frozen=True)
class _Facts:
    """What the models are: their strings in the recipe, the base's dtype, and why they need a policy for tokens, if they do."""

    base: str
    models: tuple[str, ...]
    dtype: str | None
    unlike_tokens: str | None


def draft(
    base: str,
    models: Sequence[str],
    path: str | Path = "recipe.yml",
    *,
    method: str = "task_arithmetic",
    sens: bool = False,
    allow_pickle: bool = False,
) -> Draft:
    """Write a recipe that merges `models`, fine-tuned from `base`, to `path`, which must not exist.

    Models are named as on the command line; a folder that holds a bare LoRA adapter becomes `base+adapter`. `sens` adds the block
    and a line of calibration data for each model, to be filled in. The tokenizer's policy, the dtype and the checks that would
    refuse these models are written with the reason. Raises OutputError, RecipeError, and what opening the models raises.
    """
    path = Path(path)
    if path.exists():
        raise OutputError(
            "there is a file of this name already",
            where=str(path),
            why="nothing that exists is overwritten",
            fix=f"choose another name: -o {path.with_name(f'{path.stem}-2.yml')}",
        )
    chosen = METHODS.get(method, where="--method")
    facts = _look(base, models, path, allow_pickle)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(_text(facts, chosen, sens))
    except OSError as error:
        raise OutputError(
            "the recipe cannot be written", where=str(path), why=str(error), fix="choose another place: -o FILE"
        ) from error
    try:
        recipe = load_recipe(path)
    except RecipeError:
        # A method that does not take so many models, or no `sens:`: the command was wrong, and leaves nothing.
        path.unlink()
        raise
    if facts.unlike_tokens is None:
        facts = replace(facts, unlike_tokens=_unlike_tokens(recipe, allow_pickle))
        if facts.unlike_tokens is not None:
            path.write_text(_text(facts, chosen, sens), encoding="utf-8")
            recipe = load_recipe(path)
    lines = recipe.text.split("\n")
    return Draft(path, recipe, tuple(number for number, line in enumerate(lines, 1) if _HOLE in line))


def allow(written: Draft, error: SensmergeError) -> Draft | None:
    """The draft again with every check of `allow:` that `error` offers, the reason beside it; None where it offers none."""
    found: dict[str, str] = {}
    for each in error.errors if isinstance(error, SeveralErrors) else [error]:
        found |= dict.fromkeys(allowed_by(each), f"{each.what}: {each.why}")
    new = {name: why for name, why in found.items() if name not in written.recipe.allow}
    if not new:
        return None
    before = written.recipe.text.rstrip("\n").split("\n")
    if written.recipe.allow:
        # The line that this function wrote comes last.
        before.pop()
    else:
        before += [
            "",
            "# These checks refuse the models; each is switched off here. Read why before you keep the line.",
        ]
    reasons = [f"#   {name}: {_one_line(why)}" for name, why in new.items()]
    names = sorted({*written.recipe.allow, *new})
    text = "\n".join([*before, *reasons, f"allow: [{', '.join(names)}]", ""])
    written.path.write_text(text, encoding="utf-8")
    return Draft(written.path, load_recipe(written.path), written.to_fill_in)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _look(base: str, models: Sequence[str], path: Path, allow_pickle: bool) -> _Facts:
    """Open the models as the command line names them; raises all their faults at once."""
    # An adapter of another base is told later, with the line that allows it.
    opening = Opening([Path.cwd()], frozenset({"adapter_base"}), allow_pickle)
    folder = path.resolve().parent
    names = [f"{base}+{model}" if _is_adapter(model) else model for model in models]
    opened: list[Checkpoint] = []
    faults = Faults()
    with ExitStack() as stack:
        for name in dict.fromkeys([base, *names]):
            with faults.gathered():
                opened.append(opening.open(name, where="sensmerge init"))
                stack.callback(opened[-1].close)
        faults.raise_all()
        return _Facts(
            base=_from(folder, base),
            models=tuple(_from(folder, name) for name in names),
            dtype=_dtype(opened[0]),
            unlike_tokens=_unlike_rows(opened),
        )


def _is_adapter(name: str) -> bool:
    """Whether `name` is a folder with a LoRA adapter and no model."""
    folder = Path(name).expanduser()
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _from(folder: Path, name: str) -> str:
    """A model's name as a recipe in `folder` has it: relative paths lead there from it, hub ids stay."""
    if not Path(name).expanduser().exists() and "+" in name:
        return "+".join(_from(folder, part) for part in name.split("+", 1))
    path = Path(name)
    if path.is_absolute() or name.startswith("~") or not path.exists():
        return name
    return os.path.relpath(path.resolve(), folder)


def _dtype(model: Checkpoint) -> str | None:
    """The dtype that most parameters are stored in, as a recipe names it."""
    counts: Counter[str] = Counter()
    for name, spec in model.tensors.items():
        counts[model.stored_dtype(name)] += spec.elements
    names = {stored: name for name, stored in DTYPES.items()}
    return next((names[stored] for stored, _ in counts.most_common() if stored in names), None)


def _unlike_rows(opened: Sequence[Checkpoint]) -> str | None:
    """Why models whose embeddings have unlike numbers of rows need a policy; None where they agree."""
    sizes = {model.label: model.config.get("vocab_size") for model in opened}
    if len({size for size in sizes.values() if size is not None}) < 2:
        return None
    return "the embeddings have unlike numbers of rows: " + ", ".join(f"{name} {size}" for name, size in sizes.items())


def _unlike_tokens(recipe: Recipe, allow_pickle: bool) -> str | None:
    """Why models with unlike vocabularies need a policy; None where they are alike."""
    # What is noticed on opening is told when the recipe is planned.
    with progress.listening(None), open_models(recipe, allow_pickle=allow_pickle) as models:
        try:
            check_tokenizers(recipe, models)
        except IncompatibleModelsError as error:
            return f"{error.what} ({error.where})"
    return None


def _text(facts: _Facts, method: Method, sens: bool) -> str:
    base_note = {
        "required": "task vectors are taken from it",
        "optional": "task vectors are taken from it",
        "member": "config and tokenizer come from it",
        "joins": "one of the models that are merged",
    }[method.base]
    lines = [
        f"# {method.summary} ({_one_line(method.citation)})",
        f"merge_method: {method.name}",
        f"base_model: {_quoted(facts.base)}  # {base_note}",
        "models:",
    ]
    for number, model in enumerate(facts.models, 1):
        lines.append(f"  - model: {_quoted(model)}")
        per_model = [option for option in method.options if option.per_model]
        if per_model:
            lines.append(f"    # parameters: {{{', '.join(f'{o.name}: {_default(o)}' for o in per_model)}}}")
        if sens:
            lines.append(
                f"    sens: {{{_HOLE}-{number}.jsonl}}  # samples of this model's own task, one JSON object a line"
            )
    lines += ["", *_parameter_lines(method)]
    if facts.unlike_tokens is not None:
        lines += [
            f"# {_one_line(facts.unlike_tokens)}.",
            "# union keeps every token of every model; base keeps those of base_model alone.",
            "tokenizer: {source: union}",
            "",
        ]
    if facts.dtype is not None:
        lines += ["# of the weights that are written: float32, float16 or bfloat16; arithmetic is float32 in any case"]
        lines += [f"dtype: {facts.dtype}", ""]
    if sens:
        lines += [
            "# Coefficients are measured on the samples above; `sensmerge list presets` has the other presets.",
            "# A line of a data file is {prompt, response}, {instruction, input, output}, {messages} or {text}.",
            f"sens: {{preset: {'calibrated' if method.adds else 'paper'}, samples: 100}}",
            "",
        ]
    return "\n".join(lines)


def _parameter_lines(method: Method) -> list[str]:
    """The method's parameters for all models with their defaults, as comments; those that must be named are named."""
    shared = [option for option in method.options if not option.per_model and option.name != INT8_MASK.name]
    required = [option for option in method.options if option.default is None]
    usual = [
        f"  # {option.name}: {_default(option)}  # {option.summary}" for option in shared if option not in required
    ]
    if method.adds:
        usual.insert(0, "  # lambda: 1.0  # what the merged task vector is multiplied by")
    named = [f"  {option.name}: {_default(option)}  # {option.summary}" for option in required]
    if not named:
        return [*(["# parameters:  # as they are unless you say otherwise"] if usual else []), *_commented(usual), ""]
    return ["parameters:", *named, *usual, ""]


def _commented(lines: Sequence[str]) -> list[str]:
    return [f"# {line.replace('# ', '', 1)}" for line in lines]


def _default(option: Option) -> str:
    if option.default is None:
        # The middle of its range, where there is no default to begin with.
        return f"{(option.low + option.high) / 2:g}" if option.high < float("inf") else "1"
    return str(option.default).lower() if isinstance(option.default, bool) else str(option.default)


def _quoted(name: str) -> str:
    """A model's name as YAML, quoted where plain text could be read as something else."""
    return name if re.fullmatch(r"[A-Za-z./~_][\w./~+@-]*", name) and name.lower() not in _WORDS else json.dumps(name)


_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "~")
