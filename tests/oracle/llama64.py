"""A Llama in NumPy float64: the logits, the loss of one sample and its gradients, differentiated by hand.

Written from the formulas alone: no torch and no automatic differentiation, so that an error in either cannot hide here.
Covers Llama and Qwen2: RMSNorm, plain RoPE, causal attention with grouped-query heads, SwiGLU, biases wherever the
weights have one, tied or untied head. Shapes: T tokens, D hidden, H query heads, G key-value heads, d head size,
V vocabulary.

Each operation returns its result and a `Pullback`: a function that takes the gradient of the loss by the result, adds
the gradients by the weights to a dictionary and returns the gradient by the operation's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, Array]
Config = Mapping[str, Any]
Gradients = dict[str, Array]
Pullback = Callable[[Array, Gradients], Array]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def forward(weights: Weights, config: Config, ids: Sequence[int]) -> Array:
    """Return the logits [T, V] of one sequence of T token ids."""
    return _forward(weights, config, ids)[0]


def loss_and_gradients(
    weights: Weights, config: Config, ids: Sequence[int], loss_mask: Sequence[bool]
) -> tuple[float, Gradients]:
    """Return the mean next-token cross entropy of one sample and its gradient by every tensor.

    Token t is a loss token if loss_mask[t]; it is predicted from position t - 1, so token 0 never counts. A tied head
    gives one gradient, under the embedding's name: the sum over both uses.
    """
    logits, pullback = _forward(weights, config, ids)
    value, logits_gradient = cross_entropy(logits, ids, loss_mask)
    gradients: Gradients = {}
    pullback(logits_gradient, gradients)
    return value, gradients


def cross_entropy(logits: Array, ids: Sequence[int], loss_mask: Sequence[bool]) -> tuple[float, Array]:
    """Return the mean cross entropy over the loss tokens and its gradient by the logits [T, V]."""
    targets = np.array([t for t in range(1, len(ids)) if loss_mask[t]], dtype=np.int64)
    if targets.size == 0:
        raise ValueError("a sample without a loss token has no loss")
    tokens = np.asarray(ids)[targets]
    log_probabilities = log_softmax(logits[targets - 1])
    chosen = np.arange(targets.size)
    gradient = np.zeros_like(logits)
    gradient[targets - 1] = np.exp(log_probabilities)
    gradient[targets - 1, tokens] -= 1.0
    return float(-log_probabilities[chosen, tokens].mean()), gradient / targets.size


def log_softmax(logits: Array) -> Array:
    """Return log softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def rope_theta(config: Config) -> float:
    """Return the base of the rotary frequencies; any scaling of them is refused."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"only plain RoPE is written down here, not {kind!r}")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ValueError("the config names no rope_theta")
    return float(theta)


def _forward(weights: Weights, config: Config, ids: Sequence[int]) -> tuple[Array, Pullback]:
    """Return the logits [T, V] and the pullback of the whole model."""
    token_ids = np.asarray(ids, dtype=np.int64)
    eps = float(config["rms_norm_eps"])
    pullbacks: list[Pullback] = []

    hidden = weights[EMBEDDING][token_ids]
    for index in range(int(config["num_hidden_layers"])):
        block = f"model.layers.{index}"
        hidden, pull = _residual(
            hidden, weights, f"{block}.input_layernorm", eps, _attention, config, f"{block}.self_attn"
        )
        pullbacks.append(pull)
        hidden, pull = _residual(
            hidden, weights, f"{block}.post_attention_layernorm", eps, _mlp, config, f"{block}.mlp"
        )
        pullbacks.append(pull)
    hidden, pull = _rms_norm(hidden, weights, "model.norm", eps)
    pullbacks.append(pull)
    head = EMBEDDING if config.get("tie_word_embeddings", False) else HEAD
    logits, pull = _linear(hidden, weights, head.removesuffix(".weight"))
    pullbacks.append(pull)

    def pullback(gradient: Array, gradients: Gradients) -> Array:
        for pull in reversed(pullbacks):
            gradient = pull(gradient, gradients)
        rows = np.zeros_like(weights[EMBEDDING])
        np.add.at(rows, token_ids, gradient)  # a token that occurs twice collects both gradients
        _add(gradients, EMBEDDING, rows)
        return gradient

    return logits, pullback


def _residual(
    hidden: Array,
    weights: Weights,
    norm: str,
    eps: float,
    branch: Callable[[Array, Weights, Config, str], tuple[Array, Pullback]],
    config: Config,
    prefix: str,
) -> tuple[Array, Pullback]:
    """hidden + branch(norm(hidden)), all [T, D]."""
    normed, pull_norm = _rms_norm(hidden, weights, norm, eps)
    out, pull_branch = branch(normed, weights, config, prefix)

    def pullback(gradient: Array, gradients: Gradients) -> Array:
        return gradient + pull_norm(pull_branch(gradient, gradients), gradients)

    return hidden + out, pullback


def _add(gradients: Gradients, name: str, gradient: Array) -> None:
    """Add, not assign: a tied matrix is used twice."""
    gradients[name] = gradients[name] + gradient if name in gradients else gradient


def _linear(x: Array, weights: Weights, prefix: str) -> tuple[Array, Pullback]:
    """x [T, in] @ W.T [in, out], plus a bias [out] if the weights have one."""
    matrix = weights[f"{prefix}.weight"]
    bias = weights.get(f"{prefix}.bias")

    def pullback(gradient: Array, gradients: Gradients) -> Array:
        _add(gradients, f"{prefix}.weight", gradient.T @ x)
        if bias is not None:
            _add(gradients, f"{prefix}.bias", gradient.sum(axis=0))
        return np.asarray(gradient @ matrix)

    return x @ matrix.T + (0.0 if bias is None else bias), pullback


def _rms_norm(x: Array, weights: Weights, prefix: str, eps: float) -> tuple[Array, Pullback]:
    """gain * x / sqrt(mean(x^2) + eps), over the last axis of x [T, D]."""
    gain = weights[f"{prefix}.weight"]
    scale = 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    unit = x * scale

    def pullback(gradient: Array, gradients: Gradients) -> Array:
        _add(gradients, f"{prefix}.weight", (gradient * unit).sum(axis=0))
        by_unit = gradient * gain
        return np.asarray(scale * (by_unit - unit * (by_unit * unit).mean(axis=-1, keepdims=True)))

    return gain * unit, pullback


def _rotate(x: Array, cosines: Array, sines: Array) -> Array:
    """Turn each pair (x[n], x[n + d/2]) of x [heads, T, d] by its angle [T, d/2]; minus the sines turns back."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * cosines - second * sines, second * cosines + first * sines), axis=-1)


