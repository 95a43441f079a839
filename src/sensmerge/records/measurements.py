"""What is measured: samples, sensitivities, distances, coefficients, λ, scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .record import Record


@dataclass(frozen=True)
class CalibrationSet:
    """The m samples of one task: token ids and, for each token, whether its prediction counts in the loss.

    `rows` are the samples' 0-based places in their file. `loss_mask[k][t]` is 1 if token t of sample k is a loss token (it is
    predicted from position t-1; token 0 never is one). `loss` is the setting that made the masks. `truncated` counts the samples
    that were cut to `max_length`, `dropped` the file's rows that are not among these samples.
    """

    rows: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...]
    loss_mask: tuple[tuple[int, ...], ...]
    loss: str
    truncated: int
    dropped: int = 0

    @property
    def loss_tokens(self) -> int:
        """Number of loss tokens over all samples."""
        return sum(sum(mask) for mask in self.loss_mask)


@dataclass(frozen=True)
class SensitivityProfile(Record):
    """How sensitive one expert is, layer by layer (eq. 1 and the sums of eq. 3), with the samples that showed it.

    `layers` are the L group names in the order of the stack; `sensitivity[l]` is the sum over samples, `per_sample[k][l]` one
    sample's part; `tensors` has one sum per parameter, those outside the blocks included. `score` is what was summed: `weight`
    |θ·g|, `task_vector` |δ·g| or `fisher` g². `token_ids` and `loss_mask` are empty if the profile was made without samples.
    `paths` counts the modules that were measured many samples at once (`batched`) and a sample at a time (`loop`).
    `truncated` samples were cut to `max_length`; `dropped` rows of the data were not drawn.
    """

    schema: int
    model: str
    fingerprint: str
    samples: int
    tokens: int
    loss: str
    score: str
    layers: list[str]
    sensitivity: list[float]
    per_sample: list[list[float]]
    tensors: dict[str, float]
    rows: list[int]
    token_ids: list[list[int]]
    loss_mask: list[list[int]]
    inputs: str
    paths: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Alignment(Record):
    """How far the experts stand apart (eq. 4).

    `distances[i][j]` is the distance of model i from expert j on task j's samples (diagonal 0), the mean over its samples of
    `per_sample[i][j]`, which is itself a mean over positions.
    """

    schema: int
    models: list[str]
    distances: list[list[float]]
    per_sample: list[list[list[float]]]
    inputs: str


@dataclass(frozen=True)
class PairDistances(Record):
    """How far one model stands from one expert on that expert's samples: a part of an Alignment that is kept on its own.

    `samples` has a number for each sample that was ever compared, by the hash of its token ids and loss mask.
    """

    SCHEMA = 2

    schema: int
    model: str
    expert: str
    samples: dict[str, float]
    inputs: str


@dataclass(frozen=True)
class DrawnSamples(Record):
    """How many samples a calibration with `until` took: `samples` of each task, of the `rows` that the largest one has.

    `rounds` lists what was tried: a number of samples with half the width of the widest interval of K·σ (None: not known).
    """

    schema: int
    samples: int
    rows: int
    rounds: list[tuple[int, float | None]]
    inputs: str


@dataclass(frozen=True)
class Intervals:
    """95 % bootstrap intervals [low, high] of what stands under the same names in Coefficients, from `draws` draws of samples."""

    draws: int
    alpha: list[list[list[float]]]
    tau: list[list[float]]
    sigma: list[list[list[float]]]
    weights: list[list[list[float]]]

    def widest(self) -> tuple[int, int, float]:
        """(expert, layer, half the width) of the widest interval of K·σ: a coefficient's, where `total` is K."""
        halves = [
            (len(self.sigma) * (high - low) / 2.0, expert, layer)
            for expert, row in enumerate(self.sigma)
            for layer, (low, high) in enumerate(row)
        ]
        half, expert, layer = max(halves, key=lambda found: found[0])
        return expert, layer, half


@dataclass(frozen=True)
class Coefficients(Record):
    """One coefficient per expert and layer (eq. 5-7), and everything that led to it.

    Lists over K experts are in recipe order, lists over L groups in the order of `layers`. `alpha` is eq. 3, `tau` eq. 5,
    `sigma` eq. 6, `other` the σ of tensors outside the blocks by role, `w` the recipe's own weights, and
    `weights[i][l]` = λ·w_i·total·σ_i^l (with 1 in place of λ while it is null): what multiplies δ_i in block l under task
    arithmetic. `spread` is max|K·σ - 1|, whatever `total` is: how far the merge is from a plain one. `intervals` is None where
    nothing is known of single samples.
    """

    schema: int
    preset: str
    rule: str
    temperature: float
    total: float
    lambda_: float | None
    models: list[str]
    layers: list[str]
    alpha: list[list[float]]
    tau: list[float]
    sigma: list[list[float]]
    w: list[float]
    weights: list[list[float]]
    other: dict[str, list[float]]
    spread: float
    warnings: list[str]
    inputs: str
    intervals: Intervals | None = None

    def uncertainty(self) -> str | None:
        """One line on how sure the coefficients are; None without intervals."""
        if self.intervals is None:
            return None
        expert, layer, half = self.intervals.widest()
        return (
            f"widest 95 % interval of K*sigma: +/- {half:.4f}, {self.models[expert]} in {self.layers[layer]}"
            f" (bootstrap over the samples, {self.intervals.draws} draws)"
        )

    def sigma_of(self, group: str) -> list[float]:
        """The K values of σ for a block (or finer group) or for a role outside the blocks.

        A stored head without a σ of its own is tied: it takes the embedding's. Any other group without one holds no parameters,
        only buffers: it takes the mean over the layers.
        """
        if group in self.other:
            return self.other[group]
        if group in self.layers:
            column = self.layers.index(group)
            return [row[column] for row in self.sigma]
        if group == "lm_head" and "embed" in self.other:
            return self.other["embed"]
        return [math.fsum(row) / len(row) for row in self.sigma]


@dataclass(frozen=True)
class Scale(Record):
    """The λ that minimises the calibration loss of the merged model, and every λ that was tried.

    `tried` lists [λ, objective, loss of task 1, … task K] sorted by λ; the objective is the mean over tasks of the mean sample
    loss (nats per token).
    """

    schema: int
    lambda_: float
    objective: str
    models: list[str]
    tried: list[list[float]]
    inputs: str


@dataclass(frozen=True)
class TaskScore:
    """One task's result: `value` in percent, its standard error in percent points, and every item's score (0 to 1)."""

    metric: str
    value: float
    samples: int
    stderr: float
    items: list[float]

    @classmethod
    def of(cls, metric: str, items: list[float]) -> TaskScore:
        """The score of `items` (at least one, each 0 to 1); the standard error is the binomial one, √(p(1-p)/n)."""
        share = math.fsum(items) / len(items)
        return cls(metric, 100.0 * share, len(items), 100.0 * math.sqrt(share * (1.0 - share) / len(items)), items)


@dataclass(frozen=True)
class Scores(Record):
    """What an evaluation says about one model: a score per task, and their mean."""

    schema: int
    model: str
    fingerprint: str
    tasks: dict[str, TaskScore]
    average: float
    inputs: str
