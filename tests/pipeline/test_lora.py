"""Adapters in a merge, in a calibration, and extracted from models: against PEFT and against the models merged and saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import sensmerge as sm
from sensmerge.cli.extract_lora import show
from sensmerge.errors import IncompatibleModelsError, NonFiniteError, OutputError, RecipeError
from sensmerge.pipeline.extracting import extract_lora
from tests.adapters import edit_config, load, merged_by_peft, save_adapter, save_base, tiny_qwen2
from tests.builders import byte_tokenizer, tiny_gpt2, tiny_llama, write_jsonl
from tests.conftest import Run

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, two adapters, the same two merged by PEFT and saved, and samples."""
    folder = tmp_path_factory.mktemp("family")
    base = save_base(tiny_llama(), folder / "base")
    byte_tokenizer().save_pretrained(base)
    for name, seed in (("one", 1), ("two", 2)):
        adapter = save_adapter(base, folder / name, seed=seed, target_modules=MODULES, size=0.1)
        whole = load(base)
        whole.load_state_dict(merged_by_peft(base, adapter))
        whole.save_pretrained(folder / f"{name}-merged")
        byte_tokenizer().save_pretrained(folder / f"{name}-merged")
        rows = [{"prompt": f"{name} {at}: ", "response": "abcdefgh"[at:]} for at in range(3)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def recipe(folder: Path, name: str, **content: Any) -> Path:
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def merged(folder: Path, out: Path, **content: Any) -> dict[str, Tensor]:
    sm.merge(sm.load_recipe(recipe(folder, out.name, **content)), out)
    return load_file(out / "model.safetensors")


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float) -> None:
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=within, atol=within)


# ------------------------------------------------------------------------------------------------------------ merging


def test_one_adapter_of_weight_1_is_peft_s_merge(family: Path, tmp_path: Path) -> None:
    """task_arithmetic, `base+adapter` and the bare adapter: the same bytes, and PEFT's numbers within 1e-6."""
    common: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base"}
    found = merged(family, tmp_path / "plus", models=[{"model": "base+one"}], **common)
    close(found, merged_by_peft(family / "base", family / "one"), 1e-6)
    assert (tmp_path / "plus" / "tokenizer.json").is_file()
    merged(family, tmp_path / "bare", models=[{"model": "one"}], **common)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plus", "bare"))
    assert one == other
    assert set(json.loads((tmp_path / "plus" / "sensmerge" / "merge.json").read_text())["inputs"]) == {
        "base",
        "base+one",
    }


def test_a_bf16_base_gives_bf16_rounded_once(family: Path, tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=MODULES)
    found = merged(
        tmp_path,
        tmp_path / "out",
        merge_method="task_arithmetic",
        base_model="base",
        models=[{"model": "base+adapter"}],
    )
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, before in load_file(base / "model.safetensors").items():
        assert found[name].dtype == torch.bfloat16
        exact = before.double()
        if f"base_model.model.{name[:-7]}.lora_A.weight" in factors:
            a, b = (factors[f"base_model.model.{name[:-7]}.lora_{side}.weight"].double() for side in "AB")
            exact = exact + 6 / 4 * (b @ a)
        # Half a unit, and a little for float32.
        assert ((found[name].double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-7).all(), name


def test_linear_of_two_adapters(family: Path, tmp_path: Path) -> None:
    """Without a base in the recipe: half of each merged model; any number of threads gives the same bytes."""
    models = [{"model": f"base+{name}", "parameters": {"weight": 0.5}} for name in ("one", "two")]
    found = merged(family, tmp_path / "out", merge_method="linear", models=models)
    one, two = (merged_by_peft(family / "base", family / name) for name in ("one", "two"))
    close(found, {name: (one[name] + two[name]) / 2 for name in one}, 1e-6)
    again = sm.load_recipe(recipe(family, "again", merge_method="linear", models=models))
    for jobs in (1, 3):
        sm.merge(again, tmp_path / f"jobs-{jobs}", jobs=jobs)
        same = (tmp_path / f"jobs-{jobs}" / "model.safetensors").read_bytes()
        assert same == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_ties_of_adapters_is_ties_of_the_merged_models(family: Path, tmp_path: Path) -> None:
    """Methods that trim see the same task vectors (but for float32's last bits, which may decide a tie)."""
    common: dict[str, Any] = {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.5}}
    found = merged(family, tmp_path / "a", models=[{"model": "base+one"}, {"model": "base+two"}], **common)
    expected = merged(family, tmp_path / "b", models=[{"model": "one-merged"}, {"model": "two-merged"}], **common)
    unlike = sum(int(((found[name] - expected[name]).abs() > 1e-5).sum()) for name in found)
    assert unlike <= 0.002 * sum(tensor.numel() for tensor in found.values())


