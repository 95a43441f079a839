"""Models that store the same tensors differently, shown alike: under the names of one of them, tied or untied together.

What differs without a difference in the model: prefixes (`h.0` and `transformer.h.0`), old spellings, buffers that are computed
on loading, copies of tied matrices. Tensors that matter are never hidden: a missing one is told by whoever compares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import progress
from ..records import TensorSpec
from .configs import defaults_of
from .families import NAMING, embedding_of, head_of
from .formats import FLOATS
from .related import is_same
from .renamed import RenamedModel, is_recomputed, names_like
from .source import Checkpoint, Wrapped

TIE = "tie_word_embeddings"


@dataclass
class _Shown:
    """A model as it will be shown: names shown to names stored."""

    model: Checkpoint
    own: dict[str, str]

    def spec(self, name: str) -> TensorSpec:
        return self.model.tensors[self.own[name]]


@dataclass(frozen=True)
class _Tie:
    """The input embedding and the output head of a model, by the names shown; `tied` is None where the model has no head.

    `assumed`: the model stores no head and its config does not say why.
    """

    embedding: str | None
    head: str | None
    tied: bool | None
    assumed: bool = False


def conformed(readers: Mapping[str, Checkpoint], donor: str) -> dict[str, Checkpoint]:
    """All models under the names of `donor`, tied if all are tied and untied if one is; their configs say which.

    A tied head is not stored beside the embedding; in an untied result a tied model shows its embedding as its head. Buffers that
    are computed on loading are left out unless all models store them alike. Cost: headers; where a model is tied and stores its
    head all the same, both matrices are read.
    """
    names = list(readers[donor].tensors)
    shown = {
        key: _Shown(model, {new: old for old, new in names_like(model.tensors, names).items()})
        for key, model in readers.items()
    }
    _leave_out_buffers(list(shown.values()))
    for each in shown.values():
        _leave_out_copies(each)
    untied = _tie_alike(shown, donor)
    return {key: _finished(each, untied) for key, each in shown.items()}


def tie_of(config: Mapping[str, Any]) -> bool | None:
    """Whether config.json says that head and embedding are tied; None if it does not say. A text model's part is asked too."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(part.get(TIE), bool):
            return bool(part[TIE])
    return None


def is_untied(model: Checkpoint) -> bool:
    """Whether a model is shown with a head of its own that its files tie to the embedding."""
    while isinstance(model, Wrapped):
        if isinstance(model, RenamedModel) and model.shows_twice:
            return True
        model = model.inner
    return False


def _finished(each: _Shown, untied: bool | None) -> Checkpoint:
    """The model as it is shown; the model itself where nothing changes."""
    model, config = each.model, each.model.config
    if untied is not None and tie_of(config) not in (None, not untied):
        config = _with_tie(config, tied=not untied)
    elif untied and tie_of(config) is None:
        config = {**config, TIE: False}
    elif untied is False and tie_of(config) is None and head_of(model.tensors) is not None:
        # Without the head that was stored, only the config can say where it went.
        config = {**config, TIE: True}
    if (
        config is model.config
        and all(new == old for new, old in each.own.items())
        and len(each.own) == len(model.tensors)
    ):
        return model
    return RenamedModel(model, each.own, config)


def _with_tie(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """`config` with its tie set wherever it is named."""
    changed = {key: tied if key == TIE else value for key, value in config.items()}
    text = config.get("text_config")
    if isinstance(text, Mapping) and TIE in text:
        changed["text_config"] = {**text, TIE: tied}
    return changed


def _leave_out_buffers(shown: Sequence[_Shown]) -> None:
    """Hide buffers that are computed on loading, unless every model stores them in one shape and kind."""
    buffers = {name for each in shown for name in each.own if is_recomputed(each.spec(name))}
    hidden: dict[str, int] = defaultdict(int)
    for name in sorted(buffers):
        # A tensor of the name that is no buffer somewhere is none of ours: the comparison of tensors tells it.
        holders = [each for each in shown if name in each.own]
        if not all(is_recomputed(each.spec(name)) for each in holders):
            continue
        forms = {(each.spec(name).shape, each.spec(name).dtype in FLOATS) for each in holders}
        if len(holders) < len(shown) or len(forms) > 1:
            for each in holders:
                del each.own[name]
            hidden[name.rpartition(".")[2]] += 1
    if hidden:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(hidden.items()))
        progress.message(f"buffers that not all models store alike are left out, they are computed on loading: {kinds}")


def _leave_out_copies(each: _Shown) -> None:
    """Hide second copies of one bias (BERT stores its decoder's twice) where both are the same."""
    for copy, original in NAMING["copies"]:
        if copy in each.own and original in each.own and is_same(each.model, each.own[copy], each.own[original]):
            del each.own[copy]


def _tie_alike(shown: Mapping[str, _Shown], donor: str) -> bool | None:
    """Show all models tied, or all untied. Returns whether the result is untied; None where no model's head needs a word."""
    ties = {key: _tie(each) for key, each in shown.items()}
    tied = [key for key, tie in ties.items() if tie.tied]
    untied = [key for key, tie in ties.items() if tie.tied is False]
    if not tied:
        overruled = any(tie_of(shown[key].model.config) for key in untied)
        return True if overruled else None
    if not untied:
        # One matrix, under the name that the donor has for it.
        name = ties[donor].embedding or ties[donor].head
        for key in tied:
            own, stored = shown[key].own, ties[key].embedding or ties[key].head
            if name is not None and stored is not None:
                matrix = own[stored]
                for extra in (ties[key].embedding, ties[key].head):
                    own.pop(extra or "", None)
                own[name] = matrix
        return False
    head = ties[donor].head or ties[untied[0]].head
    # A model without a head whose family has one of its own lacks a tensor: its embedding is not passed off as one.
    lacking = [key for key in tied if ties[key].assumed and defaults_of(shown[key].model.config).get(TIE) is False]
    tied = [key for key in tied if key not in lacking]
    for key in tied:
        embedding = ties[key].embedding
        if head is not None and embedding is not None:
            shown[key].own[head] = shown[key].own[embedding]
    if not tied:
        return None
    labels = [", ".join(shown[key].model.label for key in keys) for keys in (untied, tied)]
    progress.message(
        f"the output head of {labels[0]} is a matrix of its own, that of {labels[1]} is tied to the embedding:"
        f" the merged model has both matrices, and `{TIE}: false` in config.json"
    )
    return True


def _tie(each: _Shown) -> _Tie:
    """Whether a model's head is its embedding: as config.json says, but a stored head that differs is a head of its own.

    transformers from version 5 on loads such a head as it is stored.
    """
    head, embedding = head_of(each.own), embedding_of(each.own)
    said = tie_of(each.model.config)
    if head is None:
        return _Tie(embedding, None, None if embedding is None or said is False else True, assumed=said is None)
    if embedding is None:
        return _Tie(None, head, said)
    same = said is not False and is_same(each.model, each.own[head], each.own[embedding])
    if said and not same:
        progress.warning(
            f"{each.model.label}: config.json says that the output head is tied to the embedding, but a head with other values"
            f" is stored; it is used, as transformers does"
        )
    if said is None and same and defaults_of(each.model.config).get(TIE) is False:
        # Two matrices that happen to be equal, in a family that would look for both.
        return _Tie(embedding, head, False)
    return _Tie(embedding, head, same)
