"""A LoRA adapter on a base is the model that PEFT's merge_and_unload gives, whatever the adapter's kind and however it is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sensmerge import progress
from sensmerge.checkpoints.formats import to_float32
from sensmerge.checkpoints.header import read_header
from sensmerge.checkpoints.lora import config as lora_config
from sensmerge.checkpoints.lora.adapted import AdaptedModel
from sensmerge.checkpoints.opening import Opening
from sensmerge.checkpoints.source import Checkpoint
from sensmerge.errors import IncompatibleModelsError, InputFileError, SensmergeError
from tests.adapters import edit_config, load, merged_by_peft, save_adapter, save_base, tiny_qwen2
from tests.builders import tiny_gpt2, tiny_llama


def opened(name: str | Path, folder: Path, *allow: str) -> Checkpoint:
    return Opening([folder], frozenset(allow)).open(str(name), where="a test")


def adapted(folder: Path, base: str = "base", adapter: str = "adapter") -> AdaptedModel:
    model = opened(f"{base}+{adapter}", folder)
    assert isinstance(model, AdaptedModel)
    return model


def values(model: Checkpoint, name: str) -> Tensor:
    spec = model.tensors[name]
    return torch.from_numpy(to_float32(model.read(name, 0, spec.elements), spec.dtype)).reshape(spec.shape)


def own_name(name: str, merged: Mapping[str, Tensor]) -> str:
    """A stored tensor's name in the model: GPT-2's checkpoints may lack the prefix."""
    return name if name in merged else f"transformer.{name}"


LLAMA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_MODULES = ["c_attn", "c_proj", "c_fc"]

CASES: dict[str, tuple[Callable[..., PreTrainedModel], dict[str, Any]]] = {
    "llama": (tiny_llama, {"target_modules": LLAMA_MODULES}),
    "odd rank": (tiny_llama, {"r": 5}),
    "rslora": (tiny_llama, {"use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        tiny_llama,
        {
            "target_modules": LLAMA_MODULES,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.0.mlp.up_proj": 7, "down_proj": 3},
            "alpha_pattern": {"q_proj": 9, r".*\.1\.mlp\..*": 2, "k_proj": 1.5},
        },
    ),
    "patterns of rslora": (tiny_llama, {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"up": 3}}),
    "one layer": (tiny_llama, {"layers_to_transform": [1]}),
    "modules to save": (tiny_llama, {"modules_to_save": ["embed_tokens", "lm_head", "norm", "k_proj"]}),
    "head": (tiny_llama, {"target_modules": ["lm_head", "q_proj"]}),
    "every bias": (tiny_qwen2, {"bias": "all", "target_modules": ["q_proj", "o_proj"]}),
    "bias of lora layers": (tiny_qwen2, {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
    "lora_bias": (tiny_qwen2, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 9}),
    "lora_bias and bias": (tiny_qwen2, {"lora_bias": True, "bias": "all", "target_modules": ["q_proj"]}),
    "gpt2": (tiny_gpt2, {"target_modules": GPT2_MODULES, "fan_in_fan_out": True}),
    "gpt2, flag unset": (tiny_gpt2, {"target_modules": GPT2_MODULES, "bias": "all"}),
    "gpt2, norms": (tiny_gpt2, {"target_modules": ["c_proj"], "modules_to_save": ["ln_1", "ln_f"]}),
    "gaussian": (tiny_llama, {"init_lora_weights": "gaussian"}),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}  # fmt: skip


# One case of each kind of change is enough for the rounding.
ROUNDED = ("llama", "gpt2", "modules to save", "lora_bias", "head")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES]
    + [(case, dtype) for case in ROUNDED for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_every_tensor_is_what_peft_merges(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """float32 within 1e-6; rounded to the base's dtype within one unit in the last place (PEFT rounds twice)."""
    make, config = CASES[case]
    base = save_base(make(), tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    merged = merged_by_peft(base, adapter)
    model, plain = adapted(tmp_path), opened("base", tmp_path)
    assert model.tensors.keys() == plain.tensors.keys()
    differing = 0
    for name, spec in model.tensors.items():
        expected, found = merged[own_name(name, merged)], values(model, name)
        assert model.stored_dtype(name) == plain.tensors[name].dtype
        differing += not torch.equal(found, values(plain, name))
        assert spec.dtype == ("F32" if name in model.changes else plain.tensors[name].dtype)
        if dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        else:
            # PEFT rounds ΔW before it adds it, so its own error is one rounding of ΔW and one of the sum.
            unit = torch.finfo(dtype).eps * (expected.float().abs() + (found - values(plain, name)).abs())
            assert ((found.to(dtype).float() - expected.float()).abs() <= unit + torch.finfo(dtype).tiny).all(), name
    assert differing == len(model.changes) > 0


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bf16 base, two adapters, and GPT-2's."""
    folder = tmp_path_factory.mktemp("lora")
    base = save_base(tiny_llama(), folder / "base", torch.bfloat16)
    save_adapter(base, folder / "adapter", target_modules=LLAMA_MODULES, r=6, modules_to_save=["norm"])
    save_adapter(base, folder / "other", seed=2)
    save_base(tiny_llama(5), folder / "another", torch.bfloat16)
    gpt2 = save_base(tiny_gpt2(), folder / "gpt2")
    save_adapter(gpt2, folder / "gpt2-adapter", target_modules=GPT2_MODULES, bias="all")
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` to spoil."""
    shutil.copytree(made, tmp_path / "made")
    # PEFT wrote the path of the base it was given.
    for adapter, base in (("adapter", "base"), ("other", "base"), ("gpt2-adapter", "gpt2")):
        edit_config(tmp_path / "made" / adapter, base_model_name_or_path=str(tmp_path / "made" / base))
    return tmp_path / "made"


@pytest.mark.parametrize("names", ["base+adapter", "gpt2+gpt2-adapter"])
def test_bytes_do_not_depend_on_where_a_reading_begins_or_ends(made: Path, names: str) -> None:
    """Whole, in odd pieces, element by element, and from several threads at once."""
    model = opened(names, made)
    chance = np.random.default_rng(0)
    whole = {name: model.read(name, 0, spec.elements).tobytes() for name, spec in model.tensors.items()}

    def check(name: str) -> None:
        item = len(whole[name]) // model.tensors[name].elements
        cuts = sorted({0, *chance.integers(0, model.tensors[name].elements, 12).tolist(), model.tensors[name].elements})
        pieces = [model.read(name, start, stop - start).tobytes() for start, stop in pairwise(cuts)]
        assert b"".join(pieces) == whole[name]
        for at in cuts[:-1]:
            assert model.read(name, at, 1).tobytes() == whole[name][at * item : (at + 1) * item]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, [*whole, *reversed(whole)]))


def test_a_tensor_larger_than_all_pieces(tmp_path: Path) -> None:
    """Rows longer than a kernel's block and a tensor longer than a read of the base: float64 says what they are."""
    base = save_base(tiny_llama(hidden_size=16, intermediate_size=5000), tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["up_proj", "down_proj"], r=7)
    model, factors = adapted(tmp_path), load_file(adapter / "adapter_model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        a, b = (factors[f"base_model.model.{name[:-7]}.lora_{side}.weight"].double() for side in "AB")
        expected = values(opened("base", tmp_path), name).double() + 6 / 7 * (b @ a)
        torch.testing.assert_close(values(model, name).double(), expected, rtol=1e-6, atol=1e-6)
        halves = [model.read(name, 0, 33333).tobytes(), model.read(name, 33333, 80000 - 33333).tobytes()]
        assert b"".join(halves) == model.read(name, 0, 80000).tobytes()


def test_few_factors_are_kept(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the number of layers, and what was dropped is read again."""
    monkeypatch.setattr("sensmerge.checkpoints.lora.factors.KEPT_BYTES", 2000)
    small, large = adapted(made), adapted(made)
    monkeypatch.undo()
    for _ in range(2):
        for name, spec in small.tensors.items():
            monkeypatch.setattr("sensmerge.checkpoints.lora.factors.KEPT_BYTES", 2000)
            found = small.read(name, 0, spec.elements).tobytes()
            monkeypatch.undo()
            assert found == large.read(name, 0, spec.elements).tobytes()
    kept = small._file._kept
    assert sum(values.nbytes for values in kept.values()) <= 2000 < sum(v.nbytes for v in large._file._kept.values())


# --------------------------------------------------------------------------------------------------- names and layouts


def rewrite(adapter: Path, rename: Callable[[str], str]) -> None:
    """Save the adapter's tensors under other names."""
    file = adapter / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


LAYOUTS: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight") if "lora_" in name else name,
    "modules_to_save": lambda name: name.replace("norm.weight", "norm.modules_to_save.weight"),
    "modules_to_save with a name": lambda name: name.replace("norm.weight", "norm.modules_to_save.default.weight"),
    "base_layer": lambda name: name.replace("_proj.lora", "_proj.base_layer.lora"),
    "without prefix": lambda name: name.removeprefix("base_model.model."),
    "of the model without its head": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "of a model that holds this one": lambda name: name.replace(".model.model.", ".model.wrapped.model."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_mean_the_same(made: Path, copied: Path, layout: str) -> None:
    rewrite(copied / "adapter", LAYOUTS[layout])
    one, other = adapted(made), adapted(copied)
    assert one.changes.keys() == other.changes.keys()
    for name, spec in one.tensors.items():
        assert one.read(name, 0, spec.elements).tobytes() == other.read(name, 0, spec.elements).tobytes()


@pytest.mark.parametrize("has_prefix", [True, False])
def test_gpt2_checkpoints_with_and_without_their_prefix(made: Path, copied: Path, has_prefix: bool) -> None:
    """The hub's gpt2 stores `h.0.…`, transformers saves `transformer.h.0.…`; square Conv1D weights are no exception."""
    file = copied / "gpt2" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    prefix = "transformer." if has_prefix else ""
    save_file({prefix + name: tensor for name, tensor in bare.items()}, file, metadata={"format": "pt"})
    model = adapted(copied, "gpt2", "gpt2-adapter")
    merged = merged_by_peft(made / "gpt2", made / "gpt2-adapter")
    for name in model.tensors:
        expected = merged["transformer." + name.removeprefix("transformer.")]
        torch.testing.assert_close(values(model, name), expected, rtol=1e-6, atol=1e-6)


def test_a_head_that_is_tied_and_saved_twice(tmp_path: Path) -> None:
    """Both ends saved: one matrix if they are equal, else refused."""
    base = save_base(tiny_llama(tie_word_embeddings=True), tmp_path / "base")

    def equal(trained: dict[str, Tensor]) -> None:
        ends = [tensor for name, tensor in trained.items() if "modules_to_save" in name]
        assert len(ends) == 2
        ends[1].copy_(ends[0])

    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    save_adapter(base, tmp_path / "adapter", tweak=equal, **both)
    merged = merged_by_peft(base, tmp_path / "adapter")
    model = adapted(tmp_path)
    assert "lm_head.weight" not in model.tensors
    torch.testing.assert_close(values(model, "model.embed_tokens.weight"), merged["lm_head.weight"])
    save_adapter(base, tmp_path / "unlike", **both)
    assert "differ, and the base ties them" in refused(tmp_path, "base+unlike").why
    save_adapter(base, tmp_path / "one", modules_to_save=["embed_tokens"])
    assert "embed_tokens" in refused(tmp_path, "base+one").why
    save_adapter(base, tmp_path / "adapted", target_modules=["lm_head"])
    assert "it adapts 'lm_head'" in refused(tmp_path, "base+adapted").why


# ---------------------------------------------------------------------------------------------------------- which base


def test_an_adapter_alone_finds_its_base(copied: Path) -> None:
    """By the path it names, or by one relative to itself."""
    whole = adapted(copied)
    for named in (str(copied / "base"), "base", "../base"):
        edit_config(copied / "adapter", base_model_name_or_path=named)
        alone = opened(copied / "adapter", copied if named == "base" else copied / "adapter")
        assert isinstance(alone, AdaptedModel)
        assert alone.fingerprint() == whole.fingerprint()
        assert (alone.path, alone.label) == (copied / "base", str(copied / "adapter"))


def test_a_folder_with_a_plus_in_its_name(copied: Path) -> None:
    """A path that exists as it stands wins, and each side may have one."""
    (copied / "base").rename(copied / "ba+se")
    (copied / "adapter").rename(copied / "ad+apter")
    edit_config(copied / "ad+apter", base_model_name_or_path=str(copied / "ba+se"))
    assert not isinstance(opened("ba+se", copied), AdaptedModel)
    assert isinstance(opened("ba+se+ad+apter", copied), AdaptedModel)
    assert isinstance(opened("ad+apter", copied), AdaptedModel)


def test_an_adapter_of_another_base_is_refused_by_its_weights(made: Path) -> None:
    error = refused(made, "another+adapter")
    assert error.exit_code == 4
    assert "was trained on another base" in error.what
    assert "`allow: [adapter_base]`" in error.fix
    assert isinstance(opened("another+adapter", made, "adapter_base"), AdaptedModel)


@pytest.mark.parametrize(
    ("named", "revision", "given", "right"),
    [
        ("org/base", None, "base", True),
        ("org/Base", "main", "base", True),
        ("/gone/base/", None, "base", True),
        ("org/base-7b", None, "base", False),
        ("base-of-another-org/other", None, "base", False),
        ("org/original", None, "renamed", True),
        ("org/else", None, "renamed", False),
    ],
)
def test_bases_are_known_by_name_where_the_named_one_is_not_here(
    copied: Path, named: str, revision: str | None, given: str, right: bool
) -> None:
    """The folder's name, or the name that its config keeps."""
    shutil.copytree(copied / "base", copied / "renamed")
    config = json.loads((copied / "renamed" / "config.json").read_text())
    (copied / "renamed" / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/original"}))
    edit_config(copied / "adapter", base_model_name_or_path=named, revision=revision)
    if right:
        assert isinstance(opened(f"{given}+adapter", copied), AdaptedModel)
    else:
        assert named in refused(copied, f"{given}+adapter").why


def test_a_named_folder_without_a_model_is_no_base(copied: Path) -> None:
    """Its name is all that can be compared then."""
    (copied / "org" / "base").mkdir(parents=True)
    edit_config(copied / "adapter", base_model_name_or_path="org/base")
    assert isinstance(adapted(copied), AdaptedModel)
    assert "org/base" in refused(copied, "another+adapter").why


def test_an_equal_copy_of_the_base_is_the_base(copied: Path) -> None:
    shutil.copytree(copied / "base", copied / "copy")
    assert opened("copy+adapter", copied).fingerprint() == adapted(copied).fingerprint()


def test_a_base_that_is_not_named_is_said(copied: Path) -> None:
    edit_config(copied / "adapter", base_model_name_or_path=None)
    told: list[str] = []
    with progress.listening(Listening(told)):
        adapted(copied)
    assert any("names no base" in line for line in told)
    error = refused(copied, "adapter", InputFileError)
    assert "model: BASE+adapter" in error.fix
    edit_config(copied / "adapter", base_model_name_or_path="org/unknown")
    assert "org/unknown" in refused(copied, "adapter", InputFileError).what


class Listening:
    """Keeps what it is told."""

    def __init__(self, told: list[str]) -> None:
        self.message = self.warning = told.append

    def task(self, label: str, total: int) -> nullcontext[Callable[[int], None]]:
        return nullcontext(lambda steps: None)


# ------------------------------------------------------------------------------------------------------------ identity


def test_the_fingerprint_is_that_of_base_factors_and_scale(copied: Path) -> None:
    def now() -> str:
        return adapted(copied).fingerprint()

    first = now()
    assert first == now() != opened("base+other", copied).fingerprint()
    edit_config(copied / "adapter", inference_mode=False, lora_dropout=0.5)
    assert now() == first
    edit_config(copied / "adapter", lora_alpha=7)
    assert now() != first
    edit_config(copied / "adapter", lora_alpha=6)
    file = copied / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[3]].view(-1)[-1] += 1e-6
    save_file(tensors, file)
    assert now() != first


def test_folders_and_tokenizer(copied: Path) -> None:
    model = adapted(copied)
    assert model.folders == (copied / "base", copied / "adapter")
    assert model.label == "base+adapter"
    assert model.path == model.tokenizer_path == copied / "base"
    (copied / "adapter" / "tokenizer.json").write_text("{}")
    assert adapted(copied).tokenizer_path == copied / "adapter"


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(folder: Path, name: str, kind: type[SensmergeError] = IncompatibleModelsError) -> SensmergeError:
    with pytest.raises(kind) as caught:
        opened(name, folder)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"a_later_setting": {"of": "peft"}}, "a_later_setting"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_plain_lora_is_refused_by_name(copied: Path, changes: dict[str, Any], told: str) -> None:
    edit_config(copied / "adapter", **changes)
    error = refused(copied, "base+adapter")
    assert error.exit_code == 4
    assert told in error.why
    remedies = {
        "alora": "leave this adapter out",
        "use_qalora": "leave",
        "corda": "path_initial",
        "loftq": "path_initial",
    }
    assert next((fix for key, fix in remedies.items() if key in told), "merge_and_unload") in error.fix


def test_all_settings_that_are_refused_are_told_at_once(copied: Path) -> None:
    edit_config(copied / "adapter", use_dora=True, layer_replication=[[0, 1]], future=1, off=False, empty={})
    why = refused(copied, "base+adapter").why
    assert all(name in why for name in ("use_dora", "layer_replication", "future"))
    assert "`off" not in why
    assert "`empty" not in why


def test_the_settings_of_lora_that_peft_knows_are_all_dealt_with(made: Path) -> None:
    """PEFT's own defaults are accepted, and every field that this PEFT has is known by name."""
    from peft import LoraConfig

    known = lora_config._HARMLESS | lora_config._UNDERSTOOD | lora_config._REFUSED.keys()
    assert {field.name for field in fields(LoraConfig)} <= known


def pasted(error: SensmergeError) -> str:
    """Run the command of a fix; returns the model that it says to give instead."""
    [code] = re.findall(r'python -c "(.*)"$', error.fix)
    [out] = re.findall(r"give `(.*)` instead", error.fix)
    exec(code, {})
    return str(out)


def test_an_adapter_without_a_tensor_is_refused(copied: Path) -> None:
    """Merged, it would be the base under another name."""
    save_file({}, copied / "adapter" / "adapter_model.safetensors")
    error = refused(copied, "base+adapter", InputFileError)
    assert "holds no tensors" in error.what


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}], ids=["DoRA", "embedding"])
def test_the_fix_for_variants_works(copied: Path, kind: dict[str, Any]) -> None:
    """The command of the message makes a model that can be merged, and it is PEFT's."""
    save_adapter(copied / "base", copied / "variant", **kind)
    model = opened(pasted(refused(copied, "base+variant")), copied)
    expected = merged_by_peft(copied / "base", copied / "variant")
    for name in model.tensors:
        assert torch.equal(values(model, name), expected[name].float())


