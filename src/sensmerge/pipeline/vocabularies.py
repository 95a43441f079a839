"""The vocabulary of the merged model: models wrapped so that their rows stand for its tokens, and its tokenizer planned.

Everything is known before a weight is read, but for the rows themselves: those are read as the merge goes along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import progress
from ..checkpoints.source import Checkpoint
from ..checkpoints.vocabulary.aligned import AlignedModel
from ..checkpoints.vocabulary.extended import STALE_FILES, extended_files, union_ids
from ..checkpoints.vocabulary.rows import Vocabulary, row_tables, rowless_tokens
from ..checkpoints.vocabulary.special_ids import ids_in_another, ids_of
from ..checkpoints.vocabulary.templates import most_frequent_template, template_files, template_of
from ..checkpoints.vocabulary.tensors import vocabulary_rows, vocabulary_tensors
from ..checkpoints.vocabulary.token_map import OPAQUE_FILES, TokenMap, read_json, token_map, vocabulary_hashes
from ..errors import IncompatibleModelsError, RecipeError
from ..records import Recipe, TokenizerPolicy, TokenRule

SHOWN_TOKENS = 4


@dataclass(frozen=True)
class TokenizerPlan:
    """The tokenizer of the merged model: copied from `folder`, but for `files` (name → text), and without those `left_out`.

    `rows` is the vocabulary's size, None where it is that of the config; `config_ids` and `generation_ids` are the ids of special
    tokens to write into config.json and generation_config.json (None: there is no such token).
    """

    folder: Path
    files: Mapping[str, str] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    rows: int | None = None
    config_ids: Mapping[str, object] = field(default_factory=dict)
    generation_ids: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelTokens:
    """What the files tell of one model: its tokens (None without a tokenizer that can be read), its rows (None without any).

    `opaque` are the hashes of tokenizer files whose ids are not read.
    """

    tokens: TokenMap | None
    rows: int | None
    opaque: Mapping[str, str]


@dataclass(frozen=True)
class Vocabularies:
    """What a policy comes to: the merged model's vocabulary, those of all models, the tokenizer files that change.

    `orphans` are its tokens that no model has a row for.
    """

    output: Vocabulary
    models: Mapping[str, Vocabulary]
    files: Mapping[str, str]
    orphans: Sequence[str]


def aligned(recipe: Recipe, readers: Mapping[str, Checkpoint]) -> tuple[dict[str, Checkpoint], TokenizerPlan]:
    """`readers`, those wrapped whose rows do not stand for the merged model's tokens as they are; and its tokenizer.

    Only a recipe with `tokenizer:` or `tokenizer_source:` wraps anything. Raises IncompatibleModelsError or RecipeError for tokens
    without a row, rules that cannot hold and tokenizers that cannot be extended. Cost: the tokenizer files are read, no weights.
    """
    donor, policy = donor_model(recipe), recipe.tokenizer
    source = donor if policy is None else policy.model or donor
    plan, result = TokenizerPlan(readers[source].tokenizer_path), dict(readers)
    if policy is not None:
        found = read_tokens(readers)
        if source != donor:
            plan = replace(plan, **_special_ids(readers, found, donor, source))
        if not _nothing_to_align(policy, found):
            planned = plan_vocabularies(recipe, policy, readers, found)
            _check_orphans(recipe, policy, planned)
            result = wrapped(recipe, policy, readers, planned)
            for model in (model for model, each in found.items() if each.tokens is None):
                progress.warning(f"'{model}' has no tokenizer files: its rows are taken to be the tokens of '{source}'")
            stale = STALE_FILES if planned.files else frozenset[str]()
            plan = replace(plan, files=planned.files, left_out=stale, rows=planned.output.rows)
    return result, _with_template(recipe, readers, plan, source)


def donor_model(recipe: Recipe) -> str:
    """The model that `base` means: the base, else the first model."""
    return recipe.base_model if recipe.base_model is not None else recipe.models[0].model


def read_tokens(readers: Mapping[str, Checkpoint]) -> dict[str, ModelTokens]:
    """What the tokenizer files and headers tell of each model; equal files are read once. Raises InputFileError."""
    known: dict[str, TokenMap | None] = {}
    found = {}
    for model, reader in readers.items():
        hashes = vocabulary_hashes(reader.tokenizer_path)
        key = json.dumps(hashes, sort_keys=True)
        if key not in known:
            known[key] = token_map(reader.tokenizer_path)
        opaque = {name: hashes[name] for name in OPAQUE_FILES if name in hashes}
        found[model] = ModelTokens(known[key], vocabulary_rows(reader), opaque)
    return found


def _nothing_to_align(policy: TokenizerPolicy, found: Mapping[str, ModelTokens]) -> bool:
    """Whether all models are alike, and either no tokens can be read or nothing has a row for each."""
    first = next(iter(found.values()))
    return (
        not policy.rules
        and policy.pad_to_multiple_of is None
        and (first.tokens is None or first.rows is None)
        and all(_comparable(each) == _comparable(first) for each in found.values())
    )


def _comparable(found: ModelTokens) -> tuple[object, ...]:
    return (None if found.tokens is None else found.tokens.ids, found.rows, found.opaque)


def plan_vocabularies(
    recipe: Recipe, policy: TokenizerPolicy, readers: Mapping[str, Checkpoint], found: Mapping[str, ModelTokens]
) -> Vocabularies:
    """What `policy` comes to for these models. Raises IncompatibleModelsError where tokens are not known or cannot be added."""
    source = policy.model or donor_model(recipe)
    maps = _complete(readers, found, source)
    asked = [rule.token for rule in policy.rules]
    ours = maps[source]
    others = [maps[model] for model in sorted(maps) if model != source]
    ids = union_ids(ours, others if policy.source == "union" else (), asked)
    files: dict[str, str] = {}
    if ids != ours.ids:
        owners = [maps[rule.model] for rule in policy.rules if rule.model is not None]
        reader = readers[source]
        files = extended_files(reader.tokenizer_path, reader.label, ids, [ours, *owners, *others], asked)
    models = {model: Vocabulary(tokens.ids, _rows(found, model)) for model, tokens in maps.items()}
    rows = max(models[source].rows, max(ids.values(), default=-1) + 1)
    most = max(each.rows for each in models.values()) + len(ids)
    if rows > most:
        far = max(ids, key=lambda token: ids[token])
        raise IncompatibleModelsError(
            f"the token {far!r} has an id far beyond all others",
            where=f"{readers[source].tokenizer_path}",
            why=f"its id is {ids[far]}, and no model has more than {most - len(ids)} rows: the merged model would have {rows}",
            fix="correct the id in the tokenizer's files, or name another model as `source:`",
        )
    multiple = policy.pad_to_multiple_of or 1
    output = Vocabulary(ids, -(-rows // multiple) * multiple)
    return Vocabularies(output, models, files, rowless_tokens(output, models, policy.rules))


def _rows(found: Mapping[str, ModelTokens], model: str) -> int:
    rows = found[model].rows
    if rows is None:
        raise IncompatibleModelsError(
            f"'{model}' has no embedding whose rows could be aligned by token",
            where=model,
            why="none of its tensors outside the blocks looks like an embedding of tokens",
            fix="remove `tokenizer:` from the recipe, and merge models that share one vocabulary",
        )
    return rows


def _complete(readers: Mapping[str, Checkpoint], found: Mapping[str, ModelTokens], source: str) -> dict[str, TokenMap]:
    """The tokens of every model; one without tokenizer files has those of `source` if it has as many rows.

    Raises IncompatibleModelsError for models whose tokens are not known.
    """
    ours = found[source]
    complete: dict[str, TokenMap] = {}
    for model, each in found.items():
        tokens = each.tokens
        if tokens is None and not each.opaque and each.rows == ours.rows and ours.tokens is not None:
            tokens = ours.tokens
        if tokens is not None:
            complete[model] = tokens
    unknown = [model for model in found if model not in complete]
    if unknown:
        raise IncompatibleModelsError(
            f"the tokens of {', '.join(repr(model) for model in unknown)} are not known, so rows cannot be aligned",
            where=", ".join(str(readers[model].tokenizer_path) for model in unknown),
            why="there is no tokenizer.json, vocab.json, vocab.txt or tokenizer.model",
            fix="copy the models' own tokenizer files into "
            + ", ".join(str(readers[model].tokenizer_path) for model in unknown),
        )
    return complete


def _check_orphans(recipe: Recipe, policy: TokenizerPolicy, planned: Vocabularies) -> None:
    if planned.orphans:
        shown = ", ".join(repr(token) for token in planned.orphans[:SHOWN_TOKENS])
        more = f" and {len(planned.orphans) - SHOWN_TOKENS} more" if len(planned.orphans) > SHOWN_TOKENS else ""
        raise IncompatibleModelsError(
            f"{len(planned.orphans)} token(s) of the merged model have a row in no model",
            where=recipe.where(policy.line),
            why=f"{shown}{more}: a tokenizer names them, and the matrices of its model end before them",
            fix="say where their rows come from; these lines, in place of those in the recipe, fill them with zeros:\n"
            + policy_lines(policy, planned.orphans),
        )


def wrapped(
    recipe: Recipe, policy: TokenizerPolicy, readers: Mapping[str, Checkpoint], planned: Vocabularies
) -> dict[str, Checkpoint]:
    """Every model with the rows of the planned vocabulary; those that have them as they are stay as they are.

    Raises RecipeError for a rule that cannot hold, and for `sens:` where a model is changed.
    """
    tables = row_tables(
        planned.output,
        planned.models,
        base=recipe.base_model,
        donor=policy.model or donor_model(recipe),
        rules=policy.rules,
        where=str(recipe.path),
    )
    names = sorted(planned.models)
    models = [(readers[name], planned.models[name].rows) for name in names]
    changed = {
        name: AlignedModel(readers[name], tables[name], models, vocabulary_tensors(readers[name]))
        for place, name in enumerate(names)
        if tables[name].changes(place, planned.models[name].rows)
    }
    if changed and recipe.sens is not None:
        raise unlike_with_sens(recipe, f"rows of {', '.join(changed)} are moved, added or left out", "")
    return {**readers, **changed}


def unlike_with_sens(recipe: Recipe, why: str, lines: str) -> RecipeError:
    """The error for a recipe with `sens:` whose models have unlike vocabularies; `lines` must be added for a plain merge."""
    return RecipeError(
        "`sens:` with models of unlike vocabularies is not supported yet",
        where=recipe.where(),
        why=f"calibration compares what models say of each token, place by place: {why}",
        fix=f"remove every `sens:` from the recipe for a plain merge{lines and ', and ' + lines}",
    )


def _special_ids(
    readers: Mapping[str, Checkpoint], found: Mapping[str, ModelTokens], donor: str, source: str
) -> dict[str, Any]:
    """`config_ids` and `generation_ids` of a plan whose tokens are not those of the config's donor."""
    tokens, others = ({} if (each := found[m].tokens) is None else each.ids for m in (donor, source))
    ours, theirs = ids_of(readers[donor].config), ids_of(readers[source].config)
    config = ids_in_another(ours, theirs, tokens, others)
    generation = ids_in_another(
        ids_of(_generation(readers[donor])), ids_of(_generation(readers[source])) or theirs, tokens, others
    )
    lost = [key for key, value in ours.items() if value is not None and config[key] is None]
    if lost:
        progress.warning(f"'{source}' has no token for {', '.join(lost)} of '{donor}': they are null in config.json")
    return {"config_ids": config, "generation_ids": generation}


