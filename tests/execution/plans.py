"""Plans made by hand over models in memory: what the engine is given, without a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from sensmerge.checkpoints.formats import FLOATS, ITEM_SIZES, from_float32
from sensmerge.checkpoints.writer import split_into_shards
from sensmerge.execution.run import execute
from sensmerge.methods import METHODS
from sensmerge.records import MergePlan, TensorInput, TensorPlan, TensorSpec
from tests.oracle.methods64 import Case

Array = NDArray[Any]


class MemoryModel:
    """A model whose tensors lie in memory; floating-point ones are held as the file would hold their bits."""

    def __init__(self, label: str, tensors: Mapping[str, Array], dtype: str = "F32") -> None:
        self.label = label
        self._raw: dict[str, Array] = {}
        self.tensors: dict[str, TensorSpec] = {}
        for name, values in tensors.items():
            kind = dtype if values.dtype == np.float32 else {"int64": "I64", "bool": "BOOL"}[str(values.dtype)]
            raw = from_float32(values.reshape(-1), dtype) if kind in FLOATS else values.reshape(-1)
            self._raw[name] = np.ascontiguousarray(raw)
            self.tensors[name] = TensorSpec(name, kind, values.shape)

    def read(self, name: str, start: int, count: int) -> Array:
        return self._raw[name][start : start + count]

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        item = ITEM_SIZES[self.tensors[name].dtype]
        out[:] = self._raw[name].view(np.uint8)[start * item : start * item + len(out)]


def defaults(method: str, options: Mapping[str, Any], per_model: Mapping[str, Any], count: int) -> tuple[Any, Any]:
    """Options as a plan has them: checked, with the defaults of those that are not named."""
    known = METHODS.get(method, where="test")
    shared = {
        o.name: o.default if o.name not in options else o.check(options[o.name])
        for o in known.options
        if not o.per_model
    }
    own = {
        o.name: tuple(o.check(v) for v in per_model.get(o.name, (o.default,) * count))
        for o in known.options
        if o.per_model and o.name != "weight"
    }
    return shared, own


def plan_of(cases: Mapping[str, Case], *, out_dtype: str = "F32", shard_bytes: int = 10**9) -> MergePlan:
    """A plan of one tensor for each case, all of one method, in the order given."""
    tensors = []
    for name, case in cases.items():
        count = len(case.experts)
        shared, own = defaults(case.method, case.options, case.per_model, count)
        tensors.append(
            TensorPlan(
                spec=TensorSpec(name, out_dtype, case.experts[0].shape),
                group="embed",
                base=None if case.base is None else TensorInput("base", name),
                experts=tuple(TensorInput(model, name) for model in case.names),
                weights=case.w or (1.0,) * count,
                coefficients=case.c or (1.0,) * count,
                scale=case.scale,
                options=shared,
                per_model=own,
            )
        )
    shards = split_into_shards([tensor.spec for tensor in tensors], shard_bytes)
    return MergePlan(
        method=next(iter(cases.values())).method,
        base="base",
        models=(),
        scale=1.0,
        tensors=tuple(tensors),
        shards=tuple((shard.file, tuple(spec.name for spec in shard.tensors)) for shard in shards),
        bytes_read=0,
        bytes_written=0,
    )


def readers_of(cases: Mapping[str, Case], dtype: str = "F32") -> dict[str, MemoryModel]:
    """The models that the cases' tensors lie in."""
    models: dict[str, dict[str, Array]] = {}
    for name, case in cases.items():
        if case.base is not None:
            models.setdefault("base", {})[name] = case.base
        for model, values in zip(case.names, case.experts, strict=True):
            models.setdefault(model, {})[name] = values
    return {label: MemoryModel(label, tensors, dtype) for label, tensors in models.items()}


def run(
    cases: Mapping[str, Case],
    folder: Path,
    *,
    dtype: str = "F32",
    out_dtype: str = "F32",
    order: Sequence[str] | None = None,
    shard_bytes: int = 10**9,
    **settings: Any,
) -> dict[str, Array]:
    """Merge the cases as a model would be merged; float32 arrays, or uint16 bits of the other dtypes."""
    folder.mkdir(parents=True)
    cases = cases if order is None else {name: cases[name] for name in order}
    plan = plan_of(cases, out_dtype=out_dtype, shard_bytes=shard_bytes)
    execute(plan, readers_of(cases, dtype), folder, **settings)
    found: dict[str, Array] = {}
    for file, names in plan.shards:
        if out_dtype != "BF16":
            found |= load_file(folder / file)
            continue
        with safe_open(folder / file, framework="pt") as opened:
            import torch

            found |= {name: opened.get_tensor(name).view(torch.uint16).numpy() for name in names}
    return found


def random_case(method: str, seed: int, shape: tuple[int, ...], experts: int = 3, **changes: Any) -> Case:
    """A base, experts near it with some entries untouched and some moved alike, unequal weights."""
    random = np.random.default_rng(seed)
    base = random.normal(size=shape).astype(np.float32)
    common = random.normal(size=shape) * 0.05
    near = []
    for _ in range(experts):
        moved = (common + random.normal(size=shape) * 0.1) * (random.random(shape) < 0.9)
        near.append((base + moved).astype(np.float32))
    settings: dict[str, Any] = {
        "w": tuple(random.uniform(0.3, 1.5, size=experts).tolist()),
        "names": tuple(f"expert-{k}" for k in range(experts)),
    }
    return Case(method=method, base=base, experts=tuple(near), **(settings | changes))