@pytest.mark.parametrize(
    "kind",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=["factors", "head", "embedding"],
)
def test_the_fix_for_tied_heads_works(tmp_path: Path, kind: dict[str, Any]) -> None:
    """The command parts the two ends and writes the model that was trained: the logits are those of the adapter unmerged."""
    base = save_base(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", **kind)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        trained = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter"))(ids).logits
        model = load(Path(pasted(refused(tmp_path, "base+adapter"))))
        torch.testing.assert_close(model(ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert "lm_head.weight" in opened("adapter-merged", tmp_path).tensors


def test_the_fix_for_another_vocabulary_works(tmp_path: Path) -> None:
    """An adapter that was trained after `resize_token_embeddings` and holds both ends."""
    base = save_base(tiny_llama(), tmp_path / "base")
    resized = load(base)
    resized.resize_token_embeddings(264)
    resized.save_pretrained(tmp_path / "resized")
    save_adapter(tmp_path / "resized", tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(base))
    error = refused(tmp_path, "base+adapter")
    assert "[264, 16]" in error.why
    model, expected = opened(pasted(error), tmp_path), merged_by_peft(tmp_path / "resized", tmp_path / "adapter")
    for name in model.tensors:
        torch.testing.assert_close(values(model, name), expected[name], rtol=1e-6, atol=1e-6)


def test_factors_on_a_layer_that_is_stored_in_full(tmp_path: Path) -> None:
    """PEFT stores the weight under an adapted head too: that one counts, not the base's."""
    base = save_base(tiny_llama(), tmp_path / "base")
    file = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head"]) / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.5
    save_file(tensors, file)
    expected = merged_by_peft(base, tmp_path / "adapter")["lm_head.weight"]
    torch.testing.assert_close(values(adapted(tmp_path), "lm_head.weight"), expected, rtol=1e-6, atol=1e-6)


def test_the_fix_for_pickled_adapters_works(copied: Path) -> None:
    """adapter_model.bin is refused with the command that converts it."""
    file = copied / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), copied / "adapter" / "adapter_model.bin")
    tensors = load_file(file)
    file.unlink()
    error = refused(copied, "base+adapter", InputFileError)
    assert "adapter_model.bin" in error.where
    [code] = re.findall(r'^python -c "(.*)"$', error.fix)
    exec(code)
    assert all(torch.equal(tensor, load_file(file)[name]) for name, tensor in tensors.items())
    assert adapted(copied).changes


