"""Models whose vocabularies differ, in a recipe that does not say which tokens to keep: told, with the lines that say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoints.source import Checkpoint
from ..checkpoints.vocabulary.token_map import differences
from ..errors import IncompatibleModelsError, SensmergeError
from ..records import Recipe, TokenizerPolicy
from .vocabularies import (
    SHOWN_TOKENS,
    ModelTokens,
    donor_model,
    plan_vocabularies,
    policy_lines,
    read_tokens,
    unlike_with_sens,
    wrapped,
)

_CHOICES = {"base": "to keep the tokens of {donor}", "union": "to keep the tokens of all models"}


def check_same_vocabulary(recipe: Recipe, readers: Mapping[str, Checkpoint]) -> None:
    """Every model gives its tokens the same ids and has as many rows; raises IncompatibleModelsError with the lines to add.

    Models without tokenizer files are compared by their rows alone. Told are all models that differ, each with its first tokens.
    """
    found = read_tokens(readers)
    faults = _differences(recipe, readers, found)
    if not faults:
        return
    lines = _lines(recipe, readers, found)
    why = "; ".join(told for _, told in faults)
    if recipe.sens is not None:
        raise unlike_with_sens(recipe, why, lines)
    labels = dict.fromkeys(label for pair, _ in faults for label in pair)
    raise IncompatibleModelsError("the tokenizers of these models differ", where=", ".join(labels), why=why, fix=lines)


def _differences(
    recipe: Recipe, readers: Mapping[str, Checkpoint], found: Mapping[str, ModelTokens]
) -> list[tuple[tuple[str, str], str]]:
    """For each model that differs from one before it: the labels of both, and how. The donor comes first.

    A model whose tokens are known is compared with the first one whose tokens are, the others with every one.
    """
    donor = donor_model(recipe)
    faults: list[tuple[tuple[str, str], str]] = []
    before: list[str] = []
    for model in sorted(found, key=lambda model: model != donor):
        known = next((other for other in before if found[other].tokens is not None), None)
        others = before if known is None or found[model].tokens is None else [known]
        told = next((each for other in others if (each := _told(readers, found, other, model)) is not None), None)
        if told is not None:
            faults.append(told)
        before.append(model)
    return faults


def _told(
    readers: Mapping[str, Checkpoint], found: Mapping[str, ModelTokens], one: str, other: str
) -> tuple[tuple[str, str], str] | None:
    """How two models differ, in what both have; None if they do not."""
    ours, theirs = found[one], found[other]
    labels = readers[one].label, readers[other].label
    parts = []
    if ours.tokens is not None and theirs.tokens is not None and ours.tokens is not theirs.tokens:
        unlike = differences(ours.tokens.ids, theirs.tokens.ids, *labels)
        more = f"; and {len(unlike) - SHOWN_TOKENS} more" if len(unlike) > SHOWN_TOKENS else ""
        if unlike:
            parts.append(f"{len(unlike)} token(s) differ: {'; '.join(unlike[:SHOWN_TOKENS])}{more}")
    elif ours.tokens is None or theirs.tokens is None:
        shared = ours.opaque.keys() & theirs.opaque.keys()
        parts += [f"their {name} files differ" for name in sorted(shared) if ours.opaque[name] != theirs.opaque[name]]
    if ours.rows is not None and theirs.rows is not None and ours.rows != theirs.rows:
        parts.append(f"{labels[0]} has {ours.rows} rows, {labels[1]} {theirs.rows}")
    return (labels, "; ".join(parts)) if parts else None


def _lines(recipe: Recipe, readers: Mapping[str, Checkpoint], found: Mapping[str, ModelTokens]) -> str:
    """The lines that make this merge work, for every choice that does; else what stands in the way."""
    donor = donor_model(recipe)
    choices: list[str] = []
    hindered: SensmergeError | None = None
    for source, purpose in _CHOICES.items():
        policy = TokenizerPolicy(source, None, (), None, 1)
        try:
            planned = plan_vocabularies(recipe, policy, readers, found)
            wrapped(replace(recipe, sens=None), policy, readers, planned)
        except SensmergeError as error:
            hindered = hindered or error
            continue
        choices.append(f"{purpose.format(donor=readers[donor].label)}:\n{policy_lines(policy, planned.orphans)}")
    if choices:
        return "add these lines to the recipe, " + "\nor these, ".join(choices)
    assert hindered is not None
    return f"{hindered.fix} ({hindered.what}: {hindered.why})"