def _attention(x: Array, weights: Weights, config: Config, prefix: str) -> tuple[Array, Pullback]:
    """Causal attention of H query heads on G key-value heads; a key-value head serves H/G neighbouring query heads."""
    length = x.shape[0]
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    shared = heads // groups

    frequencies = rope_theta(config) ** (-2.0 * np.arange(size // 2) / size)
    angles = np.arange(length)[:, None] * frequencies[None, :]
    cosines, sines = np.cos(angles), np.sin(angles)

    def split(y: Array, count: int) -> Array:
        return y.reshape(length, count, size).transpose(1, 0, 2)

    def join(y: Array) -> Array:
        return y.transpose(1, 0, 2).reshape(length, -1)

    flat_query, pull_query = _linear(x, weights, f"{prefix}.q_proj")
    flat_key, pull_key = _linear(x, weights, f"{prefix}.k_proj")
    flat_value, pull_value = _linear(x, weights, f"{prefix}.v_proj")
    query = _rotate(split(flat_query, heads), cosines, sines)
    key = np.repeat(_rotate(split(flat_key, groups), cosines, sines), shared, axis=0)
    value = np.repeat(split(flat_value, groups), shared, axis=0)

    scores = query @ key.transpose(0, 2, 1) / np.sqrt(size)
    scores[:, np.triu(np.ones((length, length), dtype=bool), k=1)] = -np.inf
    attention = np.exp(log_softmax(scores))
    out, pull_out = _linear(join(attention @ value), weights, f"{prefix}.o_proj")

    def pullback(gradient: Array, gradients: Gradients) -> Array:
        by_mixed = split(pull_out(gradient, gradients), heads)
        by_attention = by_mixed @ value.transpose(0, 2, 1)
        by_scores = attention * (by_attention - (by_attention * attention).sum(axis=-1, keepdims=True)) / np.sqrt(size)

        def by_group(y: Array) -> Array:
            return np.asarray(y.reshape(groups, shared, length, size).sum(axis=1))

        by_value = by_group(attention.transpose(0, 2, 1) @ by_mixed)
        by_query = _rotate(by_scores @ key, cosines, -sines)
        by_key = _rotate(by_group(by_scores.transpose(0, 2, 1) @ query), cosines, -sines)
        return (
            pull_query(join(by_query), gradients)
            + pull_key(join(by_key), gradients)
            + pull_value(join(by_value), gradients)
        )

    return out, pullback


def _mlp(x: Array, weights: Weights, config: Config, prefix: str) -> tuple[Array, Pullback]:
    """down(silu(gate(x)) * up(x))."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"only silu is written down here, not {config['hidden_act']!r}")
    gate, pull_gate = _linear(x, weights, f"{prefix}.gate_proj")
    up, pull_up = _linear(x, weights, f"{prefix}.up_proj")
    sigmoid = 1.0 / (1.0 + np.exp(-gate))
    active = gate * sigmoid
    out, pull_down = _linear(active * up, weights, f"{prefix}.down_proj")

    def pullback(gradient: Array, gradients: Gradients) -> Array:
        by_product = pull_down(gradient, gradients)
        by_gate = by_product * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        return pull_gate(by_gate, gradients) + pull_up(by_product * active, gradients)

    return out, pullback