def test_every_tensor_that_does_not_fit_is_named(copied: Path) -> None:
    """No counterpart, other shapes, a lost factor, embedding LoRA, unknown names: all in one message."""
    file = copied / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    stem = "base_model.model.model.layers"
    tensors[f"{stem}.7.mlp.up_proj.lora_A.weight"] = torch.zeros(6, 16)
    tensors[f"{stem}.7.mlp.up_proj.lora_B.weight"] = torch.zeros(24, 6)
    tensors[f"{stem}.0.mlp.up_proj.lora_B.weight"] = torch.zeros(25, 6)
    tensors[f"{stem}.1.self_attn.q_proj.lora_A.weight"] = torch.zeros(3, 16)
    tensors[f"{stem}.1.self_attn.q_proj.lora_B.weight"] = torch.zeros(16, 3)
    del tensors[f"{stem}.1.mlp.down_proj.lora_B.weight"]
    tensors["base_model.model.model.norm.weight"] = torch.zeros(17)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 9)
    tensors[f"{stem}.0.self_attn.k_proj.lora_magnitude_vector"] = torch.zeros(8)
    tensors[f"{stem}.0.self_attn.k_proj.lora_E"] = torch.zeros(8)
    tensors[f"{stem}.0.self_attn.v_proj.lora_B.bias"] = torch.zeros(8)
    tensors["base_model.model.score.weight"] = torch.zeros(8)
    tensors[f"{stem}.0.self_attn.v_proj.lora_A.second.weight"] = torch.zeros(6, 16)
    tensors[f"{stem}.0.input_layernorm.weight"] = torch.zeros(16, dtype=torch.int32)
    save_file(tensors, file)
    error = refused(copied, "base+adapter")
    for told in (
        "layers.7.mlp.up_proj.lora_A.weight' has no counterpart",
        "give [25, 16], 'model.layers.0.mlp.up_proj.weight' of the base is BF16 [24, 16]",
        "q_proj.lora_A.weight' has rank 3, adapter_config.json says 6",
        "down_proj.lora_A.weight' lacks its other factor",
        "'base_model.model.model.norm.weight' is [17]",
        "lora_embedding_A' is embedding LoRA",
        "lora_magnitude_vector' is DoRA",
        "lora_E' is not a LoRA's",
        "v_proj.lora_B.bias' has no counterpart",
        "score.weight' has no counterpart",
        "more than one adapter",
        "input_layernorm.weight' has dtype I32",
    ):
        assert told in error.why
    assert "12 fault(s)" in error.what


