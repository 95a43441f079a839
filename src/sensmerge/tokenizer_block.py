"""The `tokenizer:` block of a recipe, the older `tokenizer_source:`, and `chat_template:`, as in mergekit."""

from __future__ import annotations

from collections.abc import Sequence

from .checkpoints.vocabulary.templates import TEMPLATES, template_fault
from .errors import RecipeError
from .records import TokenizerPolicy, TokenRule
from .registry import suggestion
from .yamlfile import Section

# Hardware asks for some hundreds; what is beyond this is a slip, and would fill the disk with rows of no token.
LARGEST_MULTIPLE = 1 << 16


def read_tokenizer(top: Section, models: Sequence[str]) -> TokenizerPolicy | None:
    """Whose tokens the merged model has; None where the recipe does not say. `models` are those that the merge reads.

    Raises RecipeError with the line.
    """
    if "tokenizer" in top and "tokenizer_source" in top:
        raise top.error(
            "`tokenizer` and `tokenizer_source` stand side by side",
            top.line_of("tokenizer_source"),
            "keep one of the two",
            "both say whose tokenizer the merged model has",
        )
    section = top.section("tokenizer")
    if section is None:
        name = top.text("tokenizer_source")
        if name is None:
            return None
        source, model = _source(top, "tokenizer_source", name, models)
        return TokenizerPolicy(source, model, (), None, top.line_of("tokenizer_source"))
    section.allow(("source", "tokens", "pad_to_multiple_of"))
    source, model = _source(section, "source", section.text("source") or "union", models)
    tokens = section.section("tokens")
    rules = () if tokens is None else tuple(_rule(tokens, token, models) for token in tokens)
    return TokenizerPolicy(source, model, rules, _multiple(section), section.line)


def _source(section: Section, key: str, name: str, models: Sequence[str]) -> tuple[str, str | None]:
    """(`base`, `union` or `model`, the model's string)."""
    if name in ("base", "union"):
        return name, None
    # The form of older versions of mergekit.
    bare = name.removeprefix("model:")
    model = name if name in models or bare not in models else bare
    return "model", _model(section, key, model, models, "`base`, `union`, or ")


def _model(section: Section, key: str, model: str | None, models: Sequence[str], others: str = "") -> str:
    if model is not None and model in models:
        return model
    near = None if model is None else suggestion(model, models)
    raise section.error(
        f"`{key}:` must be {others}a model of the recipe",
        section.line_of(key),
        f"did you mean '{near}'?" if near else f"write `{key}: {models[0]}`",
        f"{'nothing is named' if model is None else f'found {model!r}'}; the merge reads {', '.join(models)}",
    )


def _multiple(section: Section) -> int | None:
    value = section.value("pad_to_multiple_of")
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_MULTIPLE
    ):
        raise section.error(
            f"`pad_to_multiple_of` must be a whole number from 1 to {LARGEST_MULTIPLE}",
            section.line_of("pad_to_multiple_of"),
            "write `pad_to_multiple_of: 64`",
            f"found {value!r}",
        )
    return value


def _rule(tokens: Section, token: str, models: Sequence[str]) -> TokenRule:
    """One entry of `tokens:`."""
    line = tokens.line_of(token)
    section = tokens.section(token)
    if section is not None:
        section.allow(("source", "force"))
    if section is None or section.value("source") is None:
        raise tokens.error(
            f"the rule for token {token!r} has no `source:`",
            line,
            "write `source: MODEL`, or `source: {kind: zero}`",
            "it must say where the token's row comes from",
        )
    force = section.truth("force", False)
    if not section.is_section("source"):
        model = _model(section, "source", section.text("source"), models, "`{kind: …}`, or ")
        return TokenRule(token, model, token, None, force, line)
    source = section.section("source")
    assert source is not None
    source.allow(("kind", "model", "token", "token_id"))
    kind = source.text("kind")
    if kind == "zero" and set(source) == {"kind"}:
        return TokenRule(token, None, None, None, force, line)
    if kind != "model_token":
        raise source.error(
            f"the rule for token {token!r} has no source that is known",
            source.line_of("kind"),
            "write `source: {kind: zero}` or `source: {kind: model_token, model: MODEL, token: TOKEN}`",
            f"found kind {kind!r}" + (" with keys that belong to `model_token`" if kind == "zero" else ""),
        )
    model = _model(source, "model", source.text("model"), models)
    return TokenRule(token, model, *_token_of(source, token), force, line)


def _token_of(source: Section, token: str) -> tuple[str | None, int | None]:
    """The token, or the id, that a `model_token` source names."""
    number = source.value("token_id")
    whole = number is None or (isinstance(number, int) and not isinstance(number, bool) and number >= 0)
    if ("token" in source) == ("token_id" in source) or not whole:
        raise source.error(
            f"the rule for token {token!r} must name one `token` or one `token_id`",
            source.line,
            "write `{kind: model_token, model: MODEL, token: TOKEN}`, or `token_id: 0` in place of the token",
            "a `model_token` source is the row of one token of that model",
        )
    return source.text("token"), number


def read_chat_template(top: Section) -> str | None:
    """`auto`, or the text of a template: the recipe's own, or that of a built-in name. None where the recipe names none.

    Raises RecipeError for an unknown name or a text that is no Jinja template.
    """
    text = top.text("chat_template")
    if text is None or text == "auto":
        return text
    where = top.line_of("chat_template")
    if "{" not in text:
        if text in TEMPLATES:
            return TEMPLATES[text]
        return _unknown_template(top, text, where)
    fault = template_fault(text)
    if fault is not None:
        raise top.error(
            "`chat_template:` is not a Jinja template that can be read", where, "mend the template's text", fault
        )
    return text


def _unknown_template(top: Section, name: str, line: int) -> str:
    near = suggestion(name, ["auto", *TEMPLATES])
    error: RecipeError = top.error(
        f"unknown chat template '{name}'",
        line,
        f"did you mean '{near}'?" if near else f"write `chat_template: {next(iter(TEMPLATES))}`",
        f"known: auto, {', '.join(TEMPLATES)}, or the text of a Jinja template",
    )
    raise error
