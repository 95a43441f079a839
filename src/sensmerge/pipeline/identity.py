"""What the bytes of a merged model depend on, part by part: the same command goes on with its own work, and with nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.containment import CONFIG_FILES
from ..checkpoints.source import TOKENIZER_FILES
from ..errors import InputFileError
from ..methods import METHODS
from ..records import MergePlan, Recipe, hash_of
from .models import RecipeModels

COMPUTING = ("sensmerge", "numpy", "numba")
_READ = {*CONFIG_FILES, *TOKENIZER_FILES}
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")

# For each model, by its label, its files by name: size, time of the last change in ns, number in the file system.
States = dict[str, dict[str, list[int]]]


def input_states(models: RecipeModels) -> States:
    """The state of every file that the merge reads, without reading it. Raises InputFileError if a folder is gone."""
    states: States = {}
    for model in models.all:
        found = states.setdefault(model.label, {})
        for place, folder in enumerate(model.folders):
            prefix = "" if place == 0 else f"{folder.name}/"
            found |= {prefix + name: state for name, state in _states_in(folder).items()}
    return states


def _states_in(folder: Path) -> dict[str, list[int]]:
    try:
        paths = [path for path in folder.iterdir() if path.name in _READ or path.name.endswith(_WEIGHTS)]
        # A link that leads nowhere is no file of the model: what is read was found when it was opened.
        stats = {path.name: path.stat() for path in paths if path.exists()}
    except OSError as error:
        raise InputFileError(
            "the files of a model cannot be found any more",
            where=str(folder),
            why=str(error),
            fix="restore them, then run the same command again",
        ) from error
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()}


def check_unchanged(models: RecipeModels, before: States) -> None:
    """Raise InputFileError if a file of a model was changed or replaced since `before`."""
    now = input_states(models)
    changed = [
        f"'{label}' ({', '.join(names)})"
        for label in before
        if (names := _differing(before[label], now.get(label, {})))
    ]
    if changed:
        raise InputFileError(
            "a model was changed while it was merged",
            where="; ".join(changed),
            why="its files have another size, time or place on the disk than when the merge began: the result would be a mixture",
            fix="let the models stay as they are, then run the same command again",
        )


def _differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def identity_of(recipe: Recipe, models: RecipeModels, plan: MergePlan, states: States, device: str) -> dict[str, Any]:
    """All that the bytes of this merge depend on, as JSON has it. Costs the models' fingerprints."""
    whole = METHODS.get(plan.method, where="merge_method").whole is not None
    tensors = [
        [
            [each.spec.name, each.spec.dtype, each.spec.shape, each.group],
            [] if each.base is None else [each.base.model, each.base.tensor],
            [[expert.model, expert.tensor] for expert in each.experts],
            each.weights,
            {name: value for name, value in each.options.items() if name != "seed"},
            dict(each.per_model),
        ]
        for each in plan.tensors
    ]
    identity = {
        "recipe": hash_of(meaning_of(recipe.text)),
        "tensors": hash_of(plan.method, tensors),
        "coefficients": hash_of([[each.coefficients, each.scale] for each in plan.tensors]),
        "seed": sorted({repr(each.options["seed"]) for each in plan.tensors if "seed" in each.options}),
        "files": hash_of(plan.shards),
        "inputs": {model.label: [model.fingerprint(), states[model.label]] for model in models.all},
        "versions": {name: version_of(name) for name in (*COMPUTING, *(("torch",) if whole else ()))},
        "device": device if whole else None,
    }
    result: dict[str, Any] = json.loads(json.dumps(identity))
    return result


@cache
def version_of(package: str) -> str:
    """The version of an installed package."""
    return version(package)


def meaning_of(text: str) -> str:
    """A recipe's text without its comments and layout."""
    try:
        return repr(yaml.safe_load(text))
    except yaml.YAMLError:
        return text


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words; `before` comes out of a file and may be of any form."""
    try:
        return _changes(before, now)
    except (TypeError, KeyError, IndexError, AttributeError):
        return ["the record of it, which is not of this version's form"]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    if before.get("recipe") != now["recipe"]:
        found.append("the recipe")
    if before.get("seed") != now["seed"]:
        found.append(f"the random seed (it was {_listed(before.get('seed'))}, now {_listed(now['seed'])})")
    earlier = before.get("inputs", {})
    for label, (fingerprint, states) in now["inputs"].items():
        if label not in earlier:
            found.append(f"the model '{label}', which is new")
        elif earlier[label] != [fingerprint, states]:
            names = _differing(earlier[label][1], states)
            found.append(f"the model '{label}' ({', '.join(names) or 'its weights'})")
    found += [f"the model '{label}', which is gone" for label in earlier if label not in now["inputs"]]
    versions = before.get("versions", {})
    for name, number in now["versions"].items():
        if versions.get(name) != number:
            found.append(f"the version of {name} (it was {versions.get(name)}, now {number})")
    if before.get("device") != now["device"]:
        found.append(f"the device (it was {before.get('device')}, now {now['device']})")
    if before.get("coefficients") != now["coefficients"]:
        found.append("the coefficients")
    if before.get("files") != now["files"]:
        found.append("how the tensors are divided into files (--shard-size)")
    return found or ["what is merged into each tensor"]


def _listed(seeds: Any) -> str:
    return ", ".join(seeds) if isinstance(seeds, list) and seeds else "none"
