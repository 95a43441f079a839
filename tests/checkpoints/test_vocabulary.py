"""The tokens of a model, whatever files say them; which tensors have a row for each; and tokenizers with tokens added."""

from __future__ import annotations

import json
import shlex
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.vocabulary.extended import extended_files, union_ids
from sensmerge.checkpoints.vocabulary.sentencepiece import pieces
from sensmerge.checkpoints.vocabulary.tensors import vocabulary_rows, vocabulary_tensors
from sensmerge.checkpoints.vocabulary.token_map import TokenMap, token_map
from sensmerge.errors import IncompatibleModelsError, InputFileError
from tests.builders import byte_tokenizer, write_checkpoint

TOKENS = {"<s>": 0, "a": 1, "b": 2}


def folder(path: Path, files: Mapping[str, object]) -> Path:
    """A folder with these files: bytes and text as they are, anything else as JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else None
        text = content if isinstance(content, str) else json.dumps(content) if data is None else ""
        (path / name).write_bytes(text.encode() if data is None else data)
    return path


def tokenizer(vocab: object, added: Sequence[Mapping[str, Any]] = (), **other: object) -> dict[str, object]:
    """A tokenizer.json."""
    return {"added_tokens": list(added), "model": {"vocab": vocab}, **other}


def sentencepiece(entries: Sequence[tuple[str, float, int]]) -> bytes:
    """A sentencepiece model, from protobuf's definition: its pieces, and a trainer's settings that mean nothing here."""

    def field(number: int, data: bytes) -> bytes:
        size, length = len(data), b""
        while size >= 128:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    made = b""
    for text, score, kind in entries:
        piece = field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score)
        made += field(1, piece + (bytes([3 << 3, kind]) if kind != 1 else b""))
    return made + field(2, b"\x08\x01" + field(4, b"x" * 300))


PIECES = sentencepiece([("<s>", 0.0, 3), ("a", -1.5, 1), ("b", -2.0, 1)])

FORMS: dict[str, dict[str, object]] = {
    "tokenizer.json": {"tokenizer.json": tokenizer(TOKENS)},
    "unigram": {"tokenizer.json": tokenizer([["<s>", 0.0], ["a", -1.0], ["b", -2.0]])},
    "added": {"tokenizer.json": tokenizer({"a": 1, "b": 2}, [{"id": 0, "content": "<s>", "special": True}])},
    "vocab.json": {"vocab.json": TOKENS, "merges.txt": "a b\n"},
    "added_tokens.json": {"vocab.json": {"a": 1, "b": 2}, "added_tokens.json": {"<s>": 0}},
    "vocab.txt": {"vocab.txt": "<s>\na\nb\n"},
    "sentencepiece": {"tokenizer.model": PIECES},
    "pieces and added": {
        "tokenizer.model": sentencepiece([("<s>", 0.0, 3), ("a", -1.0, 1)]),
        "added_tokens.json": {"b": 2},
    },
    "decoder": {
        "tokenizer.json": tokenizer({"<s>": 0, "a": 1}),
        "tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "b", "special": False}}},
    },
    # What the vocabulary itself says stands above what is said beside it.
    "contradicted": {
        "tokenizer.json": tokenizer(TOKENS),
        "added_tokens.json": {"b": 7, "c": 2},
        "tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "<pad>"}}},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_one_vocabulary(tmp_path: Path, form: str) -> None:
    found = token_map(folder(tmp_path, FORMS[form]))
    assert found is not None
    assert found.ids == TOKENS


def test_only_line_feeds_end_a_line_of_a_vocabulary(tmp_path: Path) -> None:
    found = token_map(folder(tmp_path, {"vocab.txt": "a\n\u2028\n\x85\nb"}))
    assert found is not None
    assert found.ids == {"a": 0, "\u2028": 1, "\x85": 2, "b": 3}


def test_flags_and_scores_of_tokens(tmp_path: Path) -> None:
    found = token_map(folder(tmp_path, FORMS["sentencepiece"] | {"added_tokens.json": {"<pad>": 3, "x": 4}}))
    assert found is not None
    assert {token: flags["special"] for token, flags in found.added.items()} == {
        "<s>": True, "<pad>": False, "x": False,
    }  # fmt: skip
    assert found.scores == {"<s>": 0.0, "a": -1.5, "b": -2.0}
    named = {"added_tokens.json": {"<pad>": 3}, "tokenizer_config.json": {"pad_token": "<pad>"}}
    found = token_map(folder(tmp_path, named))
    assert found is not None
    assert found.added["<pad>"]["special"] is True


def test_a_folder_without_a_vocabulary(tmp_path: Path) -> None:
    assert token_map(folder(tmp_path, {"tokenizer_config.json": {}, "added_tokens.json": {"a": 1}})) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer.json", {}), ("tokenizer.json", {"model": {}}),
        ("tokenizer.json", tokenizer(3)), ("tokenizer.json", tokenizer({"a": "1"})), ("tokenizer.json", tokenizer([1, 2])),
        ("tokenizer.json", tokenizer(TOKENS, [{"id": 3}])), ("tokenizer.json", tokenizer([[["a"], 0]])),
        ("tokenizer.json", tokenizer({"a": -1})), ("tokenizer.json", tokenizer({"a": True})),
        ("tokenizer.json", tokenizer(TOKENS, [{"id": 3, "content": 7}])), ("tokenizer.json", tokenizer([["a", 0], [3, 0]])),
        ("vocab.json", "{"), ("vocab.json", ["a"]), ("vocab.json", {"a": None}), ("vocab.txt", b"\xff"),
        ("tokenizer.model", b""), ("tokenizer.model", b"not a model"), ("tokenizer.model", PIECES[:10]),
        ("tokenizer.model", b"\x0a\x02\x0a"), ("tokenizer.model", b"\xff" * 20), ("tokenizer.model", b"\x0a\x00"),
        ("tokenizer.model", b"\x0a\x03\x0a\x01\xff"),
    ],
)  # fmt: skip
def test_damaged_files_are_told(tmp_path: Path, name: str, content: object) -> None:
    with pytest.raises(InputFileError) as caught:
        token_map(folder(tmp_path, {name: content}))
    assert str(tmp_path / name) in caught.value.where


@pytest.mark.parametrize(("place", "token"), [("-1", "x"), ("9", 5), (str(1 << 40), "x"), ("x", "x")])
def test_added_tokens_whose_ids_are_none(tmp_path: Path, place: str, token: object) -> None:
    """A row before the first one would be read from another tensor, or from the header."""
    beside = {"tokenizer_config.json": {"added_tokens_decoder": {place: {"content": token}}}}
    with pytest.raises(InputFileError) as caught:
        token_map(folder(tmp_path, {"tokenizer.json": tokenizer(TOKENS), **beside}))
    assert "tokenizer_config.json" in caught.value.where


def test_a_sentencepiece_model_cut_anywhere_is_an_error_or_shorter() -> None:
    """Never another failure, and never other pieces."""
    whole = pieces(PIECES)
    for end in range(len(PIECES)):
        try:
            assert pieces(PIECES[:end]) == whole[: len(pieces(PIECES[:end]))]
        except ValueError:
            continue


# ----------------------------------------------------------------------------------------------------------- tensors


def model(path: Path, shapes: Mapping[str, tuple[int, ...]], **config: object) -> ModelFolder:
    """A checkpoint of zeros with these tensors and two blocks."""
    blocks = {f"model.layers.{n}.mlp.weight": (10, 4) for n in range(2)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in (shapes | blocks).items()}
    return ModelFolder(write_checkpoint(path, tensors, config), path.name)


def test_tensors_with_a_row_for_each_token(tmp_path: Path) -> None:
    """Ten tokens, and ten of other things beside them."""
    bert = {
        "bert.embeddings.word_embeddings.weight": (10, 4), "bert.embeddings.position_embeddings.weight": (10, 4),
        "bert.embeddings.token_type_embeddings.weight": (10, 4), "bert.embeddings.LayerNorm.weight": (10,),
        "cls.predictions.bias": (10,), "cls.predictions.decoder.weight": (10, 4), "cls.predictions.decoder.bias": (10,),
        "cls.predictions.transform.dense.weight": (10, 10), "bert.pooler.dense.weight": (10, 10),
    }  # fmt: skip
    assert vocabulary_tensors(model(tmp_path / "bert", bert, vocab_size=10)) == (
        "bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.bias",
        "cls.predictions.decoder.weight",
    )  # fmt: skip
    gpt = {"wte.weight": (10, 4), "wpe.weight": (10, 4), "ln_f.weight": (10,), "lm_head.bias": (10,)}
    assert vocabulary_tensors(model(tmp_path / "gpt", gpt)) == ("lm_head.bias", "wte.weight")
    llama = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (10,), "lm_head.weight": (10, 4)}
    assert vocabulary_tensors(model(tmp_path / "llama", llama)) == ("lm_head.weight", "model.embed_tokens.weight")
    opt = {"model.decoder.embed_tokens.weight": (10, 4), "model.decoder.embed_positions.weight": (20, 4)}
    assert vocabulary_tensors(model(tmp_path / "opt", opt)) == ("model.decoder.embed_tokens.weight",)
    assert vocabulary_tensors(model(tmp_path / "none", {"other.weight": (10, 4)})) == ()
    second = llama | {"model.embed_tokens_per_layer.weight": (8, 4)}
    with pytest.raises(IncompatibleModelsError, match="cannot be aligned"):
        vocabulary_tensors(model(tmp_path / "second", second))


def test_rows_are_those_of_the_matrix_that_the_config_speaks_of(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (12, 4), "lm_head.weight": (10, 4)}
    assert vocabulary_rows(model(tmp_path / "a", shapes, vocab_size=10)) == 10
    assert vocabulary_rows(model(tmp_path / "b", shapes, vocab_size=11)) == 12
    assert vocabulary_rows(model(tmp_path / "c", shapes, text_config={"vocab_size": 10})) == 10
    assert vocabulary_rows(model(tmp_path / "d", {"lm_head.weight": (10, 4)})) == 10


# ---------------------------------------------------------------------------------------------------------- extended


def written(path: Path, made: Tokenizer, files: Mapping[str, object] | None = None) -> TokenMap:
    """A tokenizer in a folder, and its tokens."""
    folder(path, files or {})
    made.save(str(path / "tokenizer.json"))
    found = token_map(path)
    assert found is not None
    return found


KINDS: dict[str, Any] = {
    "BPE": models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
    "WordPiece": models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}),
    "WordLevel": models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"),
    "Unigram": models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_any_kind_takes_more_tokens(tmp_path: Path, kind: str) -> None:
    """Added ones and entries of the vocabulary itself, beside one that was added before: ids, flags, and old texts stay."""
    made = Tokenizer(KINDS[kind])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_tokens(["<old>"])
    ours = written(
        tmp_path / "donor", made, {"tokenizer_config.json": {"added_tokens_decoder": {"3": {"content": "<old>"}}}}
    )
    other = Tokenizer(models.Unigram([("<unk>", 0.0), ("zz", -3.0), ("a", -1.0)], 0))
    other.add_special_tokens(["<new>"])
    theirs = written(tmp_path / "other", other)
    ids = union_ids(ours, [theirs], ["<asked>"])
    first = {"BPE": ["<unk>", "zz", "<new>", "<asked>"], "Unigram": ["zz", "<new>", "<asked>"]}
    order = first.get(kind, ["<unk>", "zz", "<new>", "<asked>"])
    assert ids == {**ours.ids, **{token: 4 + place for place, token in enumerate(order)}}
    files = extended_files(tmp_path / "donor", "donor", ids, [ours, theirs], ["<asked>"])
    loaded = Tokenizer.from_str(files["tokenizer.json"])
    assert loaded.get_vocab(with_added_tokens=True) == ids
    for text in ("ab <old> a", "b a"):
        assert loaded.encode(text).ids == made.encode(text).ids
    assert loaded.encode("<new><asked>").ids == [ids["<new>"], ids["<asked>"]]
    flags = {place: token.special for place, token in loaded.get_added_tokens_decoder().items()}
    assert (flags[ids["<new>"]], flags[ids["<asked>"]], flags[3]) == (True, False, False)
    decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {entry["content"]: int(place) for place, entry in decoder.items()} == {
        token: ids[token] for token in ("<old>", "<new>", "<asked>")
    }
    if kind == "Unigram":
        assert dict(json.loads(files["tokenizer.json"])["model"]["vocab"])["zz"] == -3.0


def test_ids_that_the_library_would_not_give_are_refused(tmp_path: Path) -> None:
    """A vocabulary with a gap: the library numbers what is added from the number of entries on."""
    ours = written(tmp_path, Tokenizer(models.BPE({"a": 0, "b": 5}, [])))
    with pytest.raises(IncompatibleModelsError, match="cannot be added") as caught:
        extended_files(tmp_path, "donor", union_ids(ours, [], ["<asked>"]), [ours], ["<asked>"])
    assert "'<asked>'" in caught.value.why


def test_without_a_tokenizer_json_the_command_that_writes_one_is_told(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    vocabulary = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())["model"]["vocab"]
    files = {"vocab.json": vocabulary, "merges.txt": "#version: 0.2\n", "config.json": {"model_type": "gpt2"}}
    ours = token_map(folder(tmp_path / "it's bare", files))
    assert ours is not None
    with pytest.raises(IncompatibleModelsError) as caught:
        extended_files(tmp_path / "it's bare", "bare", union_ids(ours, [], ["<asked>"]), [ours], ["<asked>"])
    _, _, command = caught.value.fix.partition(": python ")
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    ours = token_map(tmp_path / "it's bare")
    assert ours is not None
    extended_files(tmp_path / "it's bare", "bare", union_ids(ours, [], ["<asked>"]), [ours], ["<asked>"])
