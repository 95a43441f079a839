"""A tokenizer with tokens added to it: its files edited as text, and loaded once to see that each token has the planned id.

The tokens that it had keep their ids and its merges stay: a text becomes the same ids as before, but for tokens that are matched
before a text is split, and those that a vocabulary without merges (WordPiece, Unigram) now finds.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import IncompatibleModelsError
from .token_map import FLAGS, TokenMap, as_text, damaged, read_json

# What would say something else than the edited tokenizer.json.
STALE_FILES = frozenset(
    {"tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "spiece.model"}
)
# A token that was never asked for must not be chosen over others where a Unigram model has no score for it.
_UNLIKELY = 10.0


def union_ids(donor: TokenMap, others: Sequence[TokenMap], asked: Sequence[str] = ()) -> dict[str, int]:
    """The ids of `donor` as they are, then the tokens that only `others` have, in their order and by id, then those `asked` for."""
    ids = dict(donor.ids)
    following = max(ids.values(), default=-1) + 1
    listed = [token for other in others for token in sorted(other.ids, key=lambda token: (other.ids[token], token))]
    for token in [*listed, *asked]:
        if token not in ids:
            ids[token] = following
            following += 1
    return ids


def extended_files(
    folder: Path, label: str, ids: Mapping[str, int], owners: Sequence[TokenMap], asked: Sequence[str]
) -> dict[str, str]:
    """The files of the tokenizer in `folder` with more tokens: exactly `ids`, which keep those that it has.

    A token's kind, flags and score are those of the first of `owners` that has it; tokens that the recipe `asked` for are matched
    before a text is split. Raises IncompatibleModelsError where there is no tokenizer.json, or the result does not give these ids.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise IncompatibleModelsError(
            f"tokens cannot be added to the tokenizer of '{label}'",
            where=str(folder),
            why="it has no tokenizer.json, and other forms cannot be extended",
            fix='write one, then run this again: python -c "import sys; from transformers import AutoTokenizer as T; '
            f'd=sys.argv[1]; T.from_pretrained(d).save_pretrained(d)" {shlex.quote(str(folder))}',
        )
    data = read_json(file)
    flags = {token: _flags_of(token, owners, asked) for token in ids}
    text = as_text(_extended(data, file, ids, flags, owners))
    _check_loads(text, ids, label)
    files = {file.name: text}
    config = folder / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    if isinstance(settings.get("added_tokens_decoder"), dict):
        known = {entry["content"] for entry in settings["added_tokens_decoder"].values()}
        more = {str(ids[t]): {"content": t, **entry} for t, entry in flags.items() if entry and t not in known}
        decoder = dict(sorted({**settings["added_tokens_decoder"], **more}.items(), key=lambda pair: int(pair[0])))
        files[config.name] = as_text({**settings, "added_tokens_decoder": decoder})
    return files


def _flags_of(token: str, owners: Sequence[TokenMap], asked: Sequence[str]) -> Mapping[str, bool] | None:
    """The flags of a token that is matched before a text is split; None for one of the vocabulary's own."""
    owner = next((each for each in owners if token in each.ids), None)
    found = None if owner is None else owner.added.get(token)
    if found is None and token in asked:
        return {flag: flag == "normalized" for flag in FLAGS}
    return found


def _extended(
    data: dict[str, Any],
    file: Path,
    ids: Mapping[str, int],
    flags: Mapping[str, Mapping[str, bool] | None],
    owners: Sequence[TokenMap],
) -> dict[str, Any]:
    """tokenizer.json with all of `ids`."""
    vocabulary = data["model"]["vocab"]
    listed = {entry["content"] for entry in data.get("added_tokens") or ()}
    known = set(vocabulary) if isinstance(vocabulary, dict) else {pair[0] for pair in vocabulary}
    added = [
        {"id": ids[token], "content": token, **entry}
        for token, entry in flags.items()
        if entry is not None and token not in listed
    ]
    plain = [token for token, entry in flags.items() if entry is None and token not in known]
    # The library numbers added tokens from the vocabulary's size on unless the vocabulary has them: with more entries
    # there, those added before would move.
    inside = sorted((t for t in ids if t not in known), key=lambda token: ids[token]) if plain else []
    if isinstance(vocabulary, dict):
        vocabulary = {**vocabulary, **{token: ids[token] for token in inside}}
    elif inside:
        if [ids[token] for token in inside] != list(range(len(vocabulary), len(vocabulary) + len(inside))):
            raise damaged(file, "its ids have gaps, and a Unigram vocabulary cannot have any")
        least = min((float(pair[1]) for pair in vocabulary), default=0.0) - _UNLIKELY
        vocabulary = [*vocabulary, *([token, _score(token, owners, least)] for token in inside)]
    entries = sorted([*(data.get("added_tokens") or ()), *added], key=lambda entry: int(entry["id"]))
    return {**data, "added_tokens": entries, "model": {**data["model"], "vocab": vocabulary}}


def _score(token: str, owners: Sequence[TokenMap], least: float) -> float:
    return next((owner.scores[token] for owner in owners if token in owner.scores), least)


def _check_loads(text: str, ids: Mapping[str, int], label: str) -> None:
    """The edited tokenizer gives each token its planned id when the library loads it."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
        wrong = sorted(token for token in found.keys() | ids.keys() if found.get(token) != ids.get(token))
        why = f"{len(wrong)} token(s), {wrong[0]!r} first, would get other ids" if wrong else ""
    except Exception as error:  # the library raises bare exceptions
        why = str(error)
    if why:
        raise IncompatibleModelsError(
            f"tokens cannot be added to the tokenizer of '{label}'",
            where="tokenizer.json of the merged model",
            why=why,
            fix="keep one model's tokens: write `source: base` under `tokenizer:`, and no tokens that it lacks",
        )
