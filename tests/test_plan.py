"""Plans: which tensors are read for each output tensor, with which numbers; every fault known before a weight is read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensmerge.errors import IncompatibleModelsError, RecipeError, SensmergeError
from sensmerge.pipeline.models import open_models
from sensmerge.plan import make_plan, shards_of
from sensmerge.recipe import load_recipe
from sensmerge.records import Coefficients, MergePlan, TensorInput, TensorPlan
from tests.builders import write_checkpoint

INNER = {"input_layernorm.weight": (4,), "self_attn.q_proj.weight": (4, 4), "mlp.up_proj.weight": (8, 4)}
OUTSIDE = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (6, 4)}


def model(
    folder: Path, name: str, blocks: int = 4, dtype: torch.dtype = torch.float32, **changes: torch.Tensor | None
) -> Path:
    """A checkpoint of a Llama's names; `changes` (with __ for dots) replace tensors, None takes one away."""
    tensors: dict[str, torch.Tensor] = {key: torch.zeros(shape, dtype=dtype) for key, shape in OUTSIDE.items()}
    for block in range(blocks):
        for inner, shape in INNER.items():
            tensors[f"model.layers.{block}.{inner}"] = torch.zeros(shape, dtype=dtype)
    for key, tensor in changes.items():
        if tensor is None:
            del tensors[key.replace("__", ".")]
        else:
            tensors[key.replace("__", ".")] = tensor
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": blocks}
    return write_checkpoint(folder / name, tensors, config)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and two experts of four blocks."""
    for name in ("base", "a", "b"):
        model(tmp_path, name)
    return tmp_path


def plan(
    folder: Path,
    text: str,
    *,
    scale: float | None = None,
    coefficients: Coefficients | None = None,
    shard_bytes: int = 10**9,
) -> MergePlan:
    """The plan of the recipe `text` in `folder`."""
    path = folder / "recipe.yml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    recipe = load_recipe(path)
    with open_models(recipe) as opened:
        return make_plan(recipe, opened.readers, coefficients=coefficients, scale=scale, shard_bytes=shard_bytes)


def by_name(plan: MergePlan) -> Mapping[str, TensorPlan]:
    return {tensor.spec.name: tensor for tensor in plan.tensors}


def refused(folder: Path, text: str, kind: type[SensmergeError] = RecipeError) -> SensmergeError:
    with pytest.raises(kind) as caught:
        plan(folder, text)
    assert str(caught.value).count("\n") == 3
    return caught.value


TWO = "models: [{model: b}, {model: a}]\nbase_model: base\n"

# ---------------------------------------------------------------------------------------------------- whole models


def test_inputs_in_processing_order(models: Path) -> None:
    found = plan(models, "merge_method: task_arithmetic\n" + TWO)
    tensor = by_name(found)["model.layers.1.mlp.up_proj.weight"]
    assert tensor.base == TensorInput("base", "model.layers.1.mlp.up_proj.weight")
    assert [each.model for each in tensor.experts] == ["a", "b"]
    assert (tensor.weights, tensor.coefficients, tensor.scale) == ((1.0, 1.0), (1.0, 1.0), 1.0)
    assert tensor.options["normalize"] is False
    assert tensor.per_model == {}
    assert (tensor.group, tensor.spec.shape) == ("model.layers.1", (8, 4))
    assert (found.method, found.base, found.models, found.scale) == ("task_arithmetic", "base", ("a", "b", "base"), 1.0)
    assert len(found.tensors) == 4 * 3 + 3


def test_weights_stay_with_their_models_whatever_the_order(models: Path) -> None:
    one = "merge_method: ties\nbase_model: base\nmodels:\n- {model: b, parameters: {weight: 2, density: 0.2}}\n- model: a\n"
    other = "merge_method: ties\nbase_model: base\nmodels:\n- model: a\n- {model: b, parameters: {weight: 2, density: 0.2}}\n"
    assert plan(models, one) == plan(models, other)
    tensor = plan(models, one).tensors[0]
    assert tensor.weights == (1.0, 2.0)
    assert tensor.per_model == {"density": (1.0, 0.2)}


def test_gradients_filters_and_levels(models: Path) -> None:
    """Four blocks: t is 0, 1/3, 2/3, 1 inside, and 0 for every tensor outside, the last norm and the head included."""
    found = by_name(
        plan(
            models,
            """\
            merge_method: ties
            base_model: base
            models:
              - model: a
                parameters:
                  weight: [0, 0.3]
                  density: [{filter: mlp, value: [1, 0.4]}, {filter: layers.3, value: 0.9}]
              - model: b
                parameters: {weight: [{filter: self_attn, value: 2}]}
            parameters:
              weight: [{filter: norm, value: 7}, {value: 5}]
              density: 0.5
              lambda: [1, 4]
              normalize: [true, false]
            """,
        )
    )
    for block in range(4):
        at = found[f"model.layers.{block}.self_attn.q_proj.weight"]
        mlp = found[f"model.layers.{block}.mlp.up_proj.weight"]
        norm = found[f"model.layers.{block}.input_layernorm.weight"]
        assert at.weights == pytest.approx((0.1 * block, 2.0))
        assert mlp.weights == pytest.approx((0.1 * block, 5.0))
        assert norm.weights == pytest.approx((0.1 * block, 7.0))
        assert mlp.per_model["density"] == pytest.approx((1 - 0.2 * block, 0.5))
        assert at.per_model["density"] == (0.9 if block == 3 else 0.5, 0.5)
        assert at.scale == pytest.approx(1.0 + block)
        assert at.options["normalize"] is (block < 3)
    for name in OUTSIDE:
        assert found[name].weights == (0.0, 7.0 if name == "model.norm.weight" else 5.0)
        assert found[name].scale == 1.0


def test_a_single_block_is_the_last_one(tmp_path: Path) -> None:
    """mergekit's t is 1 for a slice of one layer, and 0 outside."""
    for name in ("base", "a"):
        model(tmp_path, name, blocks=1)
    found = by_name(
        plan(tmp_path, "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: [0, 1]}\n")
    )
    assert found["model.layers.0.mlp.up_proj.weight"].options == {"t": 1.0}
    assert found["model.norm.weight"].options == {"t": 0.0}


