"""A recipe as the user wrote it, checked and with presets applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SensSettings:
    """The `sens:` block after its preset was applied; DESIGN names and defaults (docs/recipe.md lists the choices)."""

    preset: str = "paper"
    samples: int = 100
    max_length: int = 1024
    seed: int = 0
    template: str = "none"
    loss: str = "response"
    score: str = "weight"
    group: str = "block"
    distance: str = "l2"
    positions: str = "all"
    axis: str = "row"
    direction: str = "distance"
    rule: str = "softmax"
    temperature: float | None = 1.0
    total: float | str = "K"
    other: str = "block_mean"
    compute_dtype: str | None = None
    attn_implementation: str | None = None
    until: float | None = None


@dataclass(frozen=True)
class SensSource:
    """Where one expert's calibration comes from: data with its field names, or a published profile.

    `data` is a file, a folder or a data set of the hub; of the last two `name` and `split` choose files, of the last `revision`.
    """

    data: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    profile: str | None = None
    name: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Conditional:
    """One entry of a filtered parameter: `setting` holds for tensors whose name contains `filter` (None or `*`: for all)."""

    filter: str | None
    setting: object


# A parameter as the recipe has it: a value, a tuple of values (a gradient over the layers), or a tuple of Conditional.
Settings = Mapping[str, object]


@dataclass(frozen=True)
class Expert:
    """One model of a recipe, with its own parameters and its line in the recipe for messages.

    `weight` is its w_i without filters (a gradient's mean): what tables show. A merge uses `parameters`.
    """

    model: str
    weight: float
    parameters: Settings
    sens: SensSource | None
    line: int


@dataclass(frozen=True)
class SliceSource:
    """One input of a slice: the blocks `layers` (from, up to but not including) of `model`."""

    model: str
    layers: tuple[int, int]
    parameters: Settings
    line: int


@dataclass(frozen=True)
class Slice:
    """One entry of `slices:`: blocks of the output, merged from equally many blocks of each source."""

    sources: tuple[SliceSource, ...]
    base_model: str | None
    parameters: Settings
    line: int


@dataclass(frozen=True)
class TokenRule:
    """One entry of the tokenizer's `tokens:`: the row of a token in every model that lacks it, or with `force` in every model.

    The row is that of `model` for `from_token` or for the id `from_id`; zeros where `model` is None.
    """

    token: str
    model: str | None
    from_token: str | None
    from_id: int | None
    force: bool
    line: int


@dataclass(frozen=True)
class TokenizerPolicy:
    """Whose tokens the merged model has: `source` is `base`, `union`, or `model`, and then `model` says which."""

    source: str
    model: str | None
    rules: tuple[TokenRule, ...]
    pad_to_multiple_of: int | None
    line: int


@dataclass(frozen=True)
class Recipe:
    """A merge as the user wrote it, checked and with presets applied; `text` is the file's own text, for the output folder.

    `models` are the models that are merged, each once, in the order of the recipe; `slices` is empty where the recipe lists
    `models:`. `lambda_` is a number, "auto", or None where neither the recipe nor its preset names one; a λ that differs between
    tensors stands in `parameters` and here with its value without filters. `parameters` are the top level's. `tokenizer` is
    None where the recipe says nothing of tokens; `chat_template` is None, `auto`, or a template's own text.
    `allow` are the names of checks that the user switched off: a config key that may differ, or one of sensmerge's own.
    `folders` are tried for relative paths before the recipe's own: where a merge that is checked later had found its models.
    """

    path: Path
    text: str
    merge_method: str
    base_model: str | None
    models: tuple[Expert, ...]
    slices: tuple[Slice, ...]
    lambda_: float | str | None
    parameters: Settings
    dtype: str | None
    out_dtype: str | None
    sens: SensSettings | None
    tokenizer: TokenizerPolicy | None = None
    chat_template: str | None = None
    allow: frozenset[str] = frozenset()
    folders: tuple[Path, ...] = ()

    def where(self, line: int | None = None) -> str:
        """The recipe's path, with a line number if one is known: for messages."""
        return f"{self.path}:{line}" if line else str(self.path)
