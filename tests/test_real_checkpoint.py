"""A checkpoint and rows that this project did not write: they load, calibrate, merge and generate."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sensmerge as sm

DATA = os.environ.get("SENSMERGE_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="SENSMERGE_DATA names no folder with real checkpoints and rows")


def test_a_real_checkpoint_goes_all_the_way(tmp_path: Path) -> None:
    assert DATA is not None
    original = Path(DATA) / "models" / "TinyStories-656K"
    shutil.copytree(original, tmp_path / "base")
    tensors = load_file(original / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("math", "code"):
        shutil.copytree(original, tmp_path / name)
        moved = {key: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) for key, t in tensors.items()}
        save_file(moved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    models = "".join(
        f"  - model: {name}\n    sens: {{data: {DATA}/calibration/{name}.jsonl.gz}}\n" for name in ("math", "code")
    )
    path = tmp_path / "real.yml"
    path.write_text(
        "merge_method: task_arithmetic\nbase_model: base\n"
        f"sens: {{preset: calibrated, samples: 8, max_length: 96}}\ndtype: bfloat16\nmodels:\n{models}"
    )
    result = sm.merge(sm.load_recipe(path), tmp_path / "out")
    assert result.coefficients is not None
    assert len(result.coefficients.layers) == AutoModelForCausalLM.from_pretrained(original).config.num_hidden_layers
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Once upon a time", return_tensors="pt")
    story = tokenizer.decode(model.generate(**ids, max_new_tokens=30, do_sample=False)[0])
    before = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    told = tokenizer.decode(before.generate(**ids, max_new_tokens=30, do_sample=False)[0])
    shared = set(story.split()) & set(told.split())
    assert len(shared) > 5, (story, told)