def test_a_scale_that_is_given_holds_for_every_tensor(models: Path) -> None:
    text = "merge_method: task_arithmetic\nparameters: {lambda: [0, 1]}\n" + TWO
    assert {tensor.scale for tensor in plan(models, text, scale=0.3).tensors} == {0.3}
    assert plan(models, text, scale=0.3).scale == 0.3
    assert plan(models, text).scale == 0.5
    assert len({tensor.scale for tensor in plan(models, text).tensors}) == 4


@pytest.mark.parametrize(
    ("text", "base", "experts"),
    [
        ("merge_method: linear\n" + TWO, None, ["a", "b"]),
        ("merge_method: linear\nbase_model: base\nmodels: [{model: b}, {model: base}]\n", None, ["b", "base"]),
        ("merge_method: slerp\nbase_model: base\nmodels: [{model: a}, {model: base}]\nparameters: {t: 0.5}\n", "base", ["a"]),
        ("merge_method: karcher\n" + TWO, None, ["a", "b", "base"]),
        ("merge_method: nuslerp\n" + TWO, "base", ["a", "b"]),
        ("merge_method: nuslerp\nmodels: [{model: b}, {model: a}]\n", None, ["a", "b"]),
        ("merge_method: passthrough\nbase_model: base\nmodels: [{model: a}]\n", None, ["a"]),
        (
            "merge_method: linear\nbase_model: base\nsens: {rule: uniform}\n"
            "models: [{model: b, sens: {data: x}}, {model: a, sens: {data: x}}]\n", "base", ["a", "b"],
        ),
    ],
)  # fmt: skip
def test_which_models_are_read(models: Path, text: str, base: str | None, experts: list[str]) -> None:
    found = plan(models, text)
    for tensor in found.tensors:
        assert (tensor.base and tensor.base.model) == base
        assert [each.model for each in tensor.experts] == experts
    assert found.models == tuple(sorted({*experts, *([base] if base else [])}))
    size = (models / "a" / "model.safetensors").stat().st_size
    header = int.from_bytes((models / "a" / "model.safetensors").read_bytes()[:8], "little") + 8
    assert found.bytes_read == len(found.models) * (size - header)


