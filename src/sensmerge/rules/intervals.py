"""How sure the numbers are: bootstrap over the calibration samples, drawn anew within each task. Pure and seeded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import Intervals, SensSettings
from .factors import cross_task
from .rule import Array, Rule

DRAWS = 1000
LEVEL = (2.5, 97.5)
# A task with fewer samples says nothing about how much they differ.
FEWEST_SAMPLES = 2


@dataclass(frozen=True)
class PerSample:
    """What each sample added, experts in recipe order.

    `sensitivity[i]` is float64 [m_i, L]; `distances[i][j]` is float64 [m_j], model i on the samples of task j (zeros where nothing
    was compared). `keys[i]` names task i's samples: the draws follow from it, so that the order of the experts changes nothing.
    """

    sensitivity: Sequence[Array]
    distances: Sequence[Sequence[Array]]
    keys: Sequence[str]

    @property
    def enough(self) -> bool:
        """Whether every task has samples to draw from."""
        return all(len(each) >= FEWEST_SAMPLES for each in self.sensitivity)


def drawn_counts(samples: int, key: str, seed: int, draws: int = DRAWS) -> Array:
    """How often each of `samples` samples is drawn, float64 [draws, samples]; every row sums to `samples`."""
    words = hashlib.sha256(f"{seed} {key}".encode()).digest()[:16]
    random = np.random.Generator(np.random.PCG64(int.from_bytes(words, "little")))
    return random.multinomial(samples, np.full(samples, 1.0 / samples), size=draws).astype(np.float64)


def bootstrap(
    per_sample: PerSample, rule: Rule, settings: SensSettings, temperature: float, *, draws: int = DRAWS, seed: int = 0
) -> Intervals:
    """95 % percentile intervals of α [K, L], τ [K] and σ [K, L] under `rule`; `weights` are left empty.

    Every draw takes m_j samples of task j with replacement; s_j and all distances on task j are formed from these same samples.
    Cost: `draws` times the rule, about 0.1 s at K = 3, L = 32, m = 100.
    """
    counts = [
        drawn_counts(len(each), key, seed, draws)
        for each, key in zip(per_sample.sensitivity, per_sample.keys, strict=True)
    ]
    experts = len(counts)
    sums_ILB = [(count @ each).T for count, each in zip(counts, per_sample.sensitivity, strict=True)]
    alpha_BIL = np.stack([_shares(sums).T for sums in sums_ILB], axis=1)
    distances_BII = np.zeros((draws, experts, experts))
    for model in range(experts):
        for task in range(experts):
            if model != task:
                mean = counts[task] @ per_sample.distances[model][task] / counts[task].shape[1]
                distances_BII[:, model, task] = mean
    tau_BI = np.array([cross_task(each, settings.axis, settings.direction) for each in distances_BII])
    sigma_BIL = np.array(
        [rule.weigh(alpha_IL, tau_I, temperature) for alpha_IL, tau_I in zip(alpha_BIL, tau_BI, strict=True)]
    )
    return Intervals(
        draws=draws, alpha=_between(alpha_BIL), tau=_between(tau_BI), sigma=_between(sigma_BIL), weights=[]
    )


def _shares(sums_LB: Array) -> Array:
    """α of every draw (eq. 3), float64 [L, B]; 1/√L where nothing is sensitive."""
    norms_B = np.sqrt((sums_LB**2).sum(axis=0))
    shares = sums_LB / np.where(norms_B > 0, norms_B, 1.0)
    shares[:, norms_B == 0] = 1.0 / np.sqrt(len(sums_LB))
    return shares


def _between(drawn: Array) -> Any:
    """The interval of each number, [..., 2], from its draws along the first axis."""
    low_high = np.percentile(drawn, LEVEL, axis=0)
    return np.moveaxis(low_high, 0, -1).tolist()
