"""One vocabulary: the same ids for the same tokens pass, whatever the files; anything else is told with the first tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.vocabulary import check_same_chat_template, check_same_vocabulary, token_ids
from sensmerge.errors import IncompatibleModelsError, InputFileError
from tests.builders import byte_tokenizer, write_checkpoint

TOKENS = {"<s>": 0, "a": 1, "b": 2}


def folder(path: Path, files: Mapping[str, object]) -> ModelFolder:
    """A model folder with these files: text as it is, anything else as JSON."""
    write_checkpoint(path, {"x": np.zeros(2, np.float32)})
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return ModelFolder(path, path.name)


def tokenizer(vocab: object, added: Sequence[Mapping[str, Any]] = (), **other: object) -> dict[str, object]:
    """A tokenizer.json."""
    return {"added_tokens": list(added), "model": {"vocab": vocab}, **other}


FORMS: dict[str, dict[str, object]] = {
    "tokenizer.json": {"tokenizer.json": tokenizer(TOKENS)},
    "unigram": {"tokenizer.json": tokenizer([["<s>", 0.0], ["a", -1.0], ["b", -2.0]])},
    "added": {"tokenizer.json": tokenizer({"a": 1, "b": 2}, [{"id": 0, "content": "<s>", "special": True}])},
    "vocab.json": {"vocab.json": TOKENS, "merges.txt": "a b\n"},
    "added_tokens.json": {"vocab.json": {"a": 1, "b": 2}, "added_tokens.json": {"<s>": 0}},
    "vocab.txt": {"vocab.txt": "<s>\na\nb\n"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_one_vocabulary(tmp_path: Path, form: str) -> None:
    model = folder(tmp_path / "model", FORMS[form])
    assert token_ids(model.path) == TOKENS
    for name, files in FORMS.items():
        check_same_vocabulary([model, folder(tmp_path / name, files)])


def test_merges_normalizers_and_templates_are_not_vocabulary(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", {"tokenizer.json": tokenizer(TOKENS, normalizer=None), "tokenizer_config.json": {}})
    other = folder(
        tmp_path / "other",
        {"tokenizer.json": tokenizer(TOKENS, normalizer={"type": "NFC"}), "chat_template.jinja": "{{ x }}"},
    )
    check_same_vocabulary([one, other])


def test_the_first_tokens_that_differ_are_named(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", {"tokenizer.json": tokenizer({f"t{place}": place for place in range(100)})})
    moved = {f"t{place}": place + (place > 90) for place in range(100)}
    expert = folder(tmp_path / "expert", {"tokenizer.json": tokenizer(moved, [{"id": 91, "content": "<pad>"}])})
    with pytest.raises(IncompatibleModelsError) as caught:
        check_same_vocabulary([base, folder(tmp_path / "same", {"vocab.json": token_ids(base.path)}), expert])
    assert "10 token(s) differ" in caught.value.what
    assert "base and expert" in caught.value.where
    assert caught.value.why.startswith(
        "'<pad>' is missing in base, 91 in expert; 't91' is 91 in base, 92 in expert; 't92'"
    )
    assert "and 6 more" in caught.value.why
    assert caught.value.exit_code == 4


def test_a_token_more_is_another_vocabulary(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", {"vocab.json": TOKENS})
    other = folder(tmp_path / "other", {"vocab.json": TOKENS, "added_tokens.json": {"<pad>": 3}})
    with pytest.raises(IncompatibleModelsError, match="'<pad>' is missing in one, 3 in other"):
        check_same_vocabulary([one, other])


def test_sentencepiece_files_are_compared_as_they_are(tmp_path: Path) -> None:
    """Where both have nothing else; a model that has both kinds is compared with each of the others."""
    both = folder(tmp_path / "both", {"tokenizer.json": tokenizer(TOKENS), "tokenizer.model": "pieces"})
    pieces = folder(tmp_path / "pieces", {"tokenizer.model": "pieces"})
    unlike = folder(tmp_path / "unlike", {"tokenizer.model": "other pieces"})
    check_same_vocabulary([both, pieces])
    for first in (both, pieces):
        with pytest.raises(IncompatibleModelsError, match=r"tokenizer\.model"):
            check_same_vocabulary([first, unlike])


def test_models_without_a_tokenizer_are_not_compared(tmp_path: Path) -> None:
    """Those with one still are, though one without stands first."""
    none = folder(tmp_path / "none", {})
    one = folder(tmp_path / "one", {"vocab.json": TOKENS})
    check_same_vocabulary([none, one, folder(tmp_path / "again", {"vocab.json": TOKENS})])
    with pytest.raises(IncompatibleModelsError):
        check_same_vocabulary([none, one, folder(tmp_path / "other", {"vocab.json": {"a": 0}})])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer.json", {}), ("tokenizer.json", {"model": {}}),
        ("tokenizer.json", tokenizer(3)), ("tokenizer.json", tokenizer({"a": "1"})), ("tokenizer.json", tokenizer([1, 2])),
        ("tokenizer.json", tokenizer(TOKENS, [{"id": 3}])), ("tokenizer.json", tokenizer([[["a"], 0]])),
        ("vocab.json", "{"), ("vocab.json", ["a"]), ("vocab.json", {"a": None}),
    ],
)  # fmt: skip
def test_damaged_files_are_told(tmp_path: Path, name: str, content: object) -> None:
    models = [folder(tmp_path / "a", {name: content}), folder(tmp_path / "b", {"vocab.json": TOKENS})]
    with pytest.raises(InputFileError) as caught:
        check_same_vocabulary(models)
    assert str(tmp_path / "a" / name) in caught.value.where


def test_equal_files_are_not_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [folder(tmp_path / name, {"tokenizer.json": tokenizer(TOKENS)}) for name in "abc"]
    read = []
    monkeypatch.setattr("sensmerge.checkpoints.vocabulary.token_ids", lambda path: read.append(path) or TOKENS)
    check_same_vocabulary(models)
    assert read == [tmp_path / "a"]


def test_tokenizers_that_transformers_writes(tmp_path: Path) -> None:
    models = []
    for name, template in (("a", None), ("b", "{{ messages }}")):
        models.append(folder(tmp_path / name, {}))
        byte_tokenizer(chat_template=template).save_pretrained(tmp_path / name)
    check_same_vocabulary(models)
    check_same_chat_template(models, models[1])
    with pytest.raises(IncompatibleModelsError, match="unlike chat templates"):
        check_same_chat_template(models, models[0])


@pytest.mark.parametrize(
    "files", [{"chat_template.jinja": "{{ x }}\n"}, {"tokenizer_config.json": {"chat_template": " {{ x }}"}}]
)
def test_a_template_is_the_same_wherever_it_stands(tmp_path: Path, files: dict[str, object]) -> None:
    one = folder(tmp_path / "one", {"tokenizer_config.json": {"chat_template": "{{ x }}"}})
    check_same_chat_template([one, folder(tmp_path / "other", files)], one)