def test_dtypes_and_bytes(tmp_path: Path) -> None:
    """Stored dtypes tensor by tensor, unless the recipe names one; a base's win over an expert's."""
    model(tmp_path, "base", dtype=torch.bfloat16, model__norm__weight=torch.zeros(4))
    model(tmp_path, "a", dtype=torch.float16)
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]\n"
    assert {tensor.spec.dtype for tensor in plan(tmp_path, text).tensors} == {"BF16", "F32"}
    assert {tensor.spec.dtype for tensor in plan(tmp_path, text + "dtype: float32\n").tensors} == {"F32"}
    found = plan(tmp_path, text + "dtype: float32\nout_dtype: float16\n")
    assert {tensor.spec.dtype for tensor in found.tensors} == {"F16"}
    elements = sum(tensor.spec.elements for tensor in found.tensors)
    assert found.bytes_read == (2 * elements + 2 * 4) + 2 * elements
    assert found.bytes_written == sum(len(shard.header()) + shard.data_bytes for shard in shards_of(found))


def test_tensors_that_are_no_numbers_are_only_copied(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        model(tmp_path, name, model__layers__0__mask=torch.ones(3, dtype=torch.bool))
    found = by_name(
        plan(
            tmp_path,
            "merge_method: slerp\nbase_model: base\nmodels: [{model: b}]\nparameters: {t: {filter: weight, value: 0.5}}\n",
        )
    )
    tensor = found["model.layers.0.mask"]
    assert (tensor.base, [each.model for each in tensor.experts]) == (None, ["b", "base"])
    assert (tensor.spec.dtype, tensor.options, tensor.per_model) == ("BOOL", {}, {})


def test_a_needed_option_that_no_setting_gives(models: Path) -> None:
    start = "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\n"
    error = refused(models, start + "parameters: {t: [{filter: self_attn, value: 0.5}, {filter: mlp, value: 0.5}]}\n")
    assert error.what == "'t' has no value for tensor 'lm_head.weight'"
    assert "- value: 0.5" in error.fix
    assert "'t' has no value" in refused(models, start).what


def test_weights_that_sum_to_zero_somewhere(models: Path) -> None:
    """A normalising sum divides by them; an election divides by those that agree."""
    text = """\
        merge_method: {}
        base_model: base
        models:
          - {{model: a, parameters: {{weight: [-1, 2]}}}}
          - {{model: b, parameters: {{weight: [{{filter: layers.3.mlp, value: -2}}, {{value: 3}}]}}}}
        parameters: {{normalize: {}}}
        """
    for method in ("linear", "task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"):
        error = refused(models, text.format(method, "true"))
        assert "the weights sum to zero" in error.why
        assert "normalize: true" in error.why
        assert "normalize: false" in error.fix
        assert "model.layers.3.mlp.up_proj.weight" in error.where
        plan(models, text.format(method, "false"))
    for method in ("ties", "dare_ties", "breadcrumbs_ties", "della"):
        plan(models, text.format(method, "true"))


def test_options_that_cannot_hold_together_name_the_tensor(models: Path) -> None:
    """DELLA's density plus or minus epsilon must lie inside (0, 1)."""
    error = refused(
        models,
        "merge_method: della\nparameters: {density: [{filter: layers.2, value: 0.1}, {value: 0.5}], epsilon: 0.2}\n"
        + TWO,
    )
    assert "della" in error.what
    assert "3 tensor(s)" in error.what
    assert "model.layers.2.input_layernorm.weight" in error.where


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("density: [0.5, 0.6]", "one density for each model"),
        ("density: [{filter: mlp, value: 0.4}, {value: 0.5}]", "one density for each model"),
        ("density: 0.5, normalize: true", None),
    ],
)
def test_a_global_scope_needs_one_density(models: Path, parameters: str, words: str | None) -> None:
    text = f"merge_method: ties\nparameters: {{scope: global, {parameters}}}\n{TWO}"
    if words is None:
        plan(models, text)
        return
    error = refused(models, text)
    assert words in error.what
    assert error.why.count("model.") + error.why.count("lm_head") == 2, "two tensors are named"


