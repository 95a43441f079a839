"""Merges to break: a tiny one, and one of more than 50 MB; and what a model folder holds, byte for byte."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import sensmerge as sm
from tests.builders import byte_tokenizer, write_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}


@dataclass(frozen=True)
class Case:
    """A recipe with its models, an output folder that may hold an old model, and where both lie."""

    folder: Path
    recipe: Path
    out: Path
    shard_bytes: int = 5_000_000_000

    def merge(self, *, overwrite: bool = True, restart: bool = False, seed: int | None = None) -> None:
        """The merge, on one thread: what happens then happens in one order."""
        sm.merge(
            sm.load_recipe(self.recipe),
            self.out,
            overwrite=overwrite,
            restart=restart,
            shard_bytes=self.shard_bytes,
            jobs=1,
            seed=seed,
        )

    @property
    def work(self) -> Path:
        """Where an interrupted merge lies."""
        return self.out.parent / f".{self.out.name}.sensmerge"

    def clear(self, *, old: bool) -> None:
        """Make the output what it was before the first merge: an old model, or nothing."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir(parents=True)
        if old:
            write_old_model(self.out)


def write_old_model(folder: Path) -> None:
    """A model with files that the merged one does not have."""
    write_checkpoint(folder, {"old.weight": torch.arange(6.0)}, CONFIG)
    (folder / "old-only.txt").write_text("of the old model")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a model folder with its bytes, but for when and how long it was made."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    record = found.get("sensmerge/merge.json")
    if record is not None:
        data = json.loads(record)
        found["sensmerge/merge.json"] = json.dumps({**data, "finished": "", "seconds": 0}).encode()
    return found


def write_family(folder: Path, shapes: dict[str, tuple[int, ...]], experts: int = 2) -> None:
    """base and expert-0, expert-1, … with a tokenizer in each; the experts are near the base."""
    random = np.random.default_rng(0)
    base = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tokenizer = byte_tokenizer()
    for number in range(-1, experts):
        path = folder / ("base" if number < 0 else f"expert-{number}")
        moved = {n: v if number < 0 else v + 0.1 * random.standard_normal(v.shape, np.float32) for n, v in base.items()}
        write_checkpoint(path, moved, CONFIG)
        tokenizer.save_pretrained(path)


def tiny(folder: Path, method: str = "task_arithmetic", *, experts: int = 1, old: bool = True, more: str = "") -> Case:
    """Two shards with two and three tensors."""
    shapes = {f"model.layers.{at}.{part}.weight": (6, 4) for at in range(2) for part in ("a", "b")}
    write_family(folder, shapes | {"model.norm.weight": (4,)}, experts)
    recipe = folder / "recipe.yml"
    models = "".join(f"  - model: expert-{number}\n" for number in range(experts))
    recipe.write_text(f"merge_method: {method}\nbase_model: base\n{more}models:\n{models}")
    case = Case(folder, recipe, folder / "outputs" / "out", 220)
    case.clear(old=old)
    return case


def large(folder: Path) -> Case:
    """56 MB of output in four files, with a method of several passes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(8):
        shapes |= {f"model.layers.{layer}.{part}.weight": (512, 512) for part in ("q", "k", "v")}
        shapes |= {f"model.layers.{layer}.{part}.weight": (512, 960) for part in ("up", "down")}
        shapes[f"model.layers.{layer}.norm.weight"] = (512,)
    write_family(folder, shapes)
    recipe = folder / "recipe.yml"
    recipe.write_text(
        "merge_method: ties\nbase_model: base\nparameters: {density: 0.4}\nmodels: [{model: expert-0}, {model: expert-1}]\n"
    )
    return Case(folder, recipe, folder / "outputs" / "out", 15_000_000)
