"""An oracle is worth something only if it is right: the hand-written Llama against `transformers`, the rest by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.oracle import llama64
from tests.oracle.families import FamilyFiles, FamilySpec, build_family, random_weights, train_tokenizer
from tests.oracle.sens64 import (
    WITHOUT,
    Family,
    Sample,
    Settings,
    apply_rule,
    block_names,
    cross_task_factor,
    encode,
    logit_distance,
    merge_family,
    outside_blocks,
    read_family,
    read_weights,
    to_bfloat16,
    tune_lambda,
)

IDS = [1, 7, 3, 7, 7, 12, 30, 2, 19, 3, 8]  # some tokens occur twice: their embedding rows collect several gradients
LOSS_MASK = [True, False, False, True, True, False, True, True, False, True, True]

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
ARCHITECTURES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "untied": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "tied": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "one key-value head": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "no groups": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "own head size": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, "head_dim": 8}),
    "biases": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}


def build_model(architecture: str) -> tuple[Any, dict[str, llama64.Array]]:
    """Return a `transformers` model in float64 and the same weights for the oracle."""
    model_class, config_class, options = ARCHITECTURES[architecture]
    model = model_class(config_class(**SHAPE, **options)).double().eval()
    rng = np.random.default_rng(11)
    weights = {}
    for name, parameter in sorted(model.named_parameters()):
        weights[name] = random_weights(name, tuple(parameter.shape), rng)
        parameter.data = torch.from_numpy(weights[name].copy())
    return model, weights


def compute_in_float64(model: Any) -> None:
    """Replace what `transformers` computes in float32 even in a float64 model: RMSNorm and the rotary angles."""

    def rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)

    def rotary(module: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = 2 * module.inv_freq.numel()
        theta = module.config.rope_parameters["rope_theta"]
        frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = position_ids[..., None].double() * frequencies
        return torch.cat((angles, angles), dim=-1).cos(), torch.cat((angles, angles), dim=-1).sin()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(rms_norm, module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = MethodType(rotary, module)


def torch_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of IDS over LOSS_MASK from logits [T, V]."""
    targets = [t for t in range(1, len(IDS)) if LOSS_MASK[t]]
    return torch.nn.functional.cross_entropy(logits[[t - 1 for t in targets]], torch.tensor(IDS)[targets])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_transformers(architecture: str) -> None:
    model, weights = build_model(architecture)
    compute_in_float64(model)
    logits = model(torch.tensor([IDS])).logits[0]
    loss = torch_loss(logits)
    loss.backward()

    np.testing.assert_allclose(
        llama64.forward(weights, model.config.to_dict(), IDS), logits.detach().numpy(), rtol=1e-9
    )
    ours, gradients = llama64.loss_and_gradients(weights, model.config.to_dict(), IDS, LOSS_MASK)
    assert ours == pytest.approx(loss.item(), rel=1e-12)
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        # Some entries all but cancel (the gradient of a key's bias would be 0 without RoPE): they need a floor.
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-9, atol=1e-12 * scale, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unchanged_transformers_agrees_to_float32(architecture: str) -> None:
    """What `compute_in_float64` replaces is the same function: the models differ by rounding only."""
    model, weights = build_model(architecture)
    logits = model.float()(torch.tensor([IDS])).logits[0].detach().numpy()
    np.testing.assert_allclose(llama64.forward(weights, model.config.to_dict(), IDS), logits, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_differences() -> None:
    model, weights = build_model("tied")
    config = model.config.to_dict()
    _, gradients = llama64.loss_and_gradients(weights, config, IDS, LOSS_MASK)
    step = 1e-6
    for name, weight in weights.items():
        entry = np.unravel_index(np.abs(gradients[name]).argmax(), weight.shape)
        values = []
        for sign in (1, -1):
            moved = weight.copy()
            moved[entry] += sign * step
            values.append(llama64.loss_and_gradients({**weights, name: moved}, config, IDS, LOSS_MASK)[0])
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(gradients[name][entry], rel=1e-6), name


def test_what_is_not_written_down_is_refused() -> None:
    with pytest.raises(ValueError, match="llama3"):
        llama64.rope_theta({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}})
    with pytest.raises(ValueError, match="without a loss token"):
        llama64.cross_entropy(np.zeros((2, 3)), [0, 1], [True, False])


