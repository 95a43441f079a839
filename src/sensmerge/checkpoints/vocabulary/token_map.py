"""The tokens of a model and their ids, read from its tokenizer files.

Merges, normalizers and templates may differ between models: they change which ids a text becomes, not what an id means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InputFileError
from .sentencepiece import CONTROL, USER_DEFINED, Piece, pieces

# Vocabularies of formats whose ids are not read; they can only be compared as they are.
OPAQUE_FILES = ("spiece.model", "tekken.json")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenMap:
    """What the tokenizer files of a model say: each token's id.

    `added` are the tokens that are matched before a text is split, with their flags as in tokenizer.json; `scores` are those of
    the pieces of a Unigram or sentencepiece model.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


def damaged(path: Path, why: str) -> InputFileError:
    """The error for a tokenizer file that cannot be read."""
    return InputFileError("this tokenizer file cannot be read", where=str(path), why=why, fix="download the file again")


def read_json(path: Path) -> Any:
    """What a JSON file of a tokenizer holds. Raises InputFileError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error


def as_text(data: object) -> str:
    """A JSON file's text, as the libraries write it."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _ids(entries: object, path: Path) -> dict[str, int]:
    """A map of tokens to ids as JSON has it, checked."""
    if not isinstance(entries, dict) or not all(isinstance(t, str) and _is_id(place) for t, place in entries.items()):
        raise damaged(path, "it should map tokens to whole numbers")
    return entries


def _is_id(place: object) -> bool:
    return isinstance(place, int) and not isinstance(place, bool) and 0 <= place < 1 << 31


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
    special = bool(entry.get("special", False))
    return {flag: bool(entry.get(flag, flag == "normalized" and not special)) for flag in FLAGS} | {"special": special}


def _from_tokenizer_json(path: Path) -> TokenMap:
    data = read_json(path)
    try:
        listed = data["model"]["vocab"]
        # Unigram models list (token, score) in the order of their ids.
        tokens = {pair[0]: place for place, pair in enumerate(listed)} if isinstance(listed, list) else listed
        scores = {pair[0]: float(pair[1]) for pair in listed} if isinstance(listed, list) else {}
        entries = list(data.get("added_tokens") or ())
        added = {entry["content"]: entry["id"] for entry in entries}
        flags = {entry["content"]: _flags(entry) for entry in entries}
        return TokenMap(_ids({**_ids(tokens, path), **added}, path), flags, scores)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise damaged(path, f"it has no vocabulary: {error!r}") from error


def _from_sentencepiece(path: Path) -> TokenMap:
    try:
        found = pieces(path.read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    ids: dict[str, int] = {}
    for place, piece in enumerate(found):
        ids.setdefault(piece.text, place)
    added = {piece.text: _piece_flags(piece) for piece in found if piece.kind in (CONTROL, USER_DEFINED)}
    return TokenMap(ids, added, {piece.text: piece.score for piece in found})


def _piece_flags(piece: Piece) -> dict[str, bool]:
    return _flags({"special": piece.kind == CONTROL})


def _from_lines(path: Path) -> TokenMap:
    try:
        # Only line feeds end a line: a token may be another separator.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from error
    return TokenMap({line: place for place, line in enumerate(lines)})


def _from_vocab_json(path: Path) -> TokenMap:
    return TokenMap(_ids(read_json(path), path))


# In the order in which a tokenizer is read from them.
_READERS: Mapping[str, Callable[[Path], TokenMap]] = {
    "tokenizer.json": _from_tokenizer_json,
    "vocab.json": _from_vocab_json,
    "vocab.txt": _from_lines,
    "tokenizer.model": _from_sentencepiece,
}


def token_map(folder: Path) -> TokenMap | None:
    """The tokens of a model: tokenizer.json, else vocab.json, vocab.txt or a sentencepiece tokenizer.model; None without these.

    Tokens that only added_tokens.json or the `added_tokens_decoder` of tokenizer_config.json name are added. Raises InputFileError
    for a damaged file.
    """
    name = next((name for name in _READERS if (folder / name).is_file()), None)
    if name is None:
        return None
    found = _READERS[name](folder / name)
    ids, added = dict(found.ids), dict(found.added)
    taken = set(ids.values())
    for token, place, flags in _beside(folder):
        # What the vocabulary itself says of a token or an id stands above what is said beside it.
        if token not in ids and place not in taken:
            ids[token] = place
            taken.add(place)
        if ids.get(token) == place:
            added.setdefault(token, flags)
    return TokenMap(ids, added, found.scores)


def _beside(folder: Path) -> list[tuple[str, int, dict[str, bool]]]:
    """The tokens that stand beside a vocabulary, with their ids and flags."""
    found: list[tuple[str, int, dict[str, bool]]] = []
    config = folder / "tokenizer_config.json"
    data = read_json(config) if config.is_file() else {}
    if not isinstance(data, dict):
        raise damaged(config, "it is not a JSON object")
    decoder = data.get("added_tokens_decoder")
    for place, entry in decoder.items() if isinstance(decoder, dict) else ():
        try:
            token, number = entry["content"], int(place)
            if not isinstance(token, str) or not _is_id(number):
                raise ValueError(f"{token!r} cannot have the id {place!r}")
            found.append((token, number, _flags(entry)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(config, f"added_tokens_decoder cannot be read: {error!r}") from error
    file = folder / "added_tokens.json"
    if file.is_file():
        named = {value for key, value in data.items() if key.endswith("_token") and isinstance(value, str)}
        entries = _ids(read_json(file), file)
        found += [(token, place, _flags({"special": token in named})) for token, place in entries.items()]
    return found


def vocabulary_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of each file that says what the ids of a model mean: equal ones need not be read twice."""
    names = (*_READERS, "added_tokens.json", "tokenizer_config.json", *OPAQUE_FILES)
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if (folder / name).is_file()
    }


def differences(ours: Mapping[str, int], theirs: Mapping[str, int], one: str, other: str) -> list[str]:
    """Every token whose id differs between two models, by id, in words."""

    def told(place: int | None, model: str) -> str:
        return f"missing in {model}" if place is None else f"{place} in {model}"

    unlike = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    unlike.sort(key=lambda token: (min(ids.get(token, 1 << 62) for ids in (ours, theirs)), token))
    return [f"{token!r} is {told(ours.get(token), one)}, {told(theirs.get(token), other)}" for token in unlike]
