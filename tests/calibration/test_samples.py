"""From a calibration file to token ids and loss masks: every kind of row, every fault by line."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensmerge.calibration.samples import Sample, adds_bos, draw, encode_samples, read_samples
from sensmerge.errors import CalibrationDataError
from sensmerge.records import CalibrationSet, SensSettings
from tests.builders import BOS, CHAT_TEMPLATE, EOS, SPECIAL, byte_ids, byte_tokenizer, write_jsonl

B, E = SPECIAL.index(BOS), SPECIAL.index(EOS)
SETTINGS = SensSettings()


def read(folder: Path, rows: list[object], fields: dict[str, str] | None = None) -> list[Sample]:
    return read_samples(write_jsonl(folder / "data.jsonl", rows), fields)


def refused(folder: Path, content: str | bytes, name: str = "data.jsonl") -> CalibrationDataError:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationDataError) as caught:
        read_samples(path)
    assert caught.value.exit_code == 5
    assert str(path) in caught.value.where
    return caught.value


# ------------------------------------------------------------------------------------------------------------- read


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2+2=", "response": " 4"}, {"prompt": "2+2=", "response": " 4"}),
        ({"prompt": "", "response": "x"}, {"prompt": "", "response": "x"}),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, {"prompt": "Add.\n\n2 2", "response": "4"}),
        ({"instruction": "Add.", "input": "", "output": "4"}, {"prompt": "Add.", "response": "4"}),
        ({"instruction": "Add.", "input": None, "output": "4"}, {"prompt": "Add.", "response": "4"}),
        ({"instruction": "Add.", "output": "4"}, {"prompt": "Add.", "response": "4"}),
        ({"text": "hello"}, {"text": "hello"}),
        ({"text": "hello", "id": 7, "meta": {}}, {"text": "hello"}),
        ({"messages": MESSAGES}, {"messages": tuple(MESSAGES)}),
        ({"prompt": None, "response": None, "text": "t"}, {"text": "t"}),
    ],
)
def test_every_kind_of_row(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    """instruction (+ two newlines + input) is the prompt; other columns do no harm."""
    assert read(tmp_path, [row]) == [Sample(0, 1, **expected)]


def test_fields_map_our_names_to_the_file_s(tmp_path: Path) -> None:
    rows: list[object] = [{"question": "q", "answer": "a", "id": 1}]
    assert read(tmp_path, rows, {"prompt": "question", "response": "answer"}) == [
        Sample(0, 1, prompt="q", response="a")
    ]
    assert read(tmp_path, [{"body": "t"}], {"text": "body"}) == [Sample(0, 1, text="t")]
    alpaca: list[object] = [{"task": "i", "context": "c", "gold": "o"}]
    mapped = {"instruction": "task", "input": "context", "output": "gold"}
    assert read(tmp_path, alpaca, mapped) == [Sample(0, 1, prompt="i\n\nc", response="o")]


@pytest.mark.parametrize(
    "extra",
    [{"messages": MESSAGES}, {"instruction": "x"}, {"instruction": "x", "output": "y"}, {"text": "x"}],
    ids=["messages", "instruction", "instruction and output", "text"],
)  # fmt: skip
def test_named_fields_win_over_other_columns(tmp_path: Path, extra: dict[str, Any]) -> None:
    """Who writes `prompt: question, response: answer` means these two columns, whatever else the file has."""
    rows: list[object] = [{"question": "q", "answer": "a"} | extra]
    assert read(tmp_path, rows, {"prompt": "question", "response": "answer"}) == [
        Sample(0, 1, prompt="q", response="a")
    ]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("last", [True, False])
def test_files_as_they_come(tmp_path: Path, bom: bytes, newline: bytes, packed: bool, last: bool) -> None:
    """A byte-order mark, CRLF, gzip, blank lines, no newline at the end: row counts samples, line counts lines."""
    lines = [b'{"text": "one"}', b"", b"  \t", b'{"text": "two"}', b"", b'{"text": "three"}']
    content = bom + newline.join(lines) + (newline if last else b"")
    path = tmp_path / ("data.jsonl.gz" if packed else "data.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_samples(path) == [Sample(0, 1, text="one"), Sample(1, 4, text="two"), Sample(2, 6, text="three")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_characters_that_only_python_takes_for_line_ends(tmp_path: Path, separator: str) -> None:
    """They stand in JSON strings of real data, raw (those above U+001F) or escaped."""
    raw = separator if separator >= " " else f"\\u{ord(separator):04x}"
    (tmp_path / "d.jsonl").write_text(f'{{"text": "a{raw}b"}}\n{{"text": "c"}}\n', encoding="utf-8")
    assert [s.text for s in read_samples(tmp_path / "d.jsonl")] == [f"a{separator}b", "c"]


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("content", ["", "\n\n", "  \n\t\n", "\ufeff"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    assert "no samples" in refused(tmp_path, content).what


@pytest.mark.parametrize("line", [1, 2, 5, 40])
def test_broken_json_is_told_by_line_and_column(tmp_path: Path, line: int) -> None:
    lines = ['{"text": "x"}'] * 50
    lines[line - 1] = '{"text": "x",}'
    error = refused(tmp_path, "\n".join(lines))
    assert f"line {line}: not JSON at column" in error.why
    column = int(error.why.partition("column ")[2].partition(":")[0])
    assert 12 <= column <= 14
    assert error.where.endswith(f"data.jsonl:{line}:{column}")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "found list"), ("text", "found str"), (3, "found int"), (None, "found NoneType"), ({}, "no prompt"),
        ({"prompt": "q"}, "no prompt and response"), ({"response": "a"}, "no prompt and response"),
        ({"prompt": 1, "response": "a"}, "must be text"), ({"prompt": "q", "response": ["a"]}, "must be text"),
        ({"prompt": "q", "response": 4}, "must be text"), ({"text": 3}, "no text"), ({"text": ["x"]}, "no text"),
        ({"instruction": "i"}, "no instruction and output"), ({"instruction": 1, "output": "o"}, "must be text"),
        ({"instruction": 1, "input": "x", "output": "o"}, "must be text"),
        ({"instruction": ["i"], "input": "x", "output": "o"}, "must be text"),
        ({"instruction": "i", "input": 5, "output": "o"}, "`input` must be text"), ({"messages": "x"}, "`messages`"),
        ({"messages": []}, "assistant"), ({"messages": [{"role": "user", "content": "q"}]}, "assistant"),
        ({"messages": [{"content": "q"}]}, "role"), ({"messages": [{"role": "assistant"}]}, "content"),
        ({"messages": [{"role": 1, "content": "q"}]}, "role"), ({"messages": ["x"]}, "role"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_sample_is_told_why(tmp_path: Path, row: object, words: str) -> None:
    error = refused(tmp_path, '{"text": "fine"}\n' + json.dumps(row) + "\n")
    assert error.where.endswith(":2")
    assert words in error.why


def test_the_first_five_faults_are_told_and_all_are_counted(tmp_path: Path) -> None:
    rows = ['{"text": "x"}', "{", "[]", '{"text": 1}', "nope", '{"text": "y"}', "{}", "7", "8"]
    error = refused(tmp_path, "\n".join(rows))
    assert error.what.startswith("7 row(s)")
    assert [f"line {n}:" in error.why for n in range(1, 10)] == [
        False,
        True,
        True,
        True,
        True,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"text": "\\ud83d"}', '{"prompt": "a", "response": "\\udc00b"}'],
    ids=["deep", "long number", "half a pair", "half a pair in a response"],
)
def test_hostile_lines_are_faults_like_any_other(tmp_path: Path, line: str) -> None:
    """Scraped data has halves of surrogate pairs, which no tokenizer takes: told by line, before a model is loaded."""
    error = refused(tmp_path, '{"text": "fine"}\n' + line)
    assert error.where.endswith(":2")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    error = refused(tmp_path, b'{"text": "ok"}\n{"text": "\xff"}\n')
    assert error.where.endswith(":2")
    assert "UTF-8" in error.what


PACKED = gzip.compress(b'{"text": "hello hello hello"}\n' * 50)


@pytest.mark.parametrize(
    "content",
    [b"not gzip", b"", PACKED[:-10], PACKED[:10] + b"\xff" + PACKED[11:], PACKED[:-8] + b"\0" * 8],
    ids=["not gzip", "empty", "cut", "damaged inside", "wrong checksum"],
)
def test_a_damaged_gzip_file(tmp_path: Path, content: bytes) -> None:
    """Never a traceback of zlib's."""
    refused(tmp_path, content, "data.jsonl.gz")


