"""Sens-Merging (arXiv 2502.12420, eq. 1-7) in float64, from checkpoint folders and JSONL calibration files alone.

A second reading of the design: it imports nothing of `sensmerge`, so that the two agree only if both are right. Each
step is one function; `sens_merge` runs them all. `without=` takes one term of the equations away, which shows that a
comparison with this oracle notices that term. Shapes: K experts, L transformer blocks, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from transformers import AutoTokenizer

from .llama64 import Array, Config, Weights, cross_entropy, forward, log_softmax, loss_and_gradients

LAMBDA_GRID = tuple(step / 10 for step in range(1, 16))
LAMBDA_REFINEMENT = 0.05

WITHOUT: Mapping[str, str] = {
    "abs_per_sample": "eq. 1: |theta . sum_k g_k| instead of sum_k |theta . g_k|",
    "abs": "eq. 1: the signed product",
    "theta": "eq. 1: |g| alone",
    "gradient": "eq. 1: |theta| alone",
    "samples": "eq. 1: the first sample only",
    "loss_mask": "L: over all tokens instead of the response",
    "loss_mean": "L: the sum over the loss tokens instead of their mean",
    "eos": "L: the sample ends without the end-of-sequence token",
    "bos": "L: the sample begins without the beginning-of-sequence token",
    "alpha_norm": "eq. 3: s itself, not divided by its norm",
    "alpha_l2": "eq. 3: s divided by the sum over the blocks instead of the L2 norm",
    "distance_root": "eq. 4: the squared distance",
    "distance_expert": "eq. 4: the distance from the base instead of from expert j",
    "distance_sorted": "eq. 4: task j's samples replaced by task i's (g transposed)",
    "positions": "eq. 4: the last position only instead of the mean over positions",
    "tau_norm": "eq. 5: tau not divided by its sum",
    "alpha": "eq. 6: tau alone",
    "tau": "eq. 6: alpha alone",
    "softmax": "eq. 6: tau alpha divided by its sum instead of the softmax",
    "temperature": "eq. 6: T = 1",
    "K": "eq. 7: coefficients that sum to 1",
    "delta": "eq. 7: the experts themselves instead of their task vectors",
    "base": "eq. 7: the weighted task vectors without the base",
    "layers": "eq. 7: one coefficient an expert, the mean over the blocks",
    "other": "outside the blocks: nothing is merged",
}


@dataclass(frozen=True)
class Settings:
    """What a recipe with `sens:` can say; the defaults are the design's `preset: paper`."""

    method: str = "task_arithmetic"
    weights: tuple[float, ...] | None = None
    lam: float | None = 1.0
    """lambda; None means `auto`."""
    max_length: int = 1024
    loss: str = "response"
    score: str = "weight"
    distance: str = "l2"
    positions: str = "all"
    axis: str = "row"
    direction: str = "distance"
    rule: str = "softmax"
    temperature: float = 1.0
    total: float | None = None
    """None means K."""
    other: str = "block_mean"


