"""What stands beside the weights of a merged model: its config, its generation config and its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..checkpoints.families import stack_of
from ..checkpoints.source import TOKENIZER_FILES, Checkpoint
from ..checkpoints.stacked_config import stacked_config
from ..checkpoints.writer import output_config
from ..records import Recipe
from .models import RecipeModels


def output_model_config(recipe: Recipe, models: RecipeModels) -> dict[str, object]:
    """config.json of the merged model: the donor's, with the output's dtype and, for slices, its layers.

    Raises IncompatibleModelsError for slices of models whose config says things of layers that cannot be stacked.
    """
    config = output_config(models.donor.config, recipe.out_dtype or recipe.dtype)
    if not recipe.slices:
        return config
    firsts = [(models.readers[part.sources[0].model], part.sources[0].layers) for part in recipe.slices]
    pieces = [(reader.config, len(stack_of(reader.tensors).numbers), *layers) for reader, layers in firsts]
    return stacked_config(config, pieces, label=models.donor.label)


def tokenizer_donor(recipe: Recipe, models: RecipeModels) -> Checkpoint:
    """The model whose tokenizer files the merged model has."""
    return models.donor if recipe.tokenizer_source is None else models.readers[recipe.tokenizer_source]


def write_companions(recipe: Recipe, models: RecipeModels, staging: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files: the donor's, or the tokenizer that the recipe names."""
    config = output_model_config(recipe, models)
    (staging / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = tokenizer_donor(recipe, models).tokenizer_path
    for folder, name in [
        (models.donor.path, "generation_config.json"),
        *((tokenizer, name) for name in TOKENIZER_FILES),
    ]:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