def test_the_damaged_file_above_is_damaged() -> None:
    with pytest.raises(zlib.error):
        gzip.decompress(PACKED[:10] + b"\xff" + PACKED[11:])


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "no.jsonl", tmp_path):
        with pytest.raises(CalibrationDataError) as caught:
            read_samples(path)
        assert caught.value.where == str(path)


# ------------------------------------------------------------------------------------------------------------- draw


@pytest.mark.parametrize("count", [5, 6, 100])
def test_a_file_with_no_more_rows_is_used_whole_in_order(count: int) -> None:
    samples = [Sample(n, n + 1, text=str(n)) for n in range(5)]
    assert draw(samples, count, 0) == samples


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize("count", [1, 7, 49])
def test_a_draw_is_seeded_sorted_and_without_replacement(seed: int, count: int) -> None:
    """The first of one shuffled order, put back into that of the file: the same rows on every machine."""
    samples = [Sample(n, 2 * n + 1, text=str(n)) for n in range(50)]
    drawn = draw(samples, count, seed)
    order = list(range(50))
    random.Random(seed).shuffle(order)
    assert drawn == [samples[row] for row in sorted(order[:count])]
    assert drawn == draw(samples, count, seed)
    assert len(set(drawn)) == count
    assert all(sample.line == 2 * sample.row + 1 for sample in drawn), "a row keeps its place"