def test_a_global_scope_is_for_all_tensors_of_whole_models(models: Path) -> None:
    scope = "parameters: {scope: [{filter: mlp, value: global}, {value: tensor}], density: 0.5}\n"
    assert "for all tensors" in refused(models, f"merge_method: ties\n{scope}{TWO}").what
    text = """\
        merge_method: ties
        base_model: base
        slices:
          - sources: [{model: base, layer_range: [0, 4]}, {model: a, layer_range: [0, 4]}]
        parameters: {scope: global, density: 0.5}
        """
    assert "`scope: global` with `slices:`" in refused(models, text).what


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    model(tmp_path, "base")
    model(tmp_path, "a", lm_head__weight=torch.zeros(7, 4), model__norm__weight=None, extra__weight=torch.zeros(1))
    error = refused(
        tmp_path, "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]\n", IncompatibleModelsError
    )
    assert "3 tensor(s)" in error.what
    for words in (
        "'lm_head.weight' is [7, 4] in a, [6, 4] in base",
        "'model.norm.weight' is missing in a",
        "'extra.weight'",
    ):
        assert words in error.why


def test_two_names_of_one_folder(models: Path) -> None:
    error = refused(models, "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: ./a}]\n")
    assert "one model" in error.what
    assert (
        "one model"
        in refused(models, "merge_method: karcher\nbase_model: ./a\nmodels: [{model: a}, {model: b}]\n").what
    )
    plan(models, "merge_method: linear\nbase_model: ./a\nmodels: [{model: a}, {model: b}]\n")


# ---------------------------------------------------------------------------------------------------------- slices

FRANKEN = """\
    merge_method: passthrough
    slices:
      - sources: [{model: a, layer_range: [0, 3]}]
      - sources: [{model: b, layer_range: [1, 4], parameters: {scale: [{filter: layers.2, value: 0.5}, {value: [1, 3]}]}}]
      - sources: [{model: a, layer_range: [3, 4]}]
        parameters: {scale: [5, 6]}
    """


def test_stacked_slices_are_numbered_anew(models: Path) -> None:
    found = plan(models, FRANKEN)
    names = by_name(found)
    assert len(names) == 7 * 3 + 3
    expected = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("a", 3)]
    for block, (source, number) in enumerate(expected):
        for inner, shape in INNER.items():
            tensor = names[f"model.layers.{block}.{inner}"]
            assert tensor.experts == (TensorInput(source, f"model.layers.{number}.{inner}"),)
            assert (tensor.base, tensor.spec.shape) == (None, shape)
    # A model's own filter is held against the name in the model: layer 2 of b is layer 4 of the output.
    scales = [names[f"model.layers.{block}.mlp.up_proj.weight"].per_model["scale"][0] for block in range(7)]
    assert scales == [1.0, 1.0, 1.0, 1.0, 0.5, 3.0, 6.0]
    assert found.models == ("a", "b")
    assert [spec.name for shard in shards_of(found) for spec in shard.tensors] == [t.spec.name for t in found.tensors]