@dataclass(frozen=True)
class Sample:
    """One calibration sample: token ids [T] and which of them the loss counts [T] (token 0 never)."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True)
class Family:
    """The models in memory: the config, the base and K experts as float64 tensors, and K lists of samples."""

    config: Config
    base: Weights
    experts: tuple[Weights, ...]
    tasks: tuple[tuple[Sample, ...], ...]


@dataclass(frozen=True)
class Result:
    """Eq. 1-7 in numbers: sensitivity, alpha, sigma and weights [K, L], tau [K], distances [K, K], other {role: [K]}.

    `weights` is lambda w_i c_i^l, and `lam` the lambda in it (1 for a method without one). `tuning` maps every lambda
    that `auto` tried to its loss; empty otherwise.
    """

    sensitivity: Array
    distances: Array
    alpha: Array
    tau: Array
    sigma: Array
    other: dict[str, Array]
    weights: Array
    lam: float
    merged: dict[str, Array]
    spread: float
    tuning: dict[float, float] = field(default_factory=dict)


def sens_merge(
    base: Path, experts: Sequence[Path], data: Sequence[Path], settings: Settings, without: str | None = None
) -> Result:
    """Read the folders and files and do eq. 1-7. `data[j]` holds the calibration rows of `experts[j]`."""
    if without is not None and without not in WITHOUT:
        raise ValueError(f"no such term: {without!r}")
    return merge_family(read_family(base, experts, data, settings, without), settings, without)


def merge_family(family: Family, settings: Settings, without: str | None = None) -> Result:
    """Eq. 1-7 on models and samples in memory."""
    names = tuple(family.base)
    blocks = block_names(names)
    count = len(family.experts)
    groups = {name: block_of(name) or role_of(name) for name in names}
    masses = [group_sensitivities(family, i, groups, settings, without) for i in range(count)]
    sensitivity = np.array([[mass[block] for block in blocks] for mass in masses])

    distances = np.array([[distance(family, i, j, settings, without) for j in range(count)] for i in range(count)])
    if without == "distance_sorted":
        distances = distances.T

    norms = np.linalg.norm(sensitivity, axis=1)  # [K]
    if without == "alpha_norm":
        norms = np.ones(count)
    if without == "alpha_l2":
        norms = np.abs(sensitivity).sum(axis=1)
    alpha = sensitivity / norms[:, None]
    tau = cross_task_factor(distances, settings, without)
    sigma = np.array([apply_rule(alpha[:, b], tau, settings, without) for b in range(len(blocks))]).T
    if without == "layers":
        sigma = np.broadcast_to(sigma.mean(axis=1, keepdims=True), sigma.shape).copy()
    other = {
        role: outside_blocks(np.array([mass[role] for mass in masses]) / norms, tau, sigma, settings, without)
        for role in sorted(set(groups.values()) - set(blocks))
    }

    total = float(count if settings.total is None else settings.total)
    if without == "K":
        total = 1.0
    own = np.ones(count) if settings.weights is None else np.array(settings.weights)
    coefficients = {
        name: total * own * (sigma[:, blocks.index(group)] if group in blocks else other[group])
        for name, group in groups.items()
    }
    update = {name: _update(family, name, coefficients[name], own, settings, without) for name in names}
    tuning: dict[float, float] = {}
    if settings.method == "linear":
        lam = 1.0
    elif settings.lam is None:
        lam, tuning = tune_lambda(family, update)
    else:
        lam = settings.lam
    return Result(
        sensitivity=sensitivity,
        distances=distances,
        alpha=alpha,
        tau=tau,
        sigma=sigma,
        other=other,
        weights=lam * total * own[:, None] * sigma,
        lam=lam,
        merged={name: (0.0 if without == "base" else family.base[name]) + lam * update[name] for name in names},
        spread=float(np.abs(count * sigma - 1.0).max()),
        tuning=tuning,
    )


# ---------------------------------------------------------------------------------------------- models and samples


def read_family(
    base: Path, experts: Sequence[Path], data: Sequence[Path], settings: Settings, without: str | None = None
) -> Family:
    """Read the base, the K experts and their samples, each task encoded once with its own expert's tokenizer."""
    return Family(
        config=read_config(base),
        base=read_weights(base),
        experts=tuple(read_weights(folder) for folder in experts),
        tasks=tuple(
            read_samples(rows, AutoTokenizer.from_pretrained(folder), settings, without)
            for rows, folder in zip(data, experts, strict=True)
        ),
    )


