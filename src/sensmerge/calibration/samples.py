"""From a calibration file to token ids and loss masks.

Rows are {prompt, response} | {instruction, input, output} | {messages} | {text}, in the files that `rows` reads.
Every fault is named by file, line and column; nothing is skipped.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CalibrationDataError
from ..records import CalibrationSet, SensSettings
from .rows import Row, read_rows

FIELDS = ("prompt", "response", "instruction", "input", "output", "messages", "text")
SHOWN_FAULTS = 5


@dataclass(frozen=True)
class Sample:
    """One row before tokenisation: either `text`, or `messages`, or a prompt with its response; `place` is its file and line."""

    row: int
    line: int
    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    place: str = field(default="", compare=False)


def _from_messages(row: int, line: int, messages: Any) -> Sample | str:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    ):
        return "`messages` must be a list of {role, content}"
    if not messages or messages[-1]["role"] != "assistant":
        return "the last of `messages` must be the assistant's: it is the response"
    return Sample(row, line, messages=tuple(messages))


def _from_instruction(row: int, line: int, values: Mapping[str, Any]) -> Sample | str:
    for name in ("instruction", "input", "output"):
        if values[name] is not None and not isinstance(values[name], str):
            return f"`{name}` must be text"
    prompt = f"{values['instruction']}\n\n{values['input']}" if values["input"] else values["instruction"]
    return Sample(row, line, prompt=prompt, response=values["output"])


def _sample(row: int, line: int, entry: Any, fields: Mapping[str, str]) -> Sample | str:
    """The sample in one parsed row, or what is wrong with it; where `fields` are named, no other column is looked at."""
    if not isinstance(entry, dict):
        return f"a JSON object is needed, found {type(entry).__name__}"
    values = {name: entry.get(fields.get(name) if fields else name) for name in FIELDS}
    if values["messages"] is not None:
        return _from_messages(row, line, values["messages"])
    if values["instruction"] is not None and values["output"] is not None:
        return _from_instruction(row, line, values)
    prompt, response = values["prompt"], values["response"]
    if prompt is not None and response is not None:
        if not isinstance(prompt, str) or not isinstance(response, str):
            return "prompt and response must be text"
        return Sample(row, line, prompt=prompt, response=response)
    if isinstance(values["text"], str):
        return Sample(row, line, text=values["text"])
    return f"no prompt and response, no instruction and output, no messages and no text among {sorted(entry)}"


def read_samples(paths: Path | Sequence[Path], fields: Mapping[str, str] | None = None) -> list[Sample]:
    """All samples of a file, or of several that belong together, in order; `fields` maps our names to the files'.

    `row` counts the samples from 0 over all files, `line` a file's lines from 1 (blank lines are no samples; rows in Parquet).
    Raises CalibrationDataError.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    samples: list[Sample] = []
    faults: list[tuple[Path, Row, str]] = []
    for path in files:
        for row in read_rows(path, tuple((fields or {}).values())):
            place = f"{path}:{row.line}"
            found = row.fault or _sample(len(samples), row.line, row.entry, fields or {})
            if isinstance(found, str):
                faults.append((path, row, found))
            else:
                samples.append(replace(found, place=place))
    if faults:
        path, first, _ = faults[0]
        raise CalibrationDataError(
            f"{len(faults)} row(s) cannot be used as samples",
            where=f"{path}:{first.line}" + (f":{first.column}" if first.column else ""),
            why="; ".join(f"line {row.line}: {fault}" for _, row, fault in faults[:SHOWN_FAULTS]),
            fix="mend these lines, or name the fields: `data: {path: FILE, prompt: question, response: answer}`",
        )
    if not samples:
        raise CalibrationDataError(
            "this calibration file has no samples",
            where=", ".join(map(str, files)),
            why="it has no line with a JSON object",
            fix='put one sample a line, for example {"prompt": "2 + 2 =", "response": " 4"}',
        )
    return samples


