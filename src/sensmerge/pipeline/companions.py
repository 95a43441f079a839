"""What stands beside the weights of a merged model: its config, its generation config and its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.families import stack_of
from ..checkpoints.source import TOKENIZER_FILES
from ..checkpoints.stacked_config import stacked_config
from ..checkpoints.vocabulary.token_map import as_text, read_json
from ..checkpoints.writer import output_config
from ..records import Recipe
from .models import RecipeModels


def output_model_config(recipe: Recipe, models: RecipeModels) -> dict[str, object]:
    """config.json of the merged model: the donor's, with the output's dtype, vocabulary and, for slices, its layers.

    Raises IncompatibleModelsError for slices of models whose config says things of layers that cannot be stacked.
    """
    config = output_config(models.donor.config, recipe.out_dtype or recipe.dtype)
    if recipe.slices:
        firsts = [(models.readers[part.sources[0].model], part.sources[0].layers) for part in recipe.slices]
        pieces = [(reader.config, len(stack_of(reader.tensors).numbers), *layers) for reader, layers in firsts]
        config = stacked_config(config, pieces, label=models.donor.label)
    return _with_vocabulary(config, models.tokenizer.rows, models.tokenizer.config_ids)


def _with_vocabulary(config: Mapping[str, Any], rows: int | None, ids: Mapping[str, object]) -> dict[str, Any]:
    """`config` with the output's number of rows and ids of special tokens; a text model's part of it is treated alike."""
    result = dict(config)
    text = config.get("text_config")
    inner = dict(text) if isinstance(text, dict) else {}
    for key, value in ids.items():
        for part in [part for part in (result, inner) if key in part] or [result]:
            part[key] = value
    if rows is not None:
        for part in [part for part in (result, inner) if "vocab_size" in part] or [result]:
            part["vocab_size"] = rows
    return result | ({"text_config": inner} if isinstance(text, dict) else {})


def write_companions(recipe: Recipe, models: RecipeModels, staging: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files as the plan for the tokenizer says."""
    config = output_model_config(recipe, models)
    (staging / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plan, generation = models.tokenizer, models.donor.path / "generation_config.json"
    if generation.is_file() and plan.generation_ids:
        changed = {**read_json(generation), **plan.generation_ids}
        (staging / generation.name).write_text(as_text(changed), encoding="utf-8")
    elif generation.is_file():
        shutil.copyfile(generation, staging / generation.name)
    for name in TOKENIZER_FILES:
        if name in plan.files:
            (staging / name).write_text(plan.files[name], encoding="utf-8")
        elif name not in plan.left_out and (plan.folder / name).is_file():
            shutil.copyfile(plan.folder / name, staging / name)
