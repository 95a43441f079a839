"""Whether models share one vocabulary: the map of tokens to ids, read from their tokenizer files.

Merges, normalizers and templates may differ: they change which ids a text becomes, not what an id means to a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import IncompatibleModelsError, InputFileError
from .source import Checkpoint

SHOWN_TOKENS = 4


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> InputFileError:
    return InputFileError("this tokenizer file cannot be read", where=str(path), why=why, fix="download the file again")


def _ids(entries: object, path: Path) -> dict[str, int]:
    """A map of tokens to ids as JSON has it, checked."""
    if not isinstance(entries, dict) or not all(isinstance(place, int) for place in entries.values()):
        raise _damaged(path, "it should map tokens to whole numbers")
    return entries


def _from_tokenizer_json(path: Path) -> dict[str, int]:
    data = _read_json(path)
    try:
        listed = data["model"]["vocab"]
        # Unigram models list (token, score) in the order of their ids.
        tokens = {pair[0]: place for place, pair in enumerate(listed)} if isinstance(listed, list) else listed
        added = {entry["content"]: entry["id"] for entry in data.get("added_tokens") or ()}
        return _ids({**_ids(tokens, path), **added}, path)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, f"it has no vocabulary: {error!r}") from error


def token_ids(folder: Path) -> dict[str, int] | None:
    """The id of each token, from tokenizer.json, else vocab.json with added_tokens.json, else vocab.txt; None without these.

    Raises InputFileError for a damaged file.
    """
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file():
        tokens = _ids(_read_json(folder / "vocab.json"), folder / "vocab.json")
        added = folder / "added_tokens.json"
        return {**tokens, **_ids(_read_json(added), added)} if added.is_file() else tokens
    if (folder / "vocab.txt").is_file():
        try:
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _damaged(folder / "vocab.txt", str(error)) from error
        return {line: place for place, line in enumerate(lines)}
    return None


def _same_files(one: Path, other: Path) -> bool:
    """Whether two folders have the same vocabulary files, byte for byte: nothing has to be read as a vocabulary then."""
    names = ("tokenizer.json", "vocab.json", "added_tokens.json", "vocab.txt")
    return [_hash(one / name) for name in names] == [_hash(other / name) for name in names]


def _hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _differences(ours: Mapping[str, int], theirs: Mapping[str, int], one: str, other: str) -> list[str]:
    """Every token whose id differs, by id."""

    def told(place: int | None, model: str) -> str:
        return f"missing in {model}" if place is None else f"{place} in {model}"

    unlike = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    unlike.sort(key=lambda token: (min(ids.get(token, 1 << 62) for ids in (ours, theirs)), token))
    return [f"{token!r} is {told(ours.get(token), one)}, {told(theirs.get(token), other)}" for token in unlike]


def check_same_vocabulary(models: Sequence[Checkpoint]) -> None:
    """Every model gives its tokens the same ids; raises IncompatibleModelsError naming the first tokens that differ.

    Compared is the map of tokens to ids, or, where one of two models has none, the bytes of tokenizer.model. A model with
    neither is not compared, nor are two models that have no kind of file in common.
    """
    known: list[tuple[Checkpoint, dict[str, int] | None, str | None]] = []
    for model in models:
        sentencepiece = _hash(model.tokenizer_path / "tokenizer.model")
        same = next((entry for entry in known if _same_files(entry[0].tokenizer_path, model.tokenizer_path)), None)
        ids = token_ids(model.tokenizer_path) if same is None else same[1]
        for other, other_ids, other_pieces in known:
            if ids is not None and other_ids is not None:
                if ids is not other_ids and ids != other_ids:
                    faults = _differences(other_ids, ids, other.label, model.label)
                    more = f"; and {len(faults) - SHOWN_TOKENS} more" if len(faults) > SHOWN_TOKENS else ""
                    raise _unlike(other, model, "; ".join(faults[:SHOWN_TOKENS]) + more, len(faults))
                break
            if sentencepiece is not None and other_pieces is not None:
                if sentencepiece != other_pieces:
                    raise _unlike(other, model, "their tokenizer.model files differ", None)
                break
        known.append((model, ids, sentencepiece))


def _unlike(one: Checkpoint, other: Checkpoint, why: str, count: int | None) -> IncompatibleModelsError:
    tokens = "" if count is None else f": {count} token(s) differ"
    return IncompatibleModelsError(
        f"the tokenizers of these models differ{tokens}",
        where=f"{one.label} and {other.label}",
        why=why,
        fix="merge models that were fine-tuned from one base without new tokens",
    )


def _template(folder: Path) -> str | None:
    """The chat template of a model, without blanks around it; None if it has none."""
    if (folder / "chat_template.jinja").is_file():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise _damaged(folder / "chat_template.jinja", str(error)) from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            data = _read_json(folder / name)
            found = data.get("chat_template") if isinstance(data, dict) else None
            if found:
                return found.strip() if isinstance(found, str) else json.dumps(found, sort_keys=True)
    return None


def check_same_chat_template(models: Sequence[Checkpoint], donor: Checkpoint) -> None:
    """Every model that has a chat template has that of `donor`; raises IncompatibleModelsError for `chat_template: auto`."""
    ours = _template(donor.tokenizer_path)
    for model in models:
        theirs = _template(model.tokenizer_path)
        if theirs is not None and theirs != ours:
            raise IncompatibleModelsError(
                "`chat_template: auto` with models of unlike chat templates is not supported yet",
                where=f"{donor.label} and {model.label}",
                why=f"the merged model has the tokenizer files of {donor.label}, and {model.label} has another template",
                fix="remove `chat_template:`, or name the model to take it from: `tokenizer_source: MODEL`",
            )
