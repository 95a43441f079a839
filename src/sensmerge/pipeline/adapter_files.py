"""What an extracted adapter holds besides its factors, and its files as PEFT's `save_pretrained` would leave them."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.families import natural_key, tied_head
from ..checkpoints.files import write_failure
from ..checkpoints.lora.config import CONFIG_FILE, WEIGHTS_FILE
from ..checkpoints.source import TOKENIZER_FILES, Checkpoint
from ..checkpoints.staging import staging
from ..checkpoints.writer import ShardWriter, split_into_shards
from ..errors import IncompatibleModelsError
from ..records import TensorSpec

if TYPE_CHECKING:
    from ..calibration.modules import Skeleton

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Factors:
    """A [r, in] and B [out, r] of one module."""

    module: str
    a: Floats
    b: Floats


class Saved:
    """What goes into the adapter in full; raises IncompatibleModelsError naming all that PEFT cannot hold.

    `tensors` and `biases` map stored tensors to their names in the adapter, `modules` are for `modules_to_save`.
    """

    def __init__(self, base: Checkpoint, skeleton: Skeleton, adapted: set[str], changed: Sequence[str]) -> None:
        self.flipped = bool(adapted & skeleton.conv1d)
        self.biases: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        tied = tied_head(base.config, base.tensors)
        faults, owners = [], set()
        for name in changed:
            if name == tied:
                continue
            owner, parameter = skeleton.places.get(name, ("", ""))
            within = [module for module in adapted if module == owner or module.startswith(f"{owner}.")]
            if parameter == "bias" and owner in skeleton.matrices:
                self.biases[name] = f"{owner}.base_layer.bias" if owner in adapted else f"{owner}.bias"
            elif not owner:
                faults.append(f"'{name}' belongs to no module")
            elif within:
                faults.append(f"'{name}' belongs to {owner}, which holds layers with factors ({within[0]})")
            else:
                owners.add(owner)
        if faults:
            raise IncompatibleModelsError(
                f"PEFT cannot hold {len(faults)} tensor(s) that changed",
                where=base.label,
                why="; ".join(faults),
                fix="keep the full model: an adapter of it would lose these",
            )
        # PEFT matches these names against the ends of modules' names.
        self.modules = sorted(owners, key=natural_key)
        for module in skeleton.modules:
            if module.endswith(tuple(owners)):
                self.tensors |= dict(skeleton.stored_in(module))
        self.biases = {name: written for name, written in self.biases.items() if name not in self.tensors}
        # A tied head is saved beside its embedding, and PEFT told to keep the two tied.
        self.twins = {name: skeleton.twins[name] for name in self.tensors if name in skeleton.twins}


def write_adapter(model: Checkpoint, base: Checkpoint, out: Path, factors: Mapping[str, Factors], saved: Saved) -> int:
    """Write the adapter; returns its number of parameters."""
    pieces: list[tuple[TensorSpec, Floats]] = []
    for each in factors.values():
        for side, values in (("A", each.a), ("B", each.b)):
            name = f"base_model.model.{each.module}.lora_{side}.weight"
            pieces.append((TensorSpec(name, "F32", values.shape), np.ascontiguousarray(values)))
    full = [*saved.tensors.items(), *saved.biases.items(), *saved.twins.items()]
    copies = [(name, replace(model.tensors[name], name=f"base_model.model.{written}")) for name, written in full]
    specs = [*(spec for spec, _ in pieces), *(spec for _, spec in copies)]
    [shard] = split_into_shards(specs, sum(spec.elements for spec in specs) * 8)
    with staging(out) as stage:
        stage.discard()
        stage.begin({"adapter": str(out)}, frozenset())
        try:
            writer = ShardWriter(stage.model, replace(shard, file=WEIGHTS_FILE))
            try:
                for spec, values in pieces:
                    writer.write(spec.name, 0, values.reshape(-1))
                for name, spec in copies:
                    writer.write(spec.name, 0, model.read(name, 0, spec.elements))
                writer.close()
            finally:
                writer.abandon()
            config = json.dumps(_config(base, factors, saved), indent=2, sort_keys=True)
            (stage.model / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
            for name in TOKENIZER_FILES:
                if (model.tokenizer_path / name).is_file():
                    shutil.copyfile(model.tokenizer_path / name, stage.model / name)
            stage.commit(overwrite=False)
        except OSError as error:
            stage.discard()
            raise write_failure(out, error) from error
        except BaseException:
            stage.discard()
            raise
    return sum(spec.elements for spec in specs)


def _config(base: Checkpoint, factors: Mapping[str, Factors], saved: Saved) -> dict[str, Any]:
    """adapter_config.json: alpha is the rank everywhere, so that B·A counts as it is."""
    ranks = {each.module: len(each.a) for each in factors.values()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
    local = Path(base.label).expanduser().is_dir()
    name, _, revision = base.label.partition("@")
    kinds = base.config.get("architectures") or [""]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if kinds[0].endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": str(base.path.resolve()) if local else name,
        "revision": None if local else revision or None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks, key=natural_key),
        "modules_to_save": saved.modules or None,
        "bias": "all" if saved.biases else "none",
        "fan_in_fan_out": saved.flipped,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return config | ({"ensure_weight_tying": True} if saved.twins else {})
