"""Where each row of the merged model's vocabulary comes from, in each model: tables of row numbers, and nothing else.

The rules are mergekit's: a model's own row for a token, else the recipe's rule for it, else the base's row, else the only owner's,
else the mean of those that have it. Rows that belong to no token come by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import RecipeError
from ...records import TokenRule

# Sources of a row that are no model: zeros, a mean of rows of several models, the mean of all rows of tokens.
ZERO, MEAN, FILL = -1, -2, -3


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a model's tokens, and the number of rows of its matrices."""

    ids: Mapping[str, int]
    rows: int

    def row(self, token: str) -> int | None:
        """The row of a token; None if the model has none for it."""
        place = self.ids.get(token)
        return place if place is not None and place < self.rows else None


@dataclass(frozen=True)
class RowTable:
    """For each row of the output: the model it is read from (a place among the models, or ZERO, MEAN, FILL), and its row there.

    `means` has the (model, row) pairs behind each row that is a MEAN; `is_token` says which rows belong to tokens.
    """

    source: NDArray[np.int32]
    row: NDArray[np.int64]
    means: Mapping[int, tuple[tuple[int, int], ...]]
    is_token: NDArray[np.bool_]

    def changes(self, place: int, rows: int) -> bool:
        """Whether it differs from the `rows` rows of the model at `place` as they are."""
        own = len(self.row) == rows and bool((self.source == place).all())
        return not own or not bool((self.row == np.arange(rows)).all())


@dataclass(frozen=True)
class _Origin:
    """Where one row comes from: a model and its row, zeros, or a mean."""

    source: int
    row: int = 0
    mean: tuple[tuple[int, int], ...] = ()


def rowless_tokens(output: Vocabulary, models: Mapping[str, Vocabulary], rules: Sequence[TokenRule]) -> list[str]:
    """The tokens of the output that no model has a row for and no rule speaks of, by id."""
    ruled = {rule.token for rule in rules}
    orphans = [t for t in output.ids if t not in ruled and all(m.row(t) is None for m in models.values())]
    return sorted(orphans, key=lambda token: output.ids[token])


def row_tables(
    output: Vocabulary,
    models: Mapping[str, Vocabulary],
    *,
    base: str | None,
    donor: str,
    rules: Sequence[TokenRule],
    where: str,
) -> dict[str, RowTable]:
    """The table of each model, for an output whose tokens all have a row somewhere (`rowless_tokens` is empty).

    `base` is the recipe's base_model, `donor` the model whose tokens the output begins with. Raises RecipeError for a rule that
    names a token or an id which its model does not have; `where` names the recipe. Cost: one look at every token and model.
    """
    origins = _Origins(models, base, {rule.token: rule for rule in rules}, where)
    for rule in rules:
        origins.default(rule.token)
    token_of: dict[int, str] = {}
    for token in sorted(output.ids, key=lambda token: (output.ids[token], token)):
        token_of.setdefault(output.ids[token], token)
    is_token = np.zeros(output.rows, np.bool_)
    is_token[list(token_of)] = True
    forced = any(rule.force for rule in rules)
    tables = {}
    for name, model in models.items():
        if model.rows == output.rows and model.ids == output.ids and not forced:
            own = np.full(output.rows, origins.places[name], np.int32)
            tables[name] = RowTable(own, np.arange(output.rows), {}, is_token)
        else:
            tables[name] = _table(name, donor, origins, token_of, is_token)
    return tables


def _table(
    name: str, donor: str, origins: _Origins, token_of: Mapping[int, str], is_token: NDArray[np.bool_]
) -> RowTable:
    """The table of one model: its tokens by the rules, all other rows by position."""
    source, row = np.full(len(is_token), FILL, np.int32), np.zeros(len(is_token), np.int64)
    means: dict[int, tuple[tuple[int, int], ...]] = {}
    for at, token in token_of.items():
        origin = origins.of(name, token)
        source[at], row[at] = origin.source, origin.row
        if origin.source == MEAN:
            means[at] = origin.mean
    # What is a token's in a model is no padding there.
    padding = {each: (origins.models[each].rows, set(origins.models[each].ids.values())) for each in (name, donor)}
    for at in np.flatnonzero(~is_token).tolist():
        owner = next((each for each, (rows, used) in padding.items() if at < rows and at not in used), None)
        if owner is not None:
            source[at], row[at] = origins.places[owner], at
    return RowTable(source, row, means, is_token)


class _Origins:
    """Where the row of a token comes from in a model; what stands in for a missing one is decided once for all models."""

    def __init__(
        self, models: Mapping[str, Vocabulary], base: str | None, rules: Mapping[str, TokenRule], where: str
    ) -> None:
        self.models, self._base, self._rules, self._where = models, base, rules, where
        self.names = sorted(models)
        self.places = {name: place for place, name in enumerate(self.names)}
        self._defaults: dict[str, _Origin] = {}

    def of(self, name: str, token: str) -> _Origin:
        """The row of a token in a model: its own unless a rule is forced."""
        own, rule = self.models[name].row(token), self._rules.get(token)
        if own is not None and (rule is None or not rule.force):
            return _Origin(self.places[name], own)
        return self.default(token)

    def default(self, token: str) -> _Origin:
        """The row of a token in a model that has none."""
        if token not in self._defaults:
            rule = self._rules.get(token)
            self._defaults[token] = (
                _unruled(token, self.models, self.names, self._base)
                if rule is None
                else _ruled(rule, self.models, self.places, self._where)
            )
        return self._defaults[token]


def _unruled(token: str, models: Mapping[str, Vocabulary], names: Sequence[str], base: str | None) -> _Origin:
    """The row of a token in a model that has none: the base's, else the only owner's, else the mean."""
    owners = tuple((place, row) for place, name in enumerate(names) if (row := models[name].row(token)) is not None)
    if base is not None and (row := models[base].row(token)) is not None:
        return _Origin(names.index(base), row)
    return _Origin(*owners[0]) if len(owners) == 1 else _Origin(MEAN, 0, owners)


def _ruled(rule: TokenRule, models: Mapping[str, Vocabulary], places: Mapping[str, int], where: str) -> _Origin:
    if rule.model is None:
        return _Origin(ZERO)
    model = models[rule.model]
    row = rule.from_id if rule.from_token is None else model.row(rule.from_token)
    if row is None or row >= model.rows:
        what = f"token {rule.from_token!r}" if rule.from_token is not None else f"row {rule.from_id}"
        raise RecipeError(
            f"the rule for token {rule.token!r} needs {what} of '{rule.model}', which has none",
            where=f"{where}:{rule.line}",
            why=f"'{rule.model}' has {model.rows} rows, and this token is not among them"
            if rule.from_token is not None
            else f"'{rule.model}' has {model.rows} rows, numbered from 0",
            fix="name a model that has the token, or write `source: {kind: zero}`",
        )
    return _Origin(places[rule.model], row)
