"""`tokenizer:`, `tokenizer_source:` and `chat_template:` in a recipe: read as mergekit means them, every fault with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import Environment

from sensmerge.checkpoints.vocabulary.templates import TEMPLATES
from sensmerge.errors import RecipeError
from sensmerge.recipe import load_recipe
from sensmerge.records import Recipe, TokenizerPolicy, TokenRule

PLAIN = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: math
  - model: code
"""


def load(folder: Path, added: str) -> Recipe:
    path = folder / "recipe.yml"
    path.write_text(f"{PLAIN}{added}\n")
    return load_recipe(path)


def refused(folder: Path, added: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load(folder, added)
    assert str(caught.value).count("\n") == 3, "four lines"
    return caught.value


@pytest.mark.parametrize(
    ("added", "source", "model"),
    [
        ("tokenizer_source: base", "base", None),
        ("tokenizer_source: union", "union", None),
        ("tokenizer_source: math", "model", "math"),
        ("tokenizer_source: model:code", "model", "code"),
        ("tokenizer: {source: base}", "base", None),
        ("tokenizer: {source: code}", "model", "code"),
        ("tokenizer: {source: base, pad_to_multiple_of: 8}", "base", None),
        ("tokenizer: {}", "union", None),
    ],
)
def test_whose_tokens(tmp_path: Path, added: str, source: str, model: str | None) -> None:
    multiple = 8 if "pad" in added else None
    assert load(tmp_path, added).tokenizer == TokenizerPolicy(source, model, (), multiple, 6)


def test_nothing_is_said_of_tokens(tmp_path: Path) -> None:
    for added in ("", "tokenizer:", "tokenizer_source:", "chat_template:"):
        recipe = load(tmp_path, added)
        assert (recipe.tokenizer, recipe.chat_template) == (None, None)


def test_rules_for_tokens(tmp_path: Path) -> None:
    policy = load(
        tmp_path,
        "tokenizer:\n  source: base\n  tokens:\n    <a>: {source: math}\n    <b>: {source: {kind: zero}, force: true}\n"
        "    '<c>': {source: {kind: model_token, model: code, token: </s>}}\n"
        "    3: {source: {kind: model_token, model: base, token_id: 0}}\n",
    ).tokenizer
    assert policy is not None
    assert policy.rules == (
        TokenRule("<a>", "math", "<a>", None, False, 9),
        TokenRule("<b>", None, None, None, True, 10),
        TokenRule("<c>", "code", "</s>", None, False, 11),
        TokenRule("3", "base", None, 0, False, 12),
    )


def rule(text: str) -> str:
    return f"tokenizer: {{source: base, tokens: {{<a>: {text}}}}}"


@pytest.mark.parametrize(
    ("added", "what", "fix"),
    [
        ("tokenizer_source: elsewhere", "`tokenizer_source:` must be `base`, `union`, or a model", "source: base"),
        ("tokenizer: {source: codes}", "`source:` must be `base`, `union`, or a model", "did you mean 'code'?"),
        ("tokenizer: {sauce: base}", "unknown key 'sauce'", "did you mean 'source'?"),
        ("tokenizer: base", "tokenizer must be a mapping", "key: value"),
        ("tokenizer: {source: base}\ntokenizer_source: base", "stand side by side", "keep one"),
        ("tokenizer: {pad_to_multiple_of: 0}", "`pad_to_multiple_of` must be", "pad_to_multiple_of: 64"),
        ("tokenizer: {pad_to_multiple_of: 1000000000}", "`pad_to_multiple_of` must be", "pad_to_multiple_of: 64"),
        ("tokenizer: {pad_to_multiple_of: true}", "`pad_to_multiple_of` must be", "pad_to_multiple_of: 64"),
        (rule("{force: true}"), "has no `source:`", "source: {kind: zero}"),
        (rule("math"), "tokenizer.tokens.<a> must be a mapping", "key: value"),
        (rule("{source: maths}"), "`source:` must be", "did you mean 'math'?"),
        (rule("{source: math, forced: true}"), "unknown key 'forced'", "did you mean 'force'?"),
        (rule("{source: math, force: 1}"), "'force' must be true or false", "force"),
        (rule("{source: {kind: zeros}}"), "no source that is known", "kind: zero"),
        (rule("{source: {kind: zero, model: math}}"), "no source that is known", "kind: zero"),
        (rule("{source: {model: math}}"), "no source that is known", "kind: model_token"),
        (rule("{source: {kind: model_token, model: math}}"), "one `token` or one `token_id`", "token_id"),
        (rule("{source: {kind: model_token, model: math, token: x, token_id: 1}}"), "one `token` or", "token_id"),
        (rule("{source: {kind: model_token, model: math, token_id: -1}}"), "one `token` or", "token_id"),
        (rule("{source: {kind: model_token, model: x, token: y}}"), "`model:` must be a model", "model: base"),
        (rule("{source: {kind: model_token, token: y}}"), "`model:` must be a model", "model: base"),
        ("chat_template: chatm", "unknown chat template 'chatm'", "did you mean 'chatml'?"),
        ("chat_template: '{% for x in y %}'", "not a Jinja template", "mend"),
    ],
)
def test_faults(tmp_path: Path, added: str, what: str, fix: str) -> None:
    error = refused(tmp_path, added)
    assert what in error.what
    assert fix in error.fix
    assert error.where.endswith(f"recipe.yml:{6 + added.count(chr(10))}")


def test_templates_by_name_and_by_text(tmp_path: Path) -> None:
    assert load(tmp_path, "chat_template: auto").chat_template == "auto"
    own = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert load(tmp_path, f"chat_template: '{own}'").chat_template == own
    for name, text in TEMPLATES.items():
        assert load(tmp_path, f"chat_template: {name}").chat_template == text


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Why?"},
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHo\n\n### Instruction:\nWhy?\n\n### Response:\n",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "exaone",
            "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Ho[|endofturn|]\n[|user|]Why?\n[|assistant|]",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s> [INST] Be brief.\n\nHi [/INST] Ho</s> [INST] Why? [/INST]"),
    ],
)
def test_the_built_in_templates_say_what_their_formats_say(name: str, expected: str) -> None:
    """Rendered as transformers renders them."""
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATES[name])
    assert template.render(messages=MESSAGES, add_generation_prompt=True, bos_token="<s>", eos_token="</s>") == expected
