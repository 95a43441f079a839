"""Which tensors of a model have a row for each token: the embedding, the head, and their biases."""

from __future__ import annotations

import re

from ...errors import IncompatibleModelsError
from ..families import role_outside, stack_of
from ..source import Checkpoint

# What lies outside the blocks and has rows for something else: positions, kinds of segment, norms, projections.
_NO_TOKENS = re.compile(
    r"(^|\.)(wpe|\w*posi?tion\w*|\w*_pos|pos_\w*|token_type\w*|segment\w*|\w*norm\w*|transform|\w*projection\w*)\.",
    re.IGNORECASE,
)
_SECOND_TABLE = re.compile(r"(^|\.)embed_tokens_per_layer\.")
# Parts of a head that no role names: BERT's decoder and the bias beside it.
_HEADS = re.compile(r"(^|\.)(predictions|lm_head|embed_out|decoder|generator)\.")


def vocabulary_tensors(model: Checkpoint) -> tuple[str, ...]:
    """The names of the tensors whose first dimension is the vocabulary, sorted; empty for a model without an embedding.

    Raises IncompatibleModelsError for a second embedding of tokens with rows of its own (Gemma 3n).
    """
    rows = vocabulary_rows(model)
    if rows is None:
        return ()
    other = next((name for name in _outside(model) if _SECOND_TABLE.search(name)), None)
    if other is not None:
        raise IncompatibleModelsError(
            f"the rows of '{model.label}' cannot be aligned by token",
            where=f"tensor '{other}' of {model.label}",
            why="it is a second embedding, with a number of rows of its own",
            fix="merge models of this architecture that share one tokenizer",
        )
    return tuple(sorted(n for n in _outside(model) if _may_have_tokens(n) and model.tensors[n].shape[:1] == (rows,)))


def vocabulary_rows(model: Checkpoint) -> int | None:
    """The number of rows of a model's embedding; None for a model that has none.

    config.json's vocab_size where a matrix has as many rows, else the rows of the embedding, else of the head.
    """
    matrices = [
        name
        for name in _outside(model)
        if _may_have_tokens(name) and len(model.tensors[name].shape) == 2 and name.endswith("weight")
    ]
    sizes = {name: model.tensors[name].shape[0] for name in matrices}
    text = model.config.get("text_config")
    for config in (model.config, text if isinstance(text, dict) else {}):
        if config.get("vocab_size") in sizes.values():
            return int(config["vocab_size"])
    for role in ("embed", "lm_head"):
        of_role = [sizes[name] for name in matrices if role_outside(name) == role]
        if of_role:
            return max(of_role)
    return None


def _outside(model: Checkpoint) -> list[str]:
    stack = stack_of(model.tensors)
    return [name for name in model.tensors if stack.split(name) is None]


def _may_have_tokens(name: str) -> bool:
    if _NO_TOKENS.search(name):
        return False
    return role_outside(name) in ("embed", "lm_head") or _HEADS.search(name) is not None