def test_what_lies_outside_the_blocks(models: Path) -> None:
    """From the first slice; the last norm and the head from the last one, with that slice's parameters at t = 0."""
    text = """\
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 2]}]
          - sources: [{model: b, layer_range: [2, 4]}]
            parameters: {scale: [0.25, 1]}
        """
    found = by_name(plan(models, text))
    sources = {name: (found[name].experts[0].model, found[name].per_model["scale"]) for name in OUTSIDE}
    assert sources == {
        "model.embed_tokens.weight": ("a", (1.0,)),
        "model.norm.weight": ("b", (0.25,)),
        "lm_head.weight": ("b", (0.25,)),
    }
    for name in ("a", "b"):
        config = models / name / "config.json"
        config.write_text(config.read_text().replace("{", '{"tie_word_embeddings": true, ', 1))
    tied = by_name(plan(models, text))
    sources = {name: tied[name].experts[0].model for name in OUTSIDE if name in tied}
    assert sources == {"model.embed_tokens.weight": "a", "model.norm.weight": "b"}, "a tied head is the embedding"


def test_each_slice_has_its_base_levels_and_gradients(models: Path) -> None:
    model(models, "c", blocks=6)
    found = by_name(
        plan(
            models,
            """\
            merge_method: task_arithmetic
            base_model: base
            parameters: {weight: [{filter: layers.1., value: 9}, {value: 0.5}], lambda: 0.8}
            slices:
              - sources:
                  - {model: b, layer_range: [2, 4]}
                  - {model: base, layer_range: [0, 2]}
                  - {model: a, layer_range: [0, 2], parameters: {weight: [0, 1]}}
                parameters: {lambda: [{filter: layers.1.mlp, value: 0.1}]}
              - base_model: c
                sources:
                  - {model: c, layer_range: [3, 6]}
                  - {model: b, layer_range: [1, 4]}
            """,
        )
    )
    first = found["model.layers.1.mlp.up_proj.weight"]
    assert first.base == TensorInput("base", "model.layers.1.mlp.up_proj.weight")
    assert [each.tensor.split(".")[2] for each in first.experts] == ["1", "3"]
    assert (first.weights, first.scale) == ((1.0, 0.5), 0.1)
    assert found["model.layers.0.mlp.up_proj.weight"].weights == (0.0, 0.5)
    assert found["model.layers.1.self_attn.q_proj.weight"].scale == 0.8
    second = found["model.layers.2.self_attn.q_proj.weight"]
    assert second.base == TensorInput("c", "model.layers.3.self_attn.q_proj.weight")
    assert second.experts == (TensorInput("b", "model.layers.1.self_attn.q_proj.weight"),)
    assert second.weights == (9.0,)
    assert found["model.norm.weight"].base == TensorInput("c", "model.norm.weight")
    assert found["model.embed_tokens.weight"].base == TensorInput("base", "model.embed_tokens.weight")


def test_a_base_beside_the_sources_stands_at_their_layers(models: Path) -> None:
    text = "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nslices: [{sources: [{model: a, layer_range: [2, 4]}]}]\n"
    assert by_name(plan(models, text))["model.layers.0.mlp.up_proj.weight"].base == TensorInput(
        "base", "model.layers.2.mlp.up_proj.weight"
    )


def test_layers_that_a_model_does_not_have(models: Path) -> None:
    error = refused(
        models,
        """\
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 4]}]
          - sources: [{model: b, layer_range: [2, 6]}]
        """,
    )
    assert error.where.endswith("recipe.yml:4")
    assert "[2, 6] of 'b', which has 4 blocks" in error.why


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__layers__2__mlp__up_proj__weight": None}, "'model.layers.2.mlp.up_proj.weight' is missing in b"),
        ({"model__layers__2__mlp__up_proj__weight": torch.zeros(9, 4)}, "is [9, 4] in b, [8, 4] in a ('model.layers.0."),
        ({"model__layers__2__extra": torch.zeros(1)}, "'model.layers.2.extra' of b is not in a"),
        ({"lm_head__weight": torch.zeros(7, 4)}, "'lm_head.weight' is [7, 4] in b, [6, 4] in a"),
        ({"model__norm__weight": None}, "'model.norm.weight' is missing in b"),
    ],
)  # fmt: skip
def test_slices_of_models_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    model(tmp_path, "a")
    model(tmp_path, "b", **changes)
    text = "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}]}]\n"
    assert words in refused(tmp_path, text, IncompatibleModelsError).why