def test_old_and_new_configs_name_rope_theta() -> None:
    assert llama64.rope_theta({"rope_theta": 7.0}) == 7.0
    assert llama64.rope_theta({"rope_theta": 7.0, "rope_scaling": None}) == 7.0
    assert llama64.rope_theta({"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}}) == 9.0


# ------------------------------------------------------------------------------------------------- samples and files


PAIR = {"prompt": "abc", "response": "de"}


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_pair_is_bos_prompt_response_eos(adds_bos: bool) -> None:
    tokenizer = train_tokenizer(["x"], adds_bos)  # nothing to merge: a token is a byte
    a, b, c, d, e = tokenizer("abcde", add_special_tokens=False)["input_ids"]
    first = [tokenizer.bos_token_id] if adds_bos else []
    sample = encode(PAIR, tokenizer, Settings())
    assert list(sample.ids) == [*first, a, b, c, d, e, tokenizer.eos_token_id]
    assert list(sample.loss_mask) == [False] * (len(first) + 3) + [True] * 3
    whole = encode(PAIR, tokenizer, Settings(loss="all"))
    assert list(whole.loss_mask) == [False] + [True] * (len(first) + 5)
    text = encode({"text": "abc"}, tokenizer, Settings())
    assert list(text.ids) == [*first, a, b, c]
    assert list(text.loss_mask) == [False] + [True] * (len(first) + 2)


def test_an_instruction_takes_its_input_after_an_empty_line() -> None:
    tokenizer = train_tokenizer(["x"], True)
    row = {"instruction": "ab", "input": "c", "output": "de"}
    same = {"prompt": "ab\n\nc", "response": "de"}
    assert encode(row, tokenizer, Settings()) == encode(same, tokenizer, Settings())
    without_input = {"instruction": "ab", "input": "", "output": "de"}
    same = {"prompt": "ab", "response": "de"}
    assert encode(without_input, tokenizer, Settings()) == encode(same, tokenizer, Settings())


def test_the_prompt_is_cut_on_its_left_then_the_response_on_its_right() -> None:
    tokenizer = train_tokenizer(["x"], False)
    full = encode(PAIR, tokenizer, Settings()).ids
    assert encode(PAIR, tokenizer, Settings(max_length=5)).ids == full[1:]
    assert encode(PAIR, tokenizer, Settings(max_length=2)).ids == full[3:5]


def test_weights_are_read_exactly(tmp_path: Path) -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"b": values.bfloat16(), "h": values.half(), "f": values, "d": values.double()}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = read_weights(tmp_path)
    assert list(weights) == ["b", "d", "f", "h"]
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(weights[name], tensor.double().numpy())


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    values = torch.cat((values, torch.tensor([0.0, 1.0, 1.00390625, 1.01171875, -1.00390625])))  # ties go to even
    np.testing.assert_array_equal(to_bfloat16(values.double().numpy()), values.bfloat16().double().numpy())


# ------------------------------------------------------------------------------------------------ eq. 4 to 7 by hand


def test_distances_of_two_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    ours, theirs = np.log(p)[None] + 3.0, np.log(q)[None]  # a constant does not change a distribution
    middle = (p + q) / 2
    assert logit_distance(ours, theirs, "kl")[0] == pytest.approx(float((q * np.log(q / p)).sum()))
    expected = float((p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()) / 2
    assert logit_distance(ours, theirs, "js")[0] == pytest.approx(expected)
    assert logit_distance(np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]]), "l2")[0] == pytest.approx(5.0)
    assert logit_distance(np.array([[3.0, 0.0]]), np.array([[2.0, 2.0]]), "cosine")[0] == pytest.approx(
        1 - math.sqrt(0.5)
    )


def test_tau_is_the_row_and_on_request_the_column_or_a_similarity() -> None:
    distances = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 1.0], [5.0, 4.0, 0.0]])
    np.testing.assert_allclose(cross_task_factor(distances, Settings()), np.array([3, 4, 9]) / 16)
    np.testing.assert_allclose(cross_task_factor(distances, Settings(axis="column")), np.array([8, 5, 3]) / 16)
    inverse = np.array([1 / 3, 1 / 4, 1 / 9])
    np.testing.assert_allclose(cross_task_factor(distances, Settings(direction="similarity")), inverse / inverse.sum())


def test_rules_by_hand() -> None:
    alpha, tau = np.array([0.6, 0.2]), np.array([0.25, 0.75])

    def first(value: float, other: float) -> float:
        return math.exp(value) / (math.exp(value) + math.exp(other))

    expected = {
        "softmax": first(0.15 / 0.5, 0.15 / 0.5),
        "normalized": 0.5,
        "alpha_only": first(0.6 / 0.5, 0.2 / 0.5),
        "cross_task_only": first(0.25 / 0.5, 0.75 / 0.5),
        "additive": first((0.75 + 0.25) / 1.0, (0.25 + 0.75) / 1.0),
        "uniform": 0.5,
    }
    for rule, value in expected.items():
        sigma = apply_rule(alpha, tau, Settings(rule=rule, temperature=0.5))
        assert sigma.sum() == pytest.approx(1.0)
        assert sigma[0] == pytest.approx(value), rule
    alpha, tau = np.array([0.9, 0.3]), np.array([0.4, 0.6])
    sigma = apply_rule(alpha, tau, Settings(rule="additive", temperature=0.1))
    assert sigma[0] == pytest.approx(first((0.75 + 0.4) / 0.2, (0.25 + 0.6) / 0.2))
    assert apply_rule(alpha, tau, Settings(rule="normalized"))[0] == pytest.approx(0.36 / 0.54)
    assert apply_rule(alpha, tau, Settings())[0] == pytest.approx(first(0.36, 0.18))