def read_config(folder: Path) -> Config:
    """Read config.json."""
    config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def read_weights(folder: Path) -> dict[str, Array]:
    """Read every tensor of a checkpoint folder as float64, exactly, sorted by name."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            weights[name] = _decode(tensor["dtype"], tensor["data"]).reshape(tensor["shape"])
    if not weights:
        raise FileNotFoundError(f"no safetensors file in {folder}")
    return dict(sorted(weights.items()))


def _decode(dtype: str, data: bytes | bytearray) -> Array:
    """Turn the bytes of a tensor into float64 [n]. NumPy has no bfloat16: it is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, dtype={"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def to_bfloat16(x: Array) -> Array:
    """Round float64 to the nearest bfloat16 (8 significant bits), ties to even; for normal finite numbers and zero."""
    mantissa, exponent = np.frexp(x)
    return np.asarray(np.ldexp(np.round(mantissa * 256.0), exponent - 8))


def read_samples(file: Path, tokenizer: Any, settings: Settings, without: str | None = None) -> tuple[Sample, ...]:
    """Read and encode every row of a JSONL file, in order."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return tuple(encode(json.loads(line), tokenizer, settings, without) for line in lines if line.strip())


def encode(row: Mapping[str, str], tokenizer: Any, settings: Settings, without: str | None = None) -> Sample:
    """Encode one row.

    A pair is [bos] + enc(prompt) + enc(response) + [eos], each part encoded alone and without special tokens; bos only
    if the tokenizer itself begins with one, eos if it has one. `max_length` cuts the prompt's left, then the response's
    right; bos stays, and eos is the response's last token.
    """
    everything = settings.loss == "all" or without == "loss_mask"
    if "text" in row:
        ids = list(tokenizer(row["text"])["input_ids"])[: settings.max_length]
        if without == "bos" and ids[0] == tokenizer.bos_token_id:
            ids = ids[1:]
        return _sample(ids, [True] * len(ids))
    if "instruction" in row:
        prompt, answer = row["instruction"], row["output"]
        if row.get("input"):
            prompt += "\n\n" + row["input"]
    else:
        prompt, answer = row["prompt"], row["response"]

    def part(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    first = [tokenizer.bos_token_id] if adds_bos and without != "bos" else []
    last = [] if tokenizer.eos_token_id is None or without == "eos" else [tokenizer.eos_token_id]
    response = (part(answer) + last)[: settings.max_length - len(first)]
    room = settings.max_length - len(first) - len(response)
    kept = part(prompt)
    kept = kept[max(0, len(kept) - room) :]
    ids = first + kept + response
    return _sample(ids, [everything] * (len(first) + len(kept)) + [True] * len(response))


def _sample(ids: Sequence[int], loss_mask: Sequence[bool]) -> Sample:
    """Make a sample; nothing predicts token 0, so it is no loss token."""
    return Sample(tuple(ids), (False, *loss_mask[1:]))


def block_of(name: str) -> str | None:
    """Return the tensor's block, its name up to and including the first all-digit component, or None outside them."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else None


def block_names(names: Sequence[str]) -> list[str]:
    """Return the L blocks in the order of the model."""
    blocks = {block for name in names if (block := block_of(name)) is not None}
    return sorted(blocks, key=lambda block: int(block.rsplit(".", 1)[1]))


def role_of(name: str) -> str:
    """Return the role of a tensor of a Llama outside the blocks."""
    return {"model.embed_tokens.weight": "embed", "model.norm.weight": "final_norm", "lm_head.weight": "lm_head"}[name]


# ------------------------------------------------------------------------------------------------------- eq. 1-5


def group_sensitivities(
    family: Family, i: int, groups: Mapping[str, str], settings: Settings, without: str | None = None
) -> dict[str, float]:
    """Eq. 1 summed over the samples and each group's parameters (eq. 3): {group: s} of expert i on its own task."""
    weights = family.experts[i]
    samples = family.tasks[i][:1] if without == "samples" else family.tasks[i]
    terms: dict[str, list[Array]] = {name: [] for name in weights}  # a term a sample, shaped like the tensor
    for sample in samples:
        _, gradients = loss_and_gradients(weights, family.config, sample.ids, sample.loss_mask)
        scale = sum(sample.loss_mask) if without == "loss_mean" else 1
        for name, gradient in gradients.items():
            terms[name].append(_score(settings, weights[name], family.base[name], scale * gradient, without))

    masses = dict.fromkeys(groups.values(), 0.0)
    for name, term in terms.items():
        if without == "abs":
            mass = np.sum(term)
        elif without == "abs_per_sample":
            mass = np.abs(np.sum(term, axis=0)).sum()
        else:
            mass = np.abs(term).sum()
        masses[groups[name]] += float(mass)
    return masses


def _score(settings: Settings, weight: Array, base: Array, gradient: Array, without: str | None) -> Array:
    """The score of each parameter for one sample, before the absolute value."""
    if without == "theta":
        return gradient
    if without == "gradient":
        return weight
    if settings.score == "weight":
        return weight * gradient
    if settings.score == "task_vector":
        return (weight - base) * gradient
    if settings.score == "fisher":
        return gradient * gradient
    raise ValueError(f"no such score: {settings.score!r}")


def distance(family: Family, i: int, j: int, settings: Settings, without: str | None = None) -> float:
    """Eq. 4: how far model i stands from expert j on task j's samples; 0 for i = j."""
    if i == j:
        return 0.0
    reference = family.base if without == "distance_expert" else family.experts[j]
    by_sample = []
    for sample in family.tasks[j]:
        ours = forward(family.experts[i], family.config, sample.ids)
        theirs = forward(reference, family.config, sample.ids)
        by_position = logit_distance(ours, theirs, settings.distance)
        if without == "distance_root":
            by_position = by_position**2
        where = positions(sample, "last" if without == "positions" else settings.positions)
        by_sample.append(float(np.mean(by_position[where])))
    return math.fsum(by_sample) / len(by_sample)


def positions(sample: Sample, which: str) -> list[int]:
    """Return the positions that eq. 4 averages over; `last` is the one that predicts the first loss token."""
    predicting = [t - 1 for t, counts in enumerate(sample.loss_mask) if counts]
    return {"all": list(range(len(sample.ids))), "loss": predicting, "last": predicting[:1]}[which]


def logit_distance(ours: Array, theirs: Array, kind: str) -> Array:
    """Return the distance at each position [T] between the logits [T, V] of model i and of expert j."""
    if kind == "l2":
        return np.asarray(np.linalg.norm(ours - theirs, axis=-1))
    if kind == "cosine":
        lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
        return np.asarray(1.0 - (ours * theirs).sum(axis=-1) / lengths)
    log_ours, log_theirs = log_softmax(ours), log_softmax(theirs)
    if kind == "kl":
        return _divergence(log_theirs, log_ours)
    if kind == "js":
        middle = np.logaddexp(log_ours, log_theirs) - math.log(2.0)
        return (_divergence(log_ours, middle) + _divergence(log_theirs, middle)) / 2.0
    raise ValueError(f"no such distance: {kind!r}")


def _divergence(log_p: Array, log_q: Array) -> Array:
    """Return KL(p || q) at each position, in nats."""
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))


