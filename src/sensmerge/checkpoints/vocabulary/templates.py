"""Chat templates: those that a recipe may name, and the one that a model's folder holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..source import Checkpoint
from .token_map import as_text, damaged, read_json

# Written from the formats' public descriptions; `transformers` renders them with trim_blocks and lstrip_blocks.
TEMPLATES: Mapping[str, str] = {
    "alpaca": """\
{% for message in messages %}
{% if message['role'] == 'system' %}
{{ message['content'] | trim }}
{% elif message['role'] == 'user' %}
### Instruction:
{{ message['content'] | trim }}
{% elif message['role'] == 'user_context' %}
### Input:
{{ message['content'] | trim }}
{% else %}
### Response:
{{ message['content'] | trim }}
{% endif %}

{% endfor %}
{% if add_generation_prompt %}
### Response:
{% endif %}
""",
    "chatml": """\
{% for message in messages %}
{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant' }}
{% endif %}
""",
    "exaone": """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set end = '' if message['role'] == 'user' else '[|endofturn|]' -%}
    {{- '[|' ~ message['role'] ~ '|]' ~ message['content'] ~ end ~ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[|assistant|]' -}}
{%- endif -%}
""",
    "llama3": """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}
    {{- message['content'] | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""",
    "mistral": """\
{{- bos_token -}}
{%- set told = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set told.system = message['content'] ~ '\\n\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- ' [INST] ' ~ told.system ~ message['content'] ~ ' [/INST]' -}}
        {%- set told.system = '' -%}
    {%- else -%}
        {{- ' ' ~ message['content'] ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
""",
}


def template_fault(text: str) -> str | None:
    """Why a text is no Jinja template, with the line; None if it is one. `{% generation %}` and loop controls are known."""
    from jinja2 import Environment, TemplateSyntaxError

    # Blocks that transformers adds mark what a model said: they change no text.
    bare = text
    for word in ("generation", "endgeneration"):
        for open_ in ("{%", "{%-"):
            for close in ("%}", "-%}"):
                bare = bare.replace(f"{open_} {word} {close}", "")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(bare)
    except TemplateSyntaxError as error:
        return f"line {error.lineno} of the template: {error.message}"
    return None


def template_of(folder: Path) -> str | None:
    """The chat template of a model, without blanks around it; None if it has none. Of several named ones, the default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise damaged(file, str(error)) from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            data = read_json(folder / name)
            found = data.get("chat_template") if isinstance(data, dict) else None
            if isinstance(found, list):
                named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
                found = named.get("default")
            if isinstance(found, str) and found.strip():
                return found.strip()
    return None


def most_frequent_template(models: Sequence[Checkpoint], donor: Checkpoint) -> str | None:
    """The template that most models have; of equally frequent ones the donor's, else that of the first model by name."""
    found = [(model.label, template_of(model.tokenizer_path)) for model in models]
    counts = Counter(template for _, template in found if template is not None)
    most = max(counts.values(), default=0)
    ours = template_of(donor.tokenizer_path)
    if ours is not None and counts[ours] == most:
        return ours
    return next(
        (template for _, template in sorted(found, key=_by_label) if template and counts[template] == most), None
    )


def _by_label(pair: tuple[str, str | None]) -> str:
    return pair[0]


def template_files(folder: Path, template: str, edited: Mapping[str, str]) -> tuple[dict[str, str], frozenset[str]]:
    """The files of `folder` that change when its chat template becomes `template`, and those that must not stand beside them.

    `edited` are files of the folder that change anyway. The template is written to where the folder keeps one:
    tokenizer_config.json if only that has one, else chat_template.jinja.
    """
    file = folder / "tokenizer_config.json"
    data = json.loads(edited[file.name]) if file.name in edited else read_json(file) if file.is_file() else {}
    stale = frozenset({"chat_template.json"})
    if not isinstance(data, dict) or "chat_template" not in data:
        return {**edited, "chat_template.jinja": template}, stale
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        del data["chat_template"]
        files = {"chat_template.jinja": template, file.name: as_text(data)}
    else:
        files = {file.name: as_text({**data, "chat_template": template})}
    return {**edited, **files}, stale
