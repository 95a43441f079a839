"""Two models compared tensor by tensor: norms, angle, signs, equal elements; with a base, their task vectors as well."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import progress
from ..checkpoints.families import group_tensors
from ..checkpoints.formats import FLOATS, ITEM_SIZES, to_float32
from ..checkpoints.opening import Opening
from ..checkpoints.source import Checkpoint
from ..errors import Faults
from ..execution.engine import cores
from ..execution.tiles import divided
from ..methods.kernel import kernel

# Elements of one piece: sums run over a piece, then over the pieces in order, so that threads change no digit.
PIECE = 1 << 18
# Keys of config.json that say nothing of the model.
_UNTOLD = ("_name_or_path", "transformers_version")
# What the kernel adds up, in order; the last one is a maximum.
_FIELDS = (
    "elements", "nonfinite_a", "nonfinite_b", "nonfinite_base", "equal", "signs", "signed", "aa", "bb", "dd", "ab",
    "task_aa", "task_bb", "task_ab", "task_signs", "task_signed", "largest",
)  # fmt: skip


@kernel
def measure(n: int, a: Any, b: Any, base: Any, with_base: bool, out: Any) -> None:
    """Add up `_FIELDS` over float32 a[n], b[n] and base[n] into float64 out; elements that are not finite are only counted."""
    largest = 0.0
    for i in range(n):
        x, y, z = np.float64(a[i]), np.float64(b[i]), 0.0
        sound_x, sound_y, sound_z = np.isfinite(x), np.isfinite(y), True
        if with_base:
            z = np.float64(base[i])
            sound_z = np.isfinite(z)
        out[1] += not sound_x
        out[2] += not sound_y
        out[3] += not sound_z
        if not (sound_x and sound_y and sound_z):
            continue
        out[4] += x == y
        if x != 0.0 and y != 0.0:
            out[6] += 1.0
            out[5] += (x > 0.0) == (y > 0.0)
        out[7] += x * x
        out[8] += y * y
        out[9] += (x - y) * (x - y)
        out[10] += x * y
        largest = max(largest, abs(x - y))
        if with_base:
            u, v = x - z, y - z
            out[11] += u * u
            out[12] += v * v
            out[13] += u * v
            if u != 0.0 and v != 0.0:
                out[15] += 1.0
                out[14] += (u > 0.0) == (v > 0.0)
    out[0] += n
    out[16] = max(out[16], largest)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Comparison:
    """What two tensors, or two sets of tensors, have in common; sums in float64 over all elements that are finite in all.

    A figure is None where it means nothing: the angle of a zero vector, the signs of no element.
    """

    sums: Mapping[str, float]
    has_base: bool

    @classmethod
    def over(cls, parts: Sequence[Comparison]) -> Comparison:
        """One comparison over several tensors."""
        totals = {name: math.fsum(part.sums[name] for part in parts) for name in _FIELDS[:-1]}
        totals["largest"] = max((part.sums["largest"] for part in parts), default=0.0)
        return cls(totals, any(part.has_base for part in parts))

    @cached_property
    def figures(self) -> dict[str, float | int | None]:
        """Every figure by name; with a base those of the task vectors A - BASE and B - BASE too.

        `signs` is the share of equal signs among the elements that are zero in neither, `relative` is |A - B| / |A|.
        """
        s = self.sums
        norm = {name: math.sqrt(s[name]) for name in ("aa", "bb", "dd", "task_aa", "task_bb")}
        sound = s["elements"] - sum(s[name] for name in ("nonfinite_a", "nonfinite_b", "nonfinite_base"))
        found: dict[str, float | int | None] = {
            "elements": int(s["elements"]),
            "norm_a": norm["aa"],
            "norm_b": norm["bb"],
            "difference": norm["dd"],
            "relative": _ratio(norm["dd"], norm["aa"]),
            "cosine": _ratio(s["ab"], norm["aa"] * norm["bb"]),
            "signs": _ratio(s["signs"], s["signed"]),
            "equal": _ratio(s["equal"], max(sound, s["equal"])),
            "largest": s["largest"],
            "nonfinite_a": int(s["nonfinite_a"]),
            "nonfinite_b": int(s["nonfinite_b"]),
        }
        if self.has_base:
            found |= {
                "task_norm_a": norm["task_aa"],
                "task_norm_b": norm["task_bb"],
                "task_cosine": _ratio(s["task_ab"], norm["task_aa"] * norm["task_bb"]),
                "task_signs": _ratio(s["task_signs"], s["task_signed"]),
                "nonfinite_base": int(s["nonfinite_base"]),
            }
        return found


@dataclass(frozen=True)
class Diff:
    """What distinguishes two models: each tensor that both have in one shape, sums by group, and everything else in words.

    `groups` are the blocks in order, then what lies outside them by role (embed, final_norm, lm_head, other). `only_a`, `only_b`
    are names; `shapes` {name: (A's, B's)}; `dtypes` likewise, and such tensors are compared as numbers; `bytes_differ` are
    tensors that hold no floating point and differ; `config` {key: (A's, B's)}, None for a key that is absent. `no_base` are
    tensors that the base has not, or in another shape: they count without a task vector.
    """

    a: str
    b: str
    base: str | None
    tensors: Mapping[str, Comparison]
    groups: Mapping[str, Comparison]
    whole: Comparison
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: Mapping[str, tuple[str, str]]
    bytes_differ: tuple[str, ...]
    config: Mapping[str, tuple[object, object]]
    no_base: tuple[str, ...]

    @property
    def same_weights(self) -> bool:
        """Whether every tensor has the same name, shape, dtype and bits as far as numbers go (-0 equals 0)."""
        told = self.only_a or self.only_b or self.shapes or self.dtypes or self.bytes_differ
        sums = self.whole.sums
        return not told and sums["equal"] == sums["elements"]


def diff(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None = None,
    folders: Sequence[Path] = (),
    allow_pickle: bool = False,
    jobs: int | None = None,
) -> Diff:
    """Compare two models, anything that a recipe may name, tensor by tensor; `base` adds their task vectors.

    Sums are float64, in one order whatever `jobs`. Elements that are NaN or infinite in any model are counted and left out.
    Raises InputFileError, IncompatibleModelsError for models that cannot be opened, all at once. Cost: one read of every model.
    """
    opening = Opening([*folders, Path.cwd()], allow_pickle=allow_pickle)
    names = [str(model) for model in (a, b, *(() if base is None else (base,)))]
    faults = Faults()
    with ExitStack() as stack:
        opened: list[Checkpoint] = []
        for name in names:
            with faults.gathered():
                opened.append(opening.open(name, where="sensmerge diff"))
                stack.callback(opened[-1].close)
        faults.raise_all()
        return _compared(opened[0], opened[1], opened[2] if base is not None else None, jobs or cores())


def _compared(a: Checkpoint, b: Checkpoint, base: Checkpoint | None, jobs: int) -> Diff:
    both = [name for name in a.tensors if name in b.tensors]
    shapes = {n: (a.tensors[n].shape, b.tensors[n].shape) for n in both if a.tensors[n].shape != b.tensors[n].shape}
    dtypes = {n: (a.tensors[n].dtype, b.tensors[n].dtype) for n in both if a.tensors[n].dtype != b.tensors[n].dtype}
    alike = [name for name in both if name not in shapes]
    numbers = [n for n in alike if a.tensors[n].dtype in FLOATS and b.tensors[n].dtype in FLOATS]
    tensors: dict[str, Comparison] = {}
    no_base: list[str] = []
    differ: list[str] = []
    with (
        progress.task("comparing", sum(a.tensors[name].elements for name in alike)) as advance,
        ThreadPoolExecutor(jobs) as pool,
    ):
        for name in alike:
            if name in numbers:
                beside = base if _in_base(a, base, name) else None
                if base is not None and beside is None:
                    no_base.append(name)
                tensors[name] = _tensor(a, b, beside, name, pool)
            elif name in dtypes or not _same_bytes(a, b, name):
                differ.append(name)
            advance(a.tensors[name].elements)
    group_of = group_tensors(a.tensors)
    order = [*group_of.layers, *group_of.roles]
    members = {each: [tensors[n] for n in tensors if group_of.group_of[n] == each] for each in order}
    return Diff(
        a=a.label,
        b=b.label,
        base=None if base is None else base.label,
        tensors=tensors,
        groups={each: Comparison.over(parts) for each, parts in members.items() if parts},
        whole=Comparison.over(list(tensors.values())),
        only_a=tuple(sorted(a.tensors.keys() - b.tensors.keys())),
        only_b=tuple(sorted(b.tensors.keys() - a.tensors.keys())),
        shapes=shapes,
        dtypes=dtypes,
        bytes_differ=tuple(differ),
        config=dict(_unlike_keys(a.config, b.config)),
        no_base=tuple(no_base),
    )


def _in_base(a: Checkpoint, base: Checkpoint | None, name: str) -> bool:
    spec = None if base is None else base.tensors.get(name)
    return spec is not None and spec.shape == a.tensors[name].shape and spec.dtype in FLOATS


def _read(source: Checkpoint, name: str, start: int, count: int) -> NDArray[np.float32]:
    return to_float32(source.read(name, start, count), source.tensors[name].dtype)


def _tensor(a: Checkpoint, b: Checkpoint, base: Checkpoint | None, name: str, pool: ThreadPoolExecutor) -> Comparison:
    """Compare one tensor; its pieces are read and measured side by side."""

    def piece(part: tuple[int, int]) -> NDArray[np.float64]:
        start, size = part[0], part[1] - part[0]
        out = np.zeros(len(_FIELDS))
        x, y = _read(a, name, start, size), _read(b, name, start, size)
        measure(size, x, y, x if base is None else _read(base, name, start, size), base is not None, out)
        return out

    parts = list(pool.map(piece, divided(0, a.tensors[name].elements, PIECE)))
    found = np.array(parts) if parts else np.zeros((1, len(_FIELDS)))
    sums = {field: float(found[:, at].sum()) for at, field in enumerate(_FIELDS)}
    sums["largest"] = float(found[:, -1].max())
    return Comparison(sums, base is not None)


def _same_bytes(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    spec = a.tensors[name]
    pieces = divided(0, spec.elements, (1 << 20) // ITEM_SIZES[spec.dtype])
    return all(a.read(name, at, end - at).tobytes() == b.read(name, at, end - at).tobytes() for at, end in pieces)


def _unlike_keys(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[object, object]]]:
    """The keys of two configs whose values differ, those of nested mappings with dots."""
    for key in sorted((a.keys() | b.keys()) - set(_UNTOLD)):
        ours, theirs = a.get(key), b.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _unlike_keys(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            yield f"{prefix}{key}", (ours, theirs)
