"""From measurements to coefficients (eq. 3, 5, 6 and the factor of eq. 7): pure arithmetic on a few hundred numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..records import Coefficients, Intervals, SensSettings, hash_of
from . import RULES
from .factors import cross_task, task_specific
from .intervals import PerSample, bootstrap
from .rule import Array, Rule

SPREAD_WORTH_NOTICING = 0.10


@dataclass(frozen=True)
class Measurements:
    """What the rules start from, experts in recipe order.

    `sensitivity` s is float64 [K, L]; `outside` the same sums for each role outside the blocks, [K]; `distances` g is
    float64 [K, K]. `inputs` is the hash of where they came from. `per_sample` is what both are made of, where that is known.
    """

    models: tuple[str, ...]
    layers: tuple[str, ...]
    sensitivity: Array
    outside: Mapping[str, Array]
    distances: Array
    inputs: str
    per_sample: PerSample | None = None


def _alpha_outside(sensitivity_L: Array, outside: float) -> float:
    """A role's own α: its s over the norm of s over the blocks; 0 where nothing is sensitive."""
    norm = math.hypot(*sensitivity_L.tolist())
    return outside / norm if norm > 0 else 0.0


def _sigma_outside(
    rule: Rule, settings: SensSettings, temperature: float, sigma_IL: Array, tau_I: Array, alpha_I: Array
) -> list[float]:
    experts, layers = sigma_IL.shape
    if settings.other == "base":
        return [0.0] * experts
    if settings.other == "uniform":
        return [1.0 / experts] * experts
    if settings.other == "own_group":
        return [float(s) for s in rule.weigh(alpha_I[:, None], tau_I, temperature)[:, 0]]
    return [math.fsum(row) / layers for row in sigma_IL.tolist()]


def coefficient(total: float, sigma: float) -> float:
    """c = total·σ, rounded once to float32 (eq. 7's K·σ where total is K)."""
    return float(np.float32(total * sigma))


def _multipliers(
    sigma_IL: Sequence[Sequence[float]], total: float, weights: Sequence[float], scale: float | None
) -> list[list[float]]:
    """λ·w_i·c_i^l, with 1 in place of λ while it is not known."""
    applied = 1.0 if scale is None else scale
    return [
        [applied * w * coefficient(total, sigma) for sigma in row] for w, row in zip(weights, sigma_IL, strict=True)
    ]


def _intervals(
    measured: Measurements,
    settings: SensSettings,
    rule: Rule,
    temperature: float,
    total: float,
    weights: Sequence[float],
    scale: float | None,
) -> Intervals | None:
    """The bootstrap's intervals; None where a task has no samples to draw from."""
    if measured.per_sample is None or not measured.per_sample.enough:
        return None
    found = bootstrap(measured.per_sample, rule, settings, temperature)
    return _applied_intervals(found, total, weights, scale)


def _applied_intervals(found: Intervals, total: float, weights: Sequence[float], scale: float | None) -> Intervals:
    """`found` with the intervals of λ·w_i·c_i^l, which follow from those of σ; a negative factor turns their ends round."""
    ends = [_multipliers([[pair[end] for pair in row] for row in found.sigma], total, weights, scale) for end in (0, 1)]
    pairs = [[sorted(pair) for pair in zip(low, high, strict=True)] for low, high in zip(*ends, strict=True)]
    return replace(found, weights=pairs)


def _warnings(spread: float) -> list[str]:
    if spread >= SPREAD_WORTH_NOTICING:
        return []
    return [
        f"the coefficients are nearly uniform (spread {spread:.3f} < {SPREAD_WORTH_NOTICING:.2f}): the result is close to the"
        " plain merge; `preset: calibrated` uses no temperature and chooses lambda by the calibration loss"
    ]


def compute(
    measured: Measurements, settings: SensSettings, *, weights: Sequence[float], scale: float | None
) -> Coefficients:
    """Eq. 3, 5 and 6 with the choices in `settings`; `weights` are the recipe's w_i, `scale` its λ (None while auto).

    Pure; permuting the experts permutes the result, bit for bit. Raises RecipeError for an unknown rule. Cost: K·L
    exponentials, and a thousand times that for the intervals where single samples are known.
    """
    rule = RULES.get(settings.rule, where="sens.rule")
    temperature = 1.0 if settings.temperature is None else settings.temperature
    experts = len(measured.models)
    alpha_IL = np.array([task_specific(row) for row in measured.sensitivity])
    tau_I = cross_task(measured.distances, settings.axis, settings.direction)
    sigma_IL = rule.weigh(alpha_IL, tau_I, temperature)
    total = float(experts) if settings.total == "K" else float(settings.total)
    other = {
        role: _sigma_outside(
            rule,
            settings,
            temperature,
            sigma_IL,
            tau_I,
            np.array([_alpha_outside(s, float(o)) for s, o in zip(measured.sensitivity, outside, strict=True)]),
        )
        for role, outside in measured.outside.items()
    }
    spread = float(np.max(np.abs(experts * sigma_IL - 1.0)))
    return Coefficients(
        schema=Coefficients.SCHEMA,
        preset=settings.preset,
        rule=settings.rule,
        temperature=temperature,
        total=total,
        lambda_=scale,
        models=list(measured.models),
        layers=list(measured.layers),
        alpha=alpha_IL.tolist(),
        tau=tau_I.tolist(),
        sigma=sigma_IL.tolist(),
        w=[float(w) for w in weights],
        weights=_multipliers(sigma_IL.tolist(), total, weights, scale),
        other=other,
        spread=spread,
        warnings=_warnings(spread),
        inputs=hash_of(
            measured.inputs,
            settings.rule,
            temperature,
            total,
            settings.axis,
            settings.direction,
            settings.other,
            list(weights),
            scale,
        ),
        intervals=_intervals(measured, settings, rule, temperature, total, weights, scale),
    )


def applied(coefficients: Coefficients, weights: Sequence[float], scale: float | None) -> Coefficients:
    """The same σ under a recipe's weights and λ (None while auto): `lambda`, `w` and `weights` change, and the hash."""
    intervals = coefficients.intervals
    return replace(
        coefficients,
        intervals=None if intervals is None else _applied_intervals(intervals, coefficients.total, weights, scale),
        lambda_=scale,
        w=[float(w) for w in weights],
        weights=_multipliers(coefficients.sigma, coefficients.total, weights, scale),
        inputs=hash_of(coefficients.inputs, list(weights), scale),
    )