def test_bases_that_are_adapters_and_adapters_that_are_not(copied: Path) -> None:
    assert "is an adapter itself" in refused(copied, "adapter+other").what
    assert "one adapter can be added" in refused(copied, "base+adapter+other", InputFileError).why
    edit_config(copied / "adapter", base_model_name_or_path=str(copied / "adapter"))
    assert "is an adapter itself" in refused(copied, "adapter").what
    assert "is not a LoRA adapter" in refused(copied, "base+another", InputFileError).what
    (copied / "other" / "adapter_model.safetensors").unlink()
    assert "has no weights" in refused(copied, "base+other", InputFileError).what


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "8"},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": 1.5}},
        {"rank_pattern": {"(": 2}},
        {"alpha_pattern": {"q_proj": "2"}},
        {"base_model_name_or_path": 7},
    ],
    ids=str,
)
def test_damaged_configs_are_refused(copied: Path, changes: dict[str, Any]) -> None:
    edit_config(copied / "adapter", **changes)
    error = refused(copied, "base+adapter", InputFileError)
    assert error.exit_code == 3
    assert next(iter(changes)).removesuffix("_pattern") in error.why or "q_proj" in error.why


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_unreadable_configs_are_refused(copied: Path, text: str) -> None:
    (copied / "adapter" / "adapter_config.json").write_text(text)
    assert "adapter's config cannot be read" in refused(copied, "base+adapter", InputFileError).what


def test_a_file_that_becomes_shorter_is_an_error(copied: Path) -> None:
    model = adapted(copied)
    file = copied / "adapter" / "adapter_model.safetensors"
    last = max(read_header(file), key=lambda stored: stored.offset).spec.name
    file.write_bytes(file.read_bytes()[:-4])
    changed = next(name for name, change in model.changes.items() if last in (change.a, change.b, change.replaced))
    with pytest.raises(InputFileError, match="cannot be read any more"):
        model.read(changed, 0, model.tensors[changed].elements)