@pytest.mark.parametrize("seed", range(5))
def test_more_samples_are_the_fewer_and_others(seed: int) -> None:
    """So that what was measured is not measured again."""
    samples = [Sample(n, n + 1, text=str(n)) for n in range(60)]
    draws = [draw(samples, count, seed) for count in (1, 16, 24, 59, 60, 61)]
    for few, many in itertools.pairwise(draws):
        assert set(few) <= set(many)


def test_another_seed_draws_other_rows() -> None:
    samples = [Sample(n, n + 1, text=str(n)) for n in range(1000)]
    assert draw(samples, 20, 0) != draw(samples, 20, 1)


# ----------------------------------------------------------------------------------------------------------- encode


def encode(tokenizer: Any, *samples: Sample, **settings: Any) -> CalibrationSet:
    return encode_samples(tokenizer, samples, replace(SETTINGS, **settings), Path("data.jsonl"))


PAIR = Sample(3, 5, prompt="ab", response="cd")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_a_pair_is_bos_prompt_response_eos(bos: bool, adds: bool, eos: bool) -> None:
    """bos only if the tokenizer itself adds it, eos if it has one; loss on response and eos."""
    tokenizer = byte_tokenizer(bos=bos, adds_bos=adds, eos=eos)
    assert adds_bos(tokenizer) is (bos and adds)
    encoded = encode(tokenizer, PAIR)
    head, tail = [B] * (bos and adds), [E] * eos
    assert encoded.token_ids == ((*head, *byte_ids("ab"), *byte_ids("cd"), *tail),)
    assert encoded.loss_mask == (tuple([0] * (len(head) + 2) + [1] * (2 + len(tail))),)
    assert (encoded.rows, encoded.truncated, encoded.loss) == ((3,), 0, "response")
    assert encoded.loss_tokens == 2 + len(tail)


def test_bos_is_decided_without_special_tokens_in_the_middle() -> None:
    """Prompt and response are encoded apart, without special tokens."""
    encoded = encode(byte_tokenizer(), Sample(0, 1, prompt="", response="x"))
    assert encoded.token_ids == ((B, *byte_ids("x"), E),)
    assert encoded.loss_mask == ((0, 1, 1),)


def test_an_empty_prompt_without_bos_has_no_loss_on_the_first_token() -> None:
    """Nothing predicts token 0."""
    encoded = encode(byte_tokenizer(adds_bos=False), Sample(0, 1, prompt="", response="xy"))
    assert encoded.loss_mask == ((0, 1, 1),)


@pytest.mark.parametrize("bos", [True, False])
def test_text_is_the_tokenizer_s_own_encoding(bos: bool) -> None:
    """`tokenizer(text)`, every token but the first counts, whatever `loss` says."""
    tokenizer = byte_tokenizer(adds_bos=bos)
    for loss in ("response", "all"):
        encoded = encode(tokenizer, Sample(0, 1, text="héy"), loss=loss)
        assert encoded.token_ids == (tuple(tokenizer("héy")["input_ids"]),)
        assert encoded.loss_mask == ((0, *[1] * (len(encoded.token_ids[0]) - 1)),)


def test_loss_all_counts_the_prompt_too() -> None:
    encoded = encode(byte_tokenizer(), PAIR, loss="all")
    assert encoded.loss_mask == ((0, 1, 1, 1, 1, 1),)
    assert encoded.loss == "all"


LONG = Sample(0, 1, prompt="abcdef", response="uvwxyz")


@pytest.mark.parametrize("length", range(2, 18))
def test_truncation_takes_the_prompt_s_left_first_then_the_response_s_right(length: int) -> None:
    """Against the rule written out; bos stays, eos goes with the response's end."""
    encoded = encode(byte_tokenizer(), LONG, max_length=length)
    prompt, response = list("abcdef"), [*"uvwxyz", "eos"]
    while 1 + len(prompt) + len(response) > length:
        if prompt:
            prompt.pop(0)
        else:
            response.pop()
    ids = [B, *byte_ids("".join(prompt)), *(E if part == "eos" else byte_ids(part)[0] for part in response)]
    assert encoded.token_ids == (tuple(ids),)
    assert encoded.loss_mask == (tuple([0] * (1 + len(prompt)) + [1] * len(response)),)
    assert encoded.truncated == int(length < 14)


