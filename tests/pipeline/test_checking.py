"""Models that do not fit together are refused before anything is merged, and every fix works when pasted."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

import sensmerge as sm
from sensmerge.errors import IncompatibleModelsError, RecipeError, SensmergeError, SeveralErrors
from sensmerge.pipeline import dry_run
from sensmerge.pipeline.checking import check_related
from sensmerge.pipeline.models import open_models
from sensmerge.pipeline.weighing import measurements
from tests.builders import byte_tokenizer, llama_config, tiny_gpt2, tiny_llama, write_jsonl

Change = Callable[[dict[str, torch.Tensor]], None]


def save(
    model: Any, folder: Path, *, seed: int | None = None, size: float = 0.1, dtype: torch.dtype | None = None
) -> Path:
    """`model` in a folder; with a seed moved by `size` of its weights."""
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * parameter.std(correction=0) * noise)
    (model if dtype is None else model.to(dtype)).save_pretrained(folder)
    return folder


def family(folder: Path, *, dtypes: Sequence[torch.dtype] = (torch.float32,) * 3, **changes: Any) -> list[Path]:
    """A base and two experts."""
    names = ("base", "a", "b")
    return [
        save(tiny_llama(0, **changes), folder / name, seed=number or None, dtype=dtype)
        for number, (name, dtype) in enumerate(zip(names, dtypes, strict=True))
    ]


def configure(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change: Change) -> None:
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def recipe(
    folder: Path, *more: str, method: str = "task_arithmetic", models: Sequence[str] = ("a", "b"), base: bool = True
) -> Path:
    lines = [f"merge_method: {method}", *(["base_model: base"] if base else []), "models:"]
    path = folder / "recipe.yml"
    path.write_text("\n".join([*lines, *(f"  - model: {name}" for name in models), *more]) + "\n")
    return path


def merged(path: Path, out: str = "out") -> Path:
    sm.merge(sm.load_recipe(path), path.parent / out)
    return path.parent / out


def refused(path: Path) -> SensmergeError:
    """The error of a merge, which is that of a dry run too, and leaves nothing behind."""
    out = path.parent / "never"
    with pytest.raises(SensmergeError) as caught:
        sm.merge(sm.load_recipe(path), out)
    with pytest.raises(type(caught.value)) as dry:
        dry_run(sm.load_recipe(path), out)
    assert str(dry.value) == str(caught.value)
    assert not out.exists()
    return caught.value


def pasted(path: Path, error: SensmergeError) -> None:
    """Put the line that a fix prints into the recipe."""
    line = re.search(r"`(allow: \[.*?\])`", error.fix)
    assert line is not None, error.fix
    kept = [each for each in path.read_text().split("\n") if not each.startswith("allow:")]
    path.write_text("\n".join([*kept, line[1], ""]))


def loads(folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_configs_that_change_the_mathematics_are_refused_all_at_once(tmp_path: Path) -> None:
    base, a, b = family(tmp_path)
    configure(
        a, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, max_position_embeddings=99
    )
    configure(b, hidden_act="gelu")
    path = recipe(tmp_path)
    error = refused(path)
    assert isinstance(error, IncompatibleModelsError)
    for said in (
        "rms_norm_eps: 1e-06 in base, b; 1e-05 in a",
        "rope_theta: 10000.0 in base, b; 500000.0 in a",
        "hidden_act",
    ):
        assert said in error.why
    assert "max_position" not in str(error)
    pasted(path, error)
    assert "allow: [hidden_act, rms_norm_eps, rope_theta]" in path.read_text()
    out = merged(path)
    said = json.loads((out / "config.json").read_text())
    assert said["rms_norm_eps"] == 1e-6
    assert said["hidden_act"] == json.loads((base / "config.json").read_text())["hidden_act"] == "silu"


def test_a_fix_keeps_what_was_allowed_before(tmp_path: Path) -> None:
    _, a, _ = family(tmp_path)
    configure(a, rms_norm_eps=1e-5, hidden_act="gelu")
    path = recipe(tmp_path, "allow: [rms_norm_eps]")
    error = refused(path)
    assert "rms_norm_eps" not in error.why
    pasted(path, error)
    merged(path)


@pytest.mark.parametrize(
    ("names", "near"),
    [("[rope_tehta]", "rope_theta"), ("[unrelate, rms_norm_eps]", "unrelated"), ("[qwertyuiop]", None)],
)
def test_unknown_names_in_allow_are_refused(tmp_path: Path, names: str, near: str | None) -> None:
    family(tmp_path)
    path = recipe(tmp_path, f"allow: {names}")
    error = refused(path)
    assert isinstance(error, RecipeError)
    if near is None:
        assert error.fix == "remove `allow:`"
        path.write_text(path.read_text().replace(f"allow: {names}", ""))
    else:
        assert f"did you mean '{near}'" in error.why
        pasted(path, error)
    merged(path)


def test_a_config_key_of_the_models_may_be_allowed(tmp_path: Path) -> None:
    """Though nothing differs in it: a recipe may say more than these models need."""
    family(tmp_path)
    merged(recipe(tmp_path, "allow: [rope_theta, rope_scaling, initializer_range, unrelated, symlinks, adapter_base]"))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "della", "model_stock", "sce"])
def test_experts_of_another_base_are_refused(tmp_path: Path, method: str) -> None:
    """All of them by name, each with its distance; one from this base is not."""
    save(tiny_llama(0), tmp_path / "base")
    save(tiny_llama(0), tmp_path / "kin", seed=1, size=0.7)
    for seed, name in ((7, "stranger"), (8, "other")):
        save(tiny_llama(seed), tmp_path / name)
    path = recipe(tmp_path, method=method, models=("kin", "stranger", "other"))
    error = refused(path)
    assert isinstance(error, IncompatibleModelsError)
    ratios = dict(re.findall(r"is (\d\.\d\d) for (\w+)", error.why))
    assert sorted(ratios.values()) == ["other", "stranger"]
    assert all(1.3 < float(ratio) < 1.5 for ratio in ratios)
    pasted(path, error)
    merged(path)
    with open_models(sm.load_recipe(path)) as models:
        found = check_related(sm.load_recipe(path), models)
    assert found["kin"] == pytest.approx(0.7, abs=0.05)
    assert found["other"] > 1.3


def test_methods_without_task_vectors_do_not_ask(tmp_path: Path) -> None:
    save(tiny_llama(0), tmp_path / "base")
    save(tiny_llama(1), tmp_path / "a")
    merged(recipe(tmp_path, "parameters: {t: 0.5}", method="slerp", models=("a",)))


def test_faults_of_tensors_configs_and_origin_are_told_together(tmp_path: Path) -> None:
    _, a, _ = family(tmp_path)
    save(tiny_llama(3), tmp_path / "b")
    configure(a, hidden_act="gelu")
    rewrite(a, lambda found: found.__delitem__("model.norm.weight"))
    error = refused(recipe(tmp_path, "allow: [unrelatet]"))
    assert isinstance(error, SeveralErrors)
    assert "4 faults" in str(error)
    for word in ("unrelatet", "model.norm.weight", "hidden_act", "not fine-tuned from this base"):
        assert word in str(error)


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear"])
@pytest.mark.parametrize("base_tied", [True, False])
def test_tied_and_untied_models_make_an_untied_one(tmp_path: Path, base_tied: bool, method: str) -> None:
    """One expert of weight 1 comes out as itself: its own head, or its embedding where that was its head."""
    base = tiny_llama(0, tie_word_embeddings=True)
    save(base, tmp_path / "tied")
    own = LlamaForCausalLM(llama_config())
    own.load_state_dict(base.state_dict())
    own.lm_head.weight = torch.nn.Parameter(own.lm_head.weight.detach().clone())
    save(own, tmp_path / "untied", seed=1)
    (tmp_path / ("tied" if base_tied else "untied")).rename(tmp_path / "base")
    (tmp_path / ("untied" if base_tied else "tied")).rename(tmp_path / "a")
    out = merged(recipe(tmp_path, method=method, models=("a",)))
    model, expert = loads(out), loads(tmp_path / "a")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(model(ids).logits, expert(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bare", ["base", "a"])
def test_gpt2_with_and_without_its_prefix(tmp_path: Path, bare: str) -> None:
    """And with the masks that old checkpoints store in one of them."""
    for name, seed in (("base", None), ("a", 1)):
        save(tiny_gpt2(0), tmp_path / name, seed=seed)
    wanted = tensors(tmp_path / "a")

    def strip(found: dict[str, torch.Tensor]) -> None:
        for name in list(found):
            found[name.removeprefix("transformer.")] = found.pop(name)
        found["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        found["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(tmp_path / bare, strip)
    out = merged(recipe(tmp_path, models=("a",)))
    loads(out, GPT2LMHeadModel)
    found = tensors(out)
    assert len(found) == len(wanted)
    for name, values in wanted.items():
        there = name.removeprefix("transformer.") if bare == "base" else name
        torch.testing.assert_close(found[there], values, rtol=0, atol=1e-6)


def test_slices_of_models_with_other_prefixes(tmp_path: Path) -> None:
    for name, seed in (("base", None), ("a", 1)):
        save(tiny_gpt2(0), tmp_path / name, seed=seed)

    def strip(found: dict[str, torch.Tensor]) -> None:
        for name in list(found):
            found[name.removeprefix("transformer.")] = found.pop(name)

    rewrite(tmp_path / "a", strip)
    path = tmp_path / "recipe.yml"
    sources = "".join(f"  - sources: [{{model: {m}, layer_range: [0, 2]}}]\n" for m in ("base", "a"))
    path.write_text(f"merge_method: passthrough\nbase_model: base\nslices:\n{sources}")
    model = loads(merged(path), GPT2LMHeadModel)
    assert model.config.n_layer == 4
    assert torch.equal(model.transformer.h[2].mlp.c_fc.weight, tensors(tmp_path / "a")["h.0.mlp.c_fc.weight"])


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Half the distance between neighbours at 1, which a nearest rounding may be off by; float32's three roundings inside, too.
HALF_STEPS = {"F32": 2.0**-22, "F16": 2.0**-11 + 2.0**-22, "BF16": 2.0**-8 + 2.0**-22}


@pytest.mark.parametrize("kinds", list(itertools.product(DTYPES, repeat=3)), ids="-".join)
def test_dtypes_mix_freely(tmp_path: Path, kinds: tuple[str, str, str]) -> None:
    """Base and experts in any dtypes, against float64; written as the base is, or as the recipe says."""
    folders = family(tmp_path, dtypes=[DTYPES[kind] for kind in kinds])
    exact = {}
    for name in tensors(folders[0]):
        origin, a, b = (tensors(folder)[name].double() for folder in folders)
        exact[name] = a + b - origin
    path = recipe(tmp_path)
    for kind, more in ((kinds[0], ""), ("F32", "dtype: float32")):
        path.write_text(recipe(tmp_path).read_text() + more)
        for name, found in tensors(merged(path, f"out-{kind}-{len(more)}")).items():
            assert found.dtype == DTYPES[kind]
            largest = max(float(tensors(folder)[name].abs().max()) for folder in folders)
            tiny = 2.0**-25 if kind == "F16" else 0.0
            error = (found.double() - exact[name]).abs() - HALF_STEPS[kind] * exact[name].abs()
            assert float(error.max()) <= tiny + 2.0**-22 * largest, name


def test_float64_is_refused_by_name(tmp_path: Path) -> None:
    _, a, _ = family(tmp_path)
    name = "model.norm.weight"
    rewrite(a, lambda found: found.update({name: found[name].double()}))
    error = refused(recipe(tmp_path))
    assert name in error.why
    assert "F64" in error.why
    assert "float32" in error.fix


def test_whole_numbers_must_be_equal(tmp_path: Path) -> None:
    """They are copied; where they differ there is nothing to add."""
    folders = family(tmp_path)
    name = "model.layers.0.table"
    for folder in folders:
        rewrite(folder, lambda found: found.update({name: torch.arange(5)}))
    assert torch.equal(tensors(merged(recipe(tmp_path)))[name], torch.arange(5))
    rewrite(folders[2], lambda found: found.update({name: torch.arange(5) + 1}))
    with pytest.raises(IncompatibleModelsError, match=name):
        merged(recipe(tmp_path), "other")
    assert not (tmp_path / "other").exists()


def calibrated(folder: Path, text: str) -> Path:
    """A recipe with a `sens:` block, over two experts with samples of their own."""
    for name in ("base", "a", "b"):
        byte_tokenizer().save_pretrained(folder / name)
    write_jsonl(folder / "data.jsonl", [{"text": "one two three"}, {"text": "four"}])
    models = "".join(f"  - {{model: {name}, sens: {{data: data.jsonl}}}}\n" for name in "ab")
    path = folder / "recipe.yml"
    path.write_text(f"merge_method: task_arithmetic\nbase_model: base\nmodels:\n{models}{text}\n")
    return path


@pytest.mark.parametrize("base_tied", [True, False])
def test_coefficients_of_tied_and_untied_models(tmp_path: Path, base_tied: bool) -> None:
    """Every tensor has its coefficient, the second matrix too; a λ cannot be tuned on a base that lacks it."""
    tied = tiny_llama(0, tie_word_embeddings=True)
    own = LlamaForCausalLM(llama_config())
    own.load_state_dict(tied.state_dict())
    own.lm_head.weight = torch.nn.Parameter(own.lm_head.weight.detach().clone())
    save(tied if base_tied else own, tmp_path / "base")
    save(tied, tmp_path / "a", seed=1)
    save(own, tmp_path / "b", seed=2)
    for other in ("block_mean", "own_group"):
        out = merged(calibrated(tmp_path, f"sens: {{temperature: 0.1, other: {other}}}"), f"out-{other}")
        assert loads(out).lm_head.weight.shape == (259, 16)
    profiles, alignment = sm.calibrate(sm.load_recipe(tmp_path / "recipe.yml"))
    outside = measurements(profiles, alignment, ["a", "b"]).outside
    assert outside["lm_head"][0] == outside["embed"][0] > 0, "a tied matrix is measured once, with both its uses"
    assert outside["lm_head"][1] != outside["embed"][1]
    path = calibrated(tmp_path, "sens: {preset: calibrated}")
    if base_tied:
        error = refused(path)
        assert isinstance(error, RecipeError)
        path = calibrated(tmp_path, "sens: {preset: calibrated}\nparameters: {lambda: 0.5}")
    merged(path)


def test_a_profile_is_measured_anew_where_names_have_changed(tmp_path: Path) -> None:
    """The base of a recipe decides how tensors are called, and a profile speaks of them by name."""
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        save(tiny_gpt2(0), tmp_path / name, seed=seed)
    path = calibrated(tmp_path, "sens: {temperature: 0.1}")
    first = tensors(merged(path, "first"))

    def strip(found: dict[str, torch.Tensor]) -> None:
        for name in list(found):
            found[name.removeprefix("transformer.")] = found.pop(name)

    rewrite(tmp_path / "base", strip)
    second = tensors(merged(path, "second"))
    assert {f"transformer.{name}" for name in second} == first.keys()
    assert all(torch.equal(values, first[f"transformer.{name}"]) for name, values in second.items())


@pytest.mark.parametrize("allowed", ["", "allow: [rms_norm_eps]"])
def test_comparing_configs_costs_no_import(tmp_path: Path, allowed: str) -> None:
    """Models that say the same, or whose differences are allowed, are merged without torch and transformers."""
    _, a, _ = family(tmp_path)
    if allowed:
        configure(a, rms_norm_eps=1e-5)
    path = recipe(tmp_path, allowed, method="ties")
    code = (
        f"import sys, sensmerge as sm; sm.merge(sm.load_recipe({str(path)!r}), {str(tmp_path / 'out')!r});"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