def test_a_stack_of_unlike_models_is_refused(tmp_path: Path) -> None:
    """config.json of the output is that of one model: blocks that are like none of its own would not load."""
    model(tmp_path, "a")
    model(tmp_path, "b", model__layers__1__mlp__up_proj__weight=torch.zeros(12, 4))
    text = """\
        merge_method: passthrough
        slices:
          - sources: [{{model: a, layer_range: [0, 2]}}]
          - sources: [{{model: b, layer_range: [{}, 4]}}]
        """
    error = refused(tmp_path, text.format(1), IncompatibleModelsError)
    assert "'model.layers.1.mlp.up_proj.weight' of b, [12, 4], is like no tensor of a" in error.why
    plan(tmp_path, text.format(2))


# ------------------------------------------------------------------------------------------------------------ sens


def coefficients(layers: int) -> Coefficients:
    """σ of two experts that tells layer and expert apart: the second's is 1 - the first's."""
    sigma = [0.1 + 0.2 * layer for layer in range(layers)]
    return Coefficients(
        schema=1, preset="paper", rule="softmax", temperature=1.0, total=2.0, lambda_=1.0, models=["b", "a"],
        layers=[f"model.layers.{layer}" for layer in range(layers)], alpha=[[1.0] * layers] * 2, tau=[0.5, 0.5],
        sigma=[sigma, [1 - s for s in sigma]], w=[1.0, 1.0], weights=[[1.0] * layers] * 2,
        other={"embed": [0.25, 0.75], "final_norm": [0.5, 0.5], "lm_head": [0.125, 0.875]}, spread=0.5, warnings=[], inputs="",
    )  # fmt: skip


def test_coefficients_follow_their_experts(models: Path) -> None:
    """They are listed in recipe order, b then a; a plan lists a then b."""
    text = "merge_method: task_arithmetic\nbase_model: base\nsens: {preset: paper}\nmodels:\n"
    text += "- {model: b, sens: {data: x}}\n- {model: a, sens: {data: x}}\n"
    found = by_name(plan(models, text, coefficients=coefficients(4)))
    for layer in range(4):
        sigma = 0.1 + 0.2 * layer
        expected = (float(np.float32(2 * (1 - sigma))), float(np.float32(2 * sigma)))
        assert found[f"model.layers.{layer}.mlp.up_proj.weight"].coefficients == expected
    assert found["lm_head.weight"].coefficients == (1.75, 0.25)


def test_coefficients_of_slices_are_those_of_their_layers(models: Path) -> None:
    """Blocks of the output are numbered anew; their coefficients were measured in the experts' own layers."""
    text = """\
        merge_method: task_arithmetic
        base_model: base
        sens: {preset: paper}
        slices:
          - sources:
              - {model: b, layer_range: [0, 2], sens: {data: x}}
              - {model: a, layer_range: [0, 2], sens: {data: x}}
          - sources:
              - {model: b, layer_range: [1, 4]}
              - {model: a, layer_range: [1, 4]}
        """
    found = by_name(plan(models, text, coefficients=coefficients(4)))
    for block, layer in enumerate([0, 1, 1, 2, 3]):
        sigma = 0.1 + 0.2 * layer
        tensor = found[f"model.layers.{block}.mlp.up_proj.weight"]
        assert tensor.group == f"model.layers.{layer}"
        assert tensor.coefficients == (float(np.float32(2 * (1 - sigma))), float(np.float32(2 * sigma)))