def _generation(reader: Checkpoint) -> dict[str, Any]:
    file = reader.path / "generation_config.json"
    data = read_json(file) if file.is_file() else {}
    return data if isinstance(data, dict) else {}


def _with_template(
    recipe: Recipe, readers: Mapping[str, Checkpoint], plan: TokenizerPlan, source: str
) -> TokenizerPlan:
    """`plan` with the chat template that the recipe asks for."""
    template = recipe.chat_template
    if template == "auto":
        template = most_frequent_template(list(readers.values()), readers[source])
    if template is None or template.strip() == template_of(plan.folder):
        return plan
    files, stale = template_files(plan.folder, template, plan.files)
    return replace(plan, files=files, left_out=plan.left_out | stale)


def policy_lines(policy: TokenizerPolicy, zeros: Sequence[str] = ()) -> str:
    """The lines of a recipe that say what `policy` says, with zeros for the rows of some more tokens."""
    lines = ["tokenizer:", f"  source: {policy.source if policy.model is None else _quoted(policy.model)}"]
    if policy.pad_to_multiple_of is not None:
        lines.append(f"  pad_to_multiple_of: {policy.pad_to_multiple_of}")
    rules = [(rule.token, f"{{source: {_source_text(rule)}{', force: true' * rule.force}}}") for rule in policy.rules]
    rules += [(token, "{source: {kind: zero}}") for token in zeros]
    return "\n".join(
        [*lines, *["  tokens:"] * bool(rules), *(f"    {_quoted(token)}: {text}" for token, text in rules)]
    )


def _source_text(rule: TokenRule) -> str:
    if rule.model is None:
        return "{kind: zero}"
    if rule.from_token == rule.token:
        return _quoted(rule.model)
    which = f"token: {_quoted(rule.from_token)}" if rule.from_token is not None else f"token_id: {rule.from_id}"
    return f"{{kind: model_token, model: {_quoted(rule.model)}, {which}}}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