@pytest.mark.parametrize("length", range(2, 9))
def test_a_long_text_is_cut_on_the_right(length: int) -> None:
    encoded = encode(byte_tokenizer(), Sample(0, 1, text="abcdef"), max_length=length)
    assert encoded.token_ids == (tuple([B, *byte_ids("abcdef")][:length]),)
    assert encoded.truncated == int(length < 7)


def test_truncated_counts_samples() -> None:
    encoded = encode(byte_tokenizer(), PAIR, LONG, LONG, max_length=8)
    assert encoded.truncated == 2
    assert [len(ids) for ids in encoded.token_ids] == [6, 8, 8]


def chat(messages: list[dict[str, str]]) -> str:
    """The builders' chat template, written out."""
    return "".join(f"[{m['role']}]{m['content']}\n" for m in messages)


@pytest.mark.parametrize("template", ["none", "chat"])
def test_messages_go_through_the_chat_template(template: str) -> None:
    """The last assistant turn is the response; the template alone puts special tokens, so no bos and eos of ours."""
    turns = [*MESSAGES, {"role": "user", "content": "r"}, {"role": "assistant", "content": "the end"}]
    encoded = encode(
        byte_tokenizer(chat_template=CHAT_TEMPLATE), Sample(0, 1, messages=tuple(turns)), template=template
    )
    prompt, whole = chat(turns[:-1]) + "[assistant]", chat(turns)
    assert encoded.token_ids == (tuple(byte_ids(whole)),)
    assert encoded.loss_mask == (tuple([0] * len(prompt) + [1] * (len(whole) - len(prompt))),)


def test_template_chat_makes_a_conversation_of_a_pair() -> None:
    encoded = encode(byte_tokenizer(chat_template=CHAT_TEMPLATE), PAIR, template="chat")
    assert encoded.token_ids == (tuple(byte_ids("[user]ab\n[assistant]cd\n")),)
    assert sum(encoded.loss_mask[0]) == len("cd\n")


def test_template_none_does_not_look_at_the_template() -> None:
    with_template = encode(byte_tokenizer(chat_template=CHAT_TEMPLATE), PAIR)
    assert with_template == encode(byte_tokenizer(), PAIR)


def test_template_chat_leaves_text_alone() -> None:
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    assert encode(tokenizer, Sample(0, 1, text="x"), template="chat") == encode(tokenizer, Sample(0, 1, text="x"))


CHAT_ROW = Sample(0, 4, messages=tuple(MESSAGES))


@pytest.mark.parametrize(
    ("template", "sample"),
    [
        (None, CHAT_ROW),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}", CHAT_ROW),
        ("{{ raise_exception('only user and assistant roles') }}", CHAT_ROW),
        ("{{ messages[0]['content'] }}", Sample(0, 4, messages=({"role": "assistant", "content": "hi"},))),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", CHAT_ROW),
        ("{% for m in messages %}{{ unclosed", CHAT_ROW),
    ],
    ids=[
        "no template",
        "prompt is no prefix",
        "the template refuses",
        "no turn before",
        "undefined",
        "broken template",
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_told_by_line(template: str | None, sample: Sample) -> None:
    """Many templates refuse a system turn or two turns of one role: that is the data's fault, not ours."""
    with pytest.raises(CalibrationDataError) as caught:
        encode(byte_tokenizer(chat_template=template), sample)
    assert caught.value.where == "data.jsonl:4"


def test_samples_with_nothing_to_predict_are_listed() -> None:
    tokenizer = byte_tokenizer(adds_bos=False, eos=False)
    empty = [Sample(n, n + 1, text="x") for n in range(1, 9)]
    with pytest.raises(CalibrationDataError) as caught:
        encode(tokenizer, PAIR, *empty)
    assert caught.value.what.startswith("8 of the samples")
    assert "line(s) 2, 3, 4, 5, 6 " in caught.value.why
    assert caught.value.where == "data.jsonl:2"


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_encoded_is_sound(seed: int) -> None:
    """Ids and masks of equal length, within max_length, token 0 never a loss token, at least one that is."""
    chance = random.Random(seed)
    alphabet = "ab é\n漢🙂"
    samples = [
        Sample(
            n,
            n + 1,
            prompt="".join(chance.choices(alphabet, k=chance.randrange(30))),
            response=chance.choice(alphabet) * 5,
        )
        for n in range(30)
    ]
    length = chance.randrange(2, 40)
    encoded = encode(byte_tokenizer(adds_bos=chance.random() < 0.5), *samples, max_length=length)
    for ids, mask in zip(encoded.token_ids, encoded.loss_mask, strict=True):
        assert len(ids) == len(mask) <= length
        assert mask[0] == 0
        assert any(mask)
        assert list(mask) == sorted(mask)
