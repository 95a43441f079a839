"""What a user meets with several faults at once: each is told once, and the fixes of all, pasted together, make the merge work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.adapters import save_adapter
from tests.builders import VOCABULARY, byte_tokenizer, tiny_llama
from tests.conftest import Run


def moved(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """A fine-tune of a model, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def save(model: LlamaForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a plain fine-tune, one with a token, a rope_theta and an epsilon of its own, a stranger, and one that is deeper."""
    folder = tmp_path_factory.mktemp("journeys")
    save(tiny_llama(0), folder / "base")
    save(moved(tiny_llama(0), 1), folder / "chat")
    larger = byte_tokenizer()
    larger.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    messy = moved(tiny_llama(0), 2)
    messy.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    messy.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    messy.config.rms_norm_eps = 1e-5
    messy.config.eos_token_id = VOCABULARY
    save(messy, folder / "messy", larger)
    save(tiny_llama(9), folder / "stranger")
    save(tiny_llama(9, num_hidden_layers=3), folder / "deeper")
    save_adapter(folder / "stranger", folder / "lora")
    return folder


def recipe(*models: str, extra: str = "") -> str:
    listed = "".join(f"  - model: {model}\n" for model in models)
    return f"merge_method: task_arithmetic\nbase_model: base\nmodels:\n{listed}parameters: {{lambda: 0.5}}\n{extra}"


def faults(stderr: str) -> list[str]:
    """The first line of each fault."""
    found = re.findall(r"(?m)^(?:error: |\d+\. )(?!\d+ faults were found$)(.*)$", stderr)
    assert found, stderr
    return found


def loaded(folder: Path) -> LlamaForCausalLM:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def test_all_fixes_pasted_at_once_make_the_merge_work(made: Path, sensmerge: Run) -> None:
    """Another vocabulary, unlike configs, a stranger, a misspelt check: told once each, by `plan` as by `merge`."""
    text = recipe("messy", "stranger", "chat", extra="allow: [initializer_rnge]\n")
    (made / "r.yml").write_text(text)
    plan, merge = (sensmerge(command, "r.yml", "out", cwd=made) for command in ("plan", "merge"))
    assert plan.stderr == merge.stderr
    told = faults(plan.stderr)
    assert len(told) == len(set(told)) == 4, told
    assert "tensor(s) differ" not in plan.stderr, "the rows are told with the tokens"
    [tokens] = set(re.findall(r"(?m)^tokenizer:\n  source: base$", plan.stderr))
    # Whichever of the lines is pasted: a recipe has one `allow:`.
    [line] = set(re.findall(r"`(allow: \[.*?\])`", plan.stderr))
    (made / "r.yml").write_text(text.replace("allow: [initializer_rnge]", line) + tokens + "\n")
    done = sensmerge("merge", "r.yml", "out", cwd=made)
    assert done.returncode == 0, done.stderr
    assert loaded(made / "out").config.vocab_size == VOCABULARY
    shutil.rmtree(made / "out")


def test_the_source_of_the_tokens_gives_the_ids_of_its_special_tokens(made: Path, sensmerge: Run) -> None:
    """So the note on unlike configs does not say that they are the base's."""
    (made / "r.yml").write_text(
        recipe("messy", extra="tokenizer: {source: messy}\nallow: [rope_theta, rms_norm_eps]\n")
    )
    done = sensmerge("merge", "r.yml", "from-messy", cwd=made)
    assert done.returncode == 0, done.stderr
    assert loaded(made / "from-messy").config.eos_token_id == VOCABULARY
    assert "rope_theta" in done.stderr
    assert "eos_token_id" not in done.stderr


def test_a_deeper_model_is_told_by_its_block_and_hides_no_other(made: Path, tmp_path: Path, sensmerge: Run) -> None:
    """And no `allow:` is offered that could not help."""
    shutil.copytree(made / "base", tmp_path / "base")
    shutil.copytree(made / "deeper", tmp_path / "deeper")
    shutil.copytree(made / "chat", tmp_path / "lost")
    weights = load_file(tmp_path / "lost" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "lost" / "model.safetensors", {"format": "pt"})
    (tmp_path / "r.yml").write_text(recipe("deeper", "lost"))
    done = sensmerge("plan", "r.yml", cwd=tmp_path)
    assert done.returncode == 4
    assert "10 tensor(s) differ" in done.stderr
    assert "block 'model.layers.2' of deeper (9 tensors) is not in base" in done.stderr
    assert "'model.layers.1.mlp.up_proj.weight' is missing in lost" in done.stderr
    assert "num_hidden_layers: 2 in base, lost; 3 in deeper" in done.stderr
    assert "allow: [num_hidden_layers" not in done.stderr


def test_a_misspelt_folder_is_told_with_the_one_that_is_there(made: Path, sensmerge: Run) -> None:
    (made / "r.yml").write_text(recipe("./chta", "../" + made.name + "/mesy"))
    done = sensmerge("plan", "r.yml", cwd=made)
    assert done.returncode == 3
    assert "did you mean './chat'?" in done.stderr
    assert f"did you mean '../{made.name}/messy'?" in done.stderr


def test_init_writes_one_line_for_all_that_must_be_allowed(made: Path, sensmerge: Run) -> None:
    """Faults that are found one after the other: the adapter's base on opening, configs and strangers behind it."""
    (made / "drafted.yml").unlink(missing_ok=True)
    done = sensmerge("init", "base", "messy", "stranger", "lora", "-o", "drafted.yml", cwd=made)
    assert done.returncode == 0, done.stderr
    text = (made / "drafted.yml").read_text()
    assert text.count("\nallow: [adapter_base, rms_norm_eps, rope_theta, unrelated]\n") == 1
    assert text.count("#   unrelated: ") == text.count("#   adapter_base: ") == 1
    assert done.stderr.count("config.json differs") == 1, "each note is told once"
    merged = sensmerge("merge", "drafted.yml", "drafted", cwd=made)
    assert merged.returncode == 0, merged.stderr
    assert loaded(made / "drafted").config.vocab_size == VOCABULARY + 1


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapters_files_do_not_lead_out_of_its_folder(made: Path, tmp_path: Path, sensmerge: Run, file: str) -> None:
    """A link is refused, also beside another check that is switched off; the line that allows it works."""
    shutil.copytree(made / "stranger", tmp_path / "base")
    shutil.copytree(made / "lora", tmp_path / "lora")
    (tmp_path / "lora" / file).rename(tmp_path / file)
    (tmp_path / "lora" / file).symlink_to(tmp_path / file)
    (tmp_path / "r.yml").write_text(recipe("base+lora", extra="allow: [rope_theta]\n"))
    done = sensmerge("plan", "r.yml", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert f"'{file}' is a link out of the model's folder" in done.stderr
    [line] = re.findall(r"`(allow: \[.*?\])`", done.stderr)
    assert line == "allow: [rope_theta, symlinks]"
    (tmp_path / "r.yml").write_text(recipe("base+lora", extra=line + "\n"))
    assert sensmerge("plan", "r.yml", cwd=tmp_path).returncode == 0


def test_a_base_that_is_listed_is_said_to_count_for_nothing(made: Path, sensmerge: Run) -> None:
    """Once, with its line; a method that averages it in says nothing."""
    (made / "r.yml").write_text(recipe("base", "chat"))
    done = sensmerge("plan", "r.yml", cwd=made)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("r.yml:4: 'base' is base_model, and counts for nothing among the models") == 1
    (made / "r.yml").write_text(
        recipe("base", "chat").replace("task_arithmetic", "linear").replace("{lambda: 0.5}", "{weight: 1}")
    )
    done = sensmerge("plan", "r.yml", cwd=made)
    assert done.returncode == 0, done.stderr
    assert "counts for nothing" not in done.stderr


def test_extract_lora_opens_what_the_other_commands_open(made: Path, tmp_path: Path, sensmerge: Run) -> None:
    """Pickles with the flag alone; the faults of both models at once."""
    shutil.copytree(made / "chat", tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    command = ("extract-lora", "old", made / "base", "-o", "adapter", "--rank", "4")
    refused = sensmerge(*command, cwd=tmp_path)
    assert refused.returncode == 3
    assert "add `--allow-pickle` to the command" in refused.stderr
    done = sensmerge(*command, "--allow-pickle", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    both = sensmerge("extract-lora", "old", "./bse", "-o", "other", "--rank", "4", cwd=tmp_path)
    assert len(faults(both.stderr)) == 2


def test_nobody_is_told_to_overwrite_a_model_of_the_recipe(made: Path, sensmerge: Run) -> None:
    (made / "r.yml").write_text(recipe("chat"))
    done = sensmerge("plan", "r.yml", "base", cwd=made)
    assert done.returncode == 7
    assert "the output folder would overwrite a model of the recipe" in done.stderr
    assert "--overwrite" not in done.stderr


def test_all_unknown_keys_of_a_mapping_are_told_at_once(made: Path, sensmerge: Run) -> None:
    (made / "r.yml").write_text(
        recipe("chat", extra="dtyp: float16\nmodules: {}\n").replace("base_model", "base_modle")
    )
    done = sensmerge("plan", "r.yml", cwd=made)
    assert done.returncode == 2
    assert "3 keys cannot be used" in done.stderr
    for word in (
        "line 2: unknown key 'base_modle'",
        "did you mean 'base_model'?",
        "did you mean 'dtype'?",
        "'modules' is not supported yet",
    ):
        assert word in done.stderr