def test_outside_the_blocks() -> None:
    alpha, tau, sigma = np.array([0.6, 0.2]), np.array([0.3, 0.7]), np.array([[0.2, 0.4], [0.8, 0.6]])

    def sigma_with(other: str) -> list[float]:
        return list(outside_blocks(alpha, tau, sigma, Settings(other=other)))

    assert sigma_with("block_mean") == pytest.approx([0.3, 0.7])
    assert sigma_with("own_group") == pytest.approx(apply_rule(alpha, tau, Settings()).tolist())
    assert sigma_with("base") == [0.0, 0.0]
    assert sigma_with("uniform") == [0.5, 0.5]


# ----------------------------------------------------------------------------------------------------- whole families


SPEC = FamilySpec(
    "tiny", seed=5, kinds=("pair", "instruction", "text"), sizes=(0.1, 0.3, 0.5), layers=3, rows=(3, 2, 4)
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FamilyFiles:
    return build_family(SPEC, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def family(files: FamilyFiles) -> Family:
    return read_family(files.base, files.experts, files.data, Settings())


def test_a_family_follows_from_its_seed(files: FamilyFiles, tmp_path: Path) -> None:
    again = build_family(SPEC, tmp_path)
    written = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file())
    assert len(written) > 4 * 3
    for file in written:
        assert (files.folder / file).read_bytes() == (again.folder / file).read_bytes(), file


def test_sensitivity_is_the_sum_of_absolute_products(family: Family) -> None:
    result = merge_family(family, Settings())
    prefixes = block_names(tuple(family.base))
    assert prefixes == ["model.layers.0", "model.layers.1", "model.layers.2"]
    expected = 0.0
    for sample in family.tasks[1]:
        _, gradients = llama64.loss_and_gradients(family.experts[1], family.config, sample.ids, sample.loss_mask)
        for name, gradient in gradients.items():
            if name.startswith("model.layers.2."):
                expected += np.abs(family.experts[1][name] * gradient).sum()
    assert result.sensitivity[1, 2] == pytest.approx(expected)
    np.testing.assert_allclose((result.alpha**2).sum(axis=1), 1.0)
    assert result.tau.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(result.sigma.sum(axis=0), 1.0)
    np.testing.assert_allclose(result.weights, 3 * result.sigma)


def test_uniform_coefficients_are_plain_task_arithmetic_and_plain_linear(family: Family) -> None:
    weights = (0.5, 1.0, 2.0)
    task = merge_family(family, Settings(rule="uniform", weights=weights, lam=0.6)).merged
    linear = merge_family(family, Settings(rule="uniform", weights=weights, method="linear")).merged
    for name, base in family.base.items():
        experts = [expert[name] for expert in family.experts]
        deltas = sum(w * (expert - base) for w, expert in zip(weights, experts, strict=True))
        np.testing.assert_allclose(task[name], base + 0.6 * deltas, rtol=1e-12, atol=1e-12)
        mean = sum(w * expert for w, expert in zip(weights, experts, strict=True)) / 3.5
        np.testing.assert_allclose(linear[name], mean, rtol=1e-12, atol=1e-12)


def test_lambda_auto_takes_the_grid_then_halves_the_step_and_breaks_ties_downwards(family: Family) -> None:
    result = merge_family(family, Settings(lam=None))
    assert len(result.tuning) == 17
    assert result.lam == min(result.tuning, key=lambda lam: result.tuning[lam])
    still = {name: np.zeros_like(base) for name, base in family.base.items()}
    assert tune_lambda(family, still)[0] == pytest.approx(0.05)


@pytest.mark.parametrize("term", WITHOUT)
def test_each_term_that_can_be_taken_away_moves_the_merge(family: Family, term: str, files: FamilyFiles) -> None:
    settings = Settings(temperature=0.05)
    whole = merge_family(family, settings)
    read_again = term in ("loss_mask", "eos", "bos")
    damaged_family = read_family(files.base, files.experts, files.data, settings, term) if read_again else family
    damaged = merge_family(damaged_family, settings, term)
    apart = sum(float(((damaged.merged[name] - whole.merged[name]) ** 2).sum()) for name in whole.merged)
    moved = sum(float(((whole.merged[name] - family.base[name]) ** 2).sum()) for name in whole.merged)
    assert math.sqrt(apart / moved) > 1e-2


def test_last_is_the_position_that_predicts_the_first_loss_token(family: Family) -> None:
    sample = Sample((5, 6, 7, 8), (False, False, True, True))
    one = replace(family, tasks=((sample,), (sample,), (sample,)))
    ours, theirs = (llama64.forward(family.experts[i], family.config, sample.ids) for i in (0, 1))
    by_position = np.linalg.norm(ours - theirs, axis=1)
    for which, expected in {"all": by_position.mean(), "loss": by_position[1:3].mean(), "last": by_position[1]}.items():
        assert merge_family(one, Settings(positions=which)).distances[0, 1] == pytest.approx(expected), which
