"""The ids of special tokens that a config names, where the merged model's tokens are those of another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ids_of(config: Mapping[str, Any]) -> dict[str, object]:
    """What a config says of special tokens: every `…_token_id` and `…_token_ids`, also those of a text model's part."""
    text = config.get("text_config")
    both = {**(text if isinstance(text, dict) else {}), **config}
    return {key: value for key, value in both.items() if key.endswith(("_token_id", "_token_ids"))}


def ids_in_another(
    ours: Mapping[str, object], theirs: Mapping[str, object], tokens: Mapping[str, int], others: Mapping[str, int]
) -> dict[str, object]:
    """The ids of special tokens for a config that now belongs to another model's tokens.

    What that model's config says (`theirs`); for what only `ours` names, the id that `others` give the same token; None where they
    have no such token.
    """
    token_of = {place: token for token, place in tokens.items()}

    def translated(value: object) -> object:
        if isinstance(value, list):
            found = [translated(each) for each in value]
            return None if None in found else found
        return others.get(token_of[value]) if isinstance(value, int) and value in token_of else None

    return {key: translated(value) for key, value in ours.items()} | dict(theirs)