def cross_task_factor(distances: Array, settings: Settings, without: str | None = None) -> Array:
    """Eq. 5: tau [K], the row (or column) sums of the distances divided by their sum."""
    sums = distances.sum(axis={"row": 1, "column": 0}[settings.axis])
    if settings.direction == "similarity":
        sums = 1.0 / sums
    return sums if without == "tau_norm" else np.asarray(sums / sums.sum())


# ------------------------------------------------------------------------------------------------------- eq. 6-7


def apply_rule(alpha: Array, tau: Array, settings: Settings, without: str | None = None) -> Array:
    """Eq. 6 for one block or role: sigma [K] from alpha [K] and tau [K]."""
    if without == "alpha":
        alpha = np.ones_like(alpha)
    if without == "tau":
        tau = np.ones_like(tau)
    temperature = 1.0 if without == "temperature" else settings.temperature
    rule = "normalized" if without == "softmax" else settings.rule
    if rule == "normalized":
        return np.asarray(tau * alpha / (tau * alpha).sum())
    exponent: Mapping[str, Callable[[], Array]] = {
        "softmax": lambda: tau * alpha,
        "alpha_only": lambda: alpha,
        "cross_task_only": lambda: tau,
        "additive": lambda: (alpha / alpha.sum() + tau) / 2.0,
        "uniform": lambda: np.zeros_like(tau),
    }
    return np.exp(log_softmax(exponent[rule]() / temperature))


def outside_blocks(alpha: Array, tau: Array, sigma: Array, settings: Settings, without: str | None = None) -> Array:
    """Return sigma [K] of a role outside the blocks, from its own alpha [K], tau [K] and the blocks' sigma [K, L]."""
    if without == "other":
        return np.zeros_like(tau)
    choices: Mapping[str, Callable[[], Array]] = {
        "block_mean": lambda: np.asarray(sigma.mean(axis=1)),
        "own_group": lambda: apply_rule(alpha, tau, settings, without),
        "base": lambda: np.zeros_like(tau),
        "uniform": lambda: np.full_like(tau, 1.0 / tau.size),
    }
    return choices[settings.other]()


def _update(
    family: Family, name: str, coefficients: Array, own: Array, settings: Settings, without: str | None
) -> Array:
    """Eq. 7 without base and lambda: what lambda multiplies, from the w_i c_i [K] of one tensor and the w_i [K]."""
    base = family.base[name]
    experts = [expert[name] for expert in family.experts]
    if settings.method == "linear":
        kept = own.sum() - coefficients.sum()
        mean = (_weighted_sum(coefficients, experts) + kept * base) / own.sum()
        return np.asarray(mean - base)
    if settings.method != "task_arithmetic":
        raise ValueError(f"no such method: {settings.method!r}")
    return _weighted_sum(coefficients, experts if without == "delta" else [expert - base for expert in experts])


def _weighted_sum(coefficients: Array, tensors: Sequence[Array]) -> Array:
    """Return sum over i of coefficients[i] * tensors[i]."""
    return np.asarray(sum(c * tensor for c, tensor in zip(coefficients, tensors, strict=True)))


def tune_lambda(family: Family, update: Mapping[str, Array]) -> tuple[float, dict[float, float]]:
    """Return the lambda of least calibration loss (grid, then +-0.05; ties to the smaller) and all losses tried."""
    losses: dict[float, float] = {}

    def best(candidates: Sequence[float]) -> float:
        for lam in candidates:
            if lam not in losses:
                merged = {name: family.base[name] + lam * update[name] for name in update}
                losses[lam] = mean_loss(family, merged)
        return min(candidates, key=lambda lam: (losses[lam], lam))

    coarse = best(LAMBDA_GRID)
    return best((coarse - LAMBDA_REFINEMENT, coarse, coarse + LAMBDA_REFINEMENT)), losses


def mean_loss(family: Family, weights: Weights) -> float:
    """Return the mean over tasks of the mean sample loss."""
    tasks = []
    for samples in family.tasks:
        values = [cross_entropy(forward(weights, family.config, s.ids), s.ids, s.loss_mask)[0] for s in samples]
        tasks.append(math.fsum(values) / len(values))
    return math.fsum(tasks) / len(tasks)