def draw(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` samples drawn without replacement, in file order; all of them if there are no more.

    Draws are nested: the first `count` of one order that `random.Random(seed).shuffle` makes, so that more samples are the fewer
    and others.
    """
    if len(samples) <= count:
        return list(samples)
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    return [samples[row] for row in sorted(order[:count])]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its bos token in front of a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and full[: 1 + len(bare)] == [tokenizer.bos_token_id, *bare]


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str) -> tuple[list[int], list[int]]:
    """Token ids of the conversation without its last turn, and of all of it, by the tokenizer's chat template."""
    from jinja2 import TemplateError

    try:
        asked = tokenizer.apply_chat_template(list(messages[:-1]), add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(list(messages), return_dict=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise CalibrationDataError(
            "the chat template refuses this conversation",
            where=where,
            why=str(error) or type(error).__name__,
            fix="mend the row (templates often refuse system turns, or two turns of one side), or use `template: none`",
        ) from error
    return list(asked), list(whole)


def _split(tokenizer: Any, sample: Sample, template: str, where: str) -> tuple[list[int], list[int], list[int]]:
    """(head, prompt ids, response ids): what is always kept, what is cut from the left, what is cut from the right."""
    messages = sample.messages
    if messages is None and template == "chat":
        messages = ({"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.response})
    if messages is not None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise CalibrationDataError(
                "these samples need a chat template, and the expert's tokenizer has none",
                where=where,
                why="rows of `messages` and `template: chat` are rendered by the tokenizer's chat_template",
                fix="use {prompt, response} rows with `template: none`, or add a chat template to the tokenizer",
            )
        asked, whole = _rendered(tokenizer, messages, where)
        if whole[: len(asked)] != asked:
            raise CalibrationDataError(
                "the chat template does not keep the prompt apart from the response",
                where=where,
                why="the conversation with the response does not begin with the conversation without it",
                fix="use {prompt, response} rows with `template: none`",
            )
        return [], asked, whole[len(asked) :]
    head = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    prompt = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    response = tokenizer(sample.response, add_special_tokens=False)["input_ids"]
    tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return head, list(prompt), [*response, *tail]


def _encode(tokenizer: Any, sample: Sample, settings: SensSettings, where: str) -> tuple[list[int], list[int], bool]:
    """(token ids, loss mask, was it truncated) of one sample."""
    if sample.text is not None:
        ids = list(tokenizer(sample.text)["input_ids"])
        cut, first_loss = len(ids) > settings.max_length, 1
        ids = ids[: settings.max_length]
    else:
        head, prompt, response = _split(tokenizer, sample, settings.template, where)
        excess = len(head) + len(prompt) + len(response) - settings.max_length
        cut = excess > 0
        if cut:
            dropped = min(excess, len(prompt))
            prompt = prompt[dropped:]
            response = response[: len(response) - (excess - dropped)]
        ids = [*head, *prompt, *response]
        first_loss = 1 if settings.loss == "all" else max(1, len(head) + len(prompt))
    return ids, [int(position >= first_loss) for position in range(len(ids))], cut


def encode_samples(
    tokenizer: Any, samples: Sequence[Sample], settings: SensSettings, source: Path | str, rows: int | None = None
) -> CalibrationSet:
    """Token ids and loss masks of `samples` with the task's own tokenizer. Raises CalibrationDataError.

    text: `tokenizer(text)`. Pair: [bos] + enc(prompt) + enc(response) + [eos], enc without special tokens, bos only if the
    tokenizer itself adds it. Over `max_length` the prompt's left is cut first, then the right of the response with its eos.
    `loss: response` counts response and eos, `all` (and text) every token but the first. `source` names samples that know no
    file of their own; `rows` is how many the data has, where these are a draw from it.
    """
    ids, masks, truncated = [], [], 0
    empty: list[Sample] = []
    for sample in samples:
        tokens, mask, cut = _encode(tokenizer, sample, settings, _place(sample, source))
        ids.append(tuple(tokens))
        masks.append(tuple(mask))
        truncated += cut
        if not any(mask):
            empty.append(sample)
    if empty:
        raise CalibrationDataError(
            f"{len(empty)} of the samples have no token to predict",
            where=_place(empty[0], source),
            why=f"no loss token is left in line(s) {', '.join(str(sample.line) for sample in empty[:SHOWN_FAULTS])}"
            f" (loss: {settings.loss})",
            fix="remove the empty samples, or raise max_length",
        )
    dropped = 0 if rows is None else rows - len(samples)
    drawn = tuple(sample.row for sample in samples)
    return CalibrationSet(drawn, tuple(ids), tuple(masks), settings.loss, truncated, dropped)


def _place(sample: Sample, source: Path | str) -> str:
    return sample.place or f"{source}:{sample.line}"