def test_nan_in_a_factor_names_the_adapter(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family, tmp_path / "family")
    file = tmp_path / "family" / "one" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][1, 2] = float("nan")
    save_file(tensors, file)
    edit_config(tmp_path / "family" / "one", base_model_name_or_path="base")
    with pytest.raises(
        NonFiniteError, match=r"base\+one, tensor 'model.layers.1.mlp.up_proj.weight', element \[0, 2\]"
    ):
        merged(tmp_path / "family", tmp_path / "out", merge_method="linear", models=[{"model": "base+one"}])


def test_an_output_in_the_adapter_s_folder_is_refused(family: Path) -> None:
    with pytest.raises(OutputError, match="overwrite a model"):
        merged(family, family / "one" / "out", merge_method="linear", models=[{"model": "base+one"}])


def test_the_fix_for_another_base_works(family: Path, tmp_path: Path, sensmerge: Run) -> None:
    """Exit 4; with the line of the message in the recipe the merge goes through."""
    save_base(tiny_llama(3), tmp_path / "unlike")
    models = [{"model": f"{tmp_path / 'unlike'}+{family / 'one'}"}]
    path = recipe(tmp_path, "other", merge_method="linear", models=models)
    done = sensmerge("merge", str(path), str(tmp_path / "out"))
    assert done.returncode == 4
    assert "add `allow: [adapter_base]`" in done.stderr
    path.write_text(path.read_text() + "allow: [adapter_base]\n")
    done = sensmerge("merge", str(path), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("score", ["weight", "task_vector"])
def test_calibration_sees_the_adapted_model(family: Path, tmp_path: Path, score: str) -> None:
    """Profiles and distances are those of the models merged and saved; their fingerprints are the adapters' own."""

    def measured(names: list[str], name: str) -> tuple[Any, Any]:
        models = [
            {"model": model, "sens": {"data": f"{data}.jsonl"}}
            for model, data in zip(names, ("one", "two"), strict=True)
        ]
        path = recipe(
            family,
            f"{name}-{score}",
            merge_method="task_arithmetic",
            base_model="base",
            models=models,
            sens={"score": score},
        )
        return sm.calibrate(sm.load_recipe(path), profiles_dir=tmp_path / name)

    profiles, alignment = measured(["base+one", "two"], "lora")
    expected, distances = measured(["one-merged", "two-merged"], "whole")
    for found, whole in zip(profiles, expected, strict=True):
        np.testing.assert_allclose(found.per_sample, whole.per_sample, rtol=1e-4)
        assert found.tensors.keys() == whole.tensors.keys()
        assert found.fingerprint != whole.fingerprint
    np.testing.assert_allclose(alignment.distances, distances.distances, rtol=1e-4)
    assert profiles[0].fingerprint != profiles[1].fingerprint


def test_lambda_is_chosen_on_an_adapted_base(family: Path, tmp_path: Path) -> None:
    """A `base+adapter` as base_model: the losses of `lambda: auto` are those with the base merged and saved."""
    told = []
    for base in ("base+one", "one-merged"):
        path = recipe(
            family,
            f"auto-{base}",
            merge_method="task_arithmetic",
            base_model=base,
            models=[{"model": "two-merged", "sens": {"data": "two.jsonl"}}],
            parameters={"lambda": "auto"},
            sens={"rule": "uniform"},
        )
        sm.merge(sm.load_recipe(path), tmp_path / base, profiles_dir=tmp_path / f"{base}.sens")
        told.append(json.loads((tmp_path / base / "sensmerge" / "scale.json").read_text())["tried"])
    np.testing.assert_allclose(told[0], told[1], rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- extracting


def fine_tuned(base: Path, folder: Path, *, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Path:
    """The base with every tensor moved, or those whose names hold one of `only` and none of `without`."""
    model, random = load(base), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (not only or any(part in name for part in only)) and not any(part in name for part in without):
                parameter.add_((torch.randn(parameter.shape, generator=random) * 0.1).to(parameter.dtype))
    model.save_pretrained(folder)
    return folder


def own(name: str, state: Mapping[str, Tensor]) -> Tensor:
    return state[name] if name in state else state[f"transformer.{name}"]


BASES: dict[str, Any] = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
}


@pytest.mark.parametrize("kind", BASES)
def test_the_full_rank_gives_the_fine_tune_back(tmp_path: Path, kind: str) -> None:
    """By PEFT and by ourselves, whatever changed: matrices, norms, biases, embeddings, heads."""
    made: PreTrainedModel = BASES[kind]()
    base = save_base(made, tmp_path / "base")
    tuned = fine_tuned(base, tmp_path / "tuned")
    result = extract_lora(str(tuned), str(base), tmp_path / "adapter", rank=1000)
    state, by_peft = load(tuned).state_dict(), merged_by_peft(base, tmp_path / "adapter")
    for name, tensor in state.items():
        torch.testing.assert_close(by_peft[name], tensor, rtol=1e-5, atol=5e-6)
    ours = merged(tmp_path, tmp_path / "ours", merge_method="linear", models=[{"model": "base+adapter"}])
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, own(name, state), rtol=1e-5, atol=5e-6)
    assert result.unchanged == 0
    assert all(row.rank <= 16 and row.error < 1e-5 for row in result.matrices)
    assert len(result.matrices) == (14 if kind != "gpt2" else 8)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_low_rank_is_the_best_approximation(tmp_path: Path, kind: str) -> None:
    """Each matrix against NumPy's SVD in float64; what is told of energy and error is true."""
    base = save_base(BASES[kind](), tmp_path / "base")
    tuned = fine_tuned(base, tmp_path / "tuned", only=("layers", "h."), without=("norm", "ln_", "bias"))
    result = extract_lora(str(tuned), str(base), tmp_path / "adapter", rank=3)
    assert not result.full
    assert not result.biases
    before, after = load(base).state_dict(), load(tuned).state_dict()
    found = merged_by_peft(base, tmp_path / "adapter")
    for row in result.matrices:
        delta = (own(row.tensor, after) - own(row.tensor, before)).double().numpy()
        left, sizes, right = np.linalg.svd(delta, full_matrices=False)
        best = left[:, :3] * sizes[:3] @ right[:3]
        np.testing.assert_allclose((own(row.tensor, found) - own(row.tensor, before)).numpy(), best, atol=2e-5)
        assert row.rank == 3
        assert row.energy == pytest.approx((sizes[:3] ** 2).sum() / (sizes**2).sum(), rel=1e-4)
        assert row.error == pytest.approx(np.linalg.norm(delta - best) / np.linalg.norm(delta), rel=1e-3)


def test_energy_decides_the_rank_of_each_matrix(tmp_path: Path) -> None:
    """The least rank that keeps it, and PEFT counts each with scale 1."""
    base = save_base(tiny_llama(), tmp_path / "base")
    save_adapter(base, tmp_path / "planted", target_modules=MODULES, r=2, rank_pattern={"layers.1.mlp.up_proj": 5})
    planted = merged(tmp_path, tmp_path / "tuned", merge_method="linear", models=[{"model": "base+planted"}])
    result = extract_lora(str(tmp_path / "tuned"), str(base), tmp_path / "adapter", energy=0.999999)
    assert {row.tensor: row.rank for row in result.matrices if row.rank != 2} == {
        "model.layers.1.mlp.up_proj.weight": 5
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^model\.layers\.1\.mlp\.up_proj": 5}
    close(planted, merged_by_peft(base, tmp_path / "adapter"), 2e-3)
    half = extract_lora(str(tmp_path / "tuned"), str(base), tmp_path / "half", energy=0.5)
    for row in half.matrices:
        delta = (planted[row.tensor] - load(base).state_dict()[row.tensor]).double().numpy()
        shares = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2)
        assert row.rank == int(np.argmax(shares / shares[-1] >= 0.5)) + 1


def test_what_did_not_change_gets_no_factors(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base", torch.bfloat16)
    tuned = fine_tuned(base, tmp_path / "tuned", only=("layers.1.self_attn.v_proj", "layers.0.input_layernorm"))
    result = extract_lora(str(tuned), str(base), tmp_path / "adapter", rank=4)
    assert [row.tensor for row in result.matrices] == ["model.layers.1.self_attn.v_proj.weight"]
    assert result.full == ("model.layers.0.input_layernorm.weight",)
    names = {
        name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }
    assert names == {
        "model.layers.1.self_attn.v_proj.lora_A.weight",
        "model.layers.1.self_attn.v_proj.lora_B.weight",
        "model.layers.0.input_layernorm.weight",
    }


def test_a_merge_of_ours_becomes_an_adapter(family: Path, tmp_path: Path, sensmerge: Run) -> None:
    """Two adapters of rank 4 merged have rank 8; the command's JSON tells what was kept."""
    models = [{"model": "base+one"}, {"model": "base+two"}]
    whole = merged(family, tmp_path / "merge", merge_method="task_arithmetic", base_model="base", models=models)
    base, out = str(family / "base"), tmp_path / "adapter"
    done = sensmerge("extract-lora", str(tmp_path / "merge"), base, "-o", str(out), "--rank", "8", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["matrices"]) == 14
    assert all(row["energy"] > 0.999999 and row["rank"] == 8 for row in told["matrices"])
    close(whole, merged_by_peft(family / "base", out), 1e-5)
    assert (out / "tokenizer.json").is_file()


def test_the_table_tells_what_was_kept_and_what_is_stored_in_full(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = fine_tuned(family / "base", tmp_path / "tuned")
    show(extract_lora(str(tuned), str(family / "base"), tmp_path / "adapter", rank=16))
    shown = capsys.readouterr().out
    for told in ("model.layers.1", "kept energy", "100.00 %", "modules_to_save", "lm_head.weight", "model.norm.weight"):
        assert told in shown


@pytest.mark.parametrize(
    "arguments", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}], ids=str
)
def test_a_rank_or_an_energy(family: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="--rank 16"):
        extract_lora(str(family / "one-merged"), str(family / "base"), tmp_path / "out", **arguments)


def test_what_cannot_be_extracted_is_refused(family: Path, tmp_path: Path) -> None:
    base, tuned = str(family / "base"), str(family / "one-merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    for out in (tmp_path / "full", family / "base" / "inside"):
        with pytest.raises(OutputError):
            extract_lora(tuned, base, out, rank=2)
    assert (tmp_path / "full" / "file").read_text() == "kept"
    with pytest.raises(IncompatibleModelsError, match="nothing to extract"):
        extract_lora(base, base, tmp_path / "out", rank=2)
    with pytest.raises(IncompatibleModelsError, match="do not fit together"):
        extract_lora(str(save_base(tiny_gpt2(), tmp_path / "gpt2")), base, tmp_path / "out", rank=2)
    with pytest.raises(IncompatibleModelsError, match="adapter itself"):
        extract_lora(tuned, f"{base}+{family / 'two'}", tmp_path / "out", rank=2)
    broken = tmp_path / "broken"
    shutil.copytree(family / "one-merged", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        extract_lora(str(broken), base, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
