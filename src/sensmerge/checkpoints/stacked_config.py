"""config.json of a model whose layers were stacked from slices of others: how many there are, and what is said of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import IncompatibleModelsError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# (a model's config.json, its number of blocks, first block, the block after the last)
Piece = tuple[Mapping[str, Any], int, int, int]


def stacked_config(config: Mapping[str, Any], pieces: Sequence[Piece], *, label: str) -> dict[str, Any]:
    """`config` for the blocks that `pieces` stack: layer counts, and lists with an entry for each layer (`layer_types`).

    What is said of a block of the output is taken from its piece's own config. A text model's part of a config
    (`text_config`) is treated alike. Raises IncompatibleModelsError, naming `label`, for lists of layers that cannot be followed.
    """
    result = dict(config)
    depth = next((config[key] for key in LAYER_COUNTS if isinstance(config.get(key), int)), None)
    for key, value in config.items():
        if key in LAYER_COUNTS and isinstance(value, int):
            result[key] = sum(last - first for _, _, first, last in pieces)
        elif isinstance(value, list) and value and "layer" in key and depth is not None:
            result[key] = _gathered(key, len(value) == depth, pieces, label)
        elif key == "text_config" and isinstance(value, dict):
            inner = [(part.get(key) or {}, blocks, first, last) for part, blocks, first, last in pieces]
            result[key] = stacked_config(value, inner, label=label)
    return result


def _gathered(key: str, one_each: bool, pieces: Sequence[Piece], label: str) -> list[Any]:
    """The entries of a list of layers for each block of the output."""
    gathered: list[Any] = []
    for config, blocks, first, last in pieces:
        entries = config.get(key)
        if not one_each or not isinstance(entries, list) or len(entries) != blocks:
            raise IncompatibleModelsError(
                f"slices of models whose config.json has '{key}' are not supported yet",
                where=f"config.json of {label}",
                why=f"'{key}' is not a list with one entry for each layer in every model of the slices",
                fix="merge whole models with `models:`",
            )
        gathered += entries[first:last]
    return gathered
