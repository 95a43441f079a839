"""A LoRA adapter from two models: the best low-rank approximation of what a fine-tune, or a merge, changed in its base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import progress
from ..checkpoints.families import Grouping, group_tensors, natural_key
from ..checkpoints.formats import FLOATS, is_finite, to_float32
from ..checkpoints.lora.adapted import adapted_model
from ..checkpoints.opening import Opening
from ..checkpoints.source import Checkpoint
from ..errors import Faults, IncompatibleModelsError, NonFiniteError, OutputError, RecipeError
from ..matching import check_same_tensors
from ..records import TensorSpec
from .adapter_files import Factors, Floats, Saved, write_adapter

if TYPE_CHECKING:
    from ..calibration.modules import Skeleton


@dataclass(frozen=True)
class ExtractedMatrix:
    """One matrix: its rank, the energy ‖B·A‖²/‖ΔW‖² that its factors keep, ‖ΔW − B·A‖/‖ΔW‖, and ‖ΔW‖."""

    tensor: str
    layer: str
    rank: int
    energy: float
    error: float
    norm: float


@dataclass(frozen=True)
class Extraction:
    """What was written: every matrix that has factors, and what is stored in full because it is no matrix of a block."""

    folder: Path
    matrices: tuple[ExtractedMatrix, ...]
    full: tuple[str, ...]
    biases: tuple[str, ...]
    unchanged: int
    parameters: int


def extract_lora(
    model: str,
    base: str,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    device: str = "auto",
    allow_pickle: bool = False,
) -> Extraction:
    """Write a PEFT adapter that makes `base` into (nearly) `model`: a singular value decomposition of each matrix of a block.

    Either `rank` (at most) for every matrix, or the least rank whose `energy` ‖B·A‖²/‖ΔW‖² is at least this share. Tensors that
    changed but are no matrices of blocks are stored in full (`modules_to_save`, biases as `bias: all`). `out` must be absent or
    empty. Raises RecipeError, OutputError, IncompatibleModelsError naming all that PEFT cannot hold, NonFiniteError. Cost: one
    float32 SVD a matrix; memory: one matrix and the adapter.
    """
    out = Path(out)
    _check_choice(rank, energy)
    opening = Opening([Path.cwd()], allow_pickle=allow_pickle)
    opened: list[Checkpoint] = []
    faults = Faults()
    with ExitStack() as stack:
        for name, place in ((model, "MODEL"), (base, "BASE")):
            with faults.gathered():
                opened.append(opening.open(name, where=place))
                stack.callback(opened[-1].close)
        faults.raise_all()
        ours, theirs = opened
        _check_out(out, opened)
        return _extract(ours, theirs, out, rank, energy, device)


def _check_choice(rank: int | None, energy: float | None) -> None:
    what = ""
    if (rank is None) == (energy is None):
        what = "either a rank or an energy must be given"
    elif rank is not None and rank < 1:
        what = f"a rank of {rank} is no rank"
    elif energy is not None and not 0.0 < energy <= 1.0:
        what = f"an energy of {energy:g} is no share"
    if what:
        raise RecipeError(
            what,
            where="sensmerge extract-lora",
            why="the rank of each matrix is the number given, or the least that keeps a share of its energy",
            fix="--rank 16, or --energy 0.95",
        )


def _check_out(out: Path, models: Sequence[Checkpoint]) -> None:
    target = out.resolve()
    inside = [model for model in models for folder in model.folders if folder == target or folder in target.parents]
    if inside or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise OutputError(
            "the output lies in a model's folder" if inside else "the output exists already",
            where=str(out),
            why=f"'{inside[0].label}' is read from there" if inside else "nothing that exists is overwritten",
            fix="choose another output folder",
        )


def _extract(
    model: Checkpoint, base: Checkpoint, out: Path, rank: int | None, energy: float | None, device: str
) -> Extraction:
    from ..calibration.models import choose_device
    from ..calibration.modules import skeleton_of

    device = choose_device(device)
    if adapted_model(base) is not None:
        raise IncompatibleModelsError(
            "the base is an adapter itself",
            where=base.label,
            why="adapter_config.json can name one model as base",
            fix="merge it first with `sensmerge merge`, or extract against its own base",
        )
    check_same_tensors(base, [model])
    skeleton = skeleton_of(base)
    grouping = group_tensors(base.tensors)
    rows: list[ExtractedMatrix] = []
    factors: dict[str, Factors] = {}
    whole: list[str] = []
    names = sorted(base.tensors, key=natural_key)
    with progress.task("extracting", len(names)) as advance:
        for name in names:
            delta = _difference(model, base, name)
            if delta is not None and _has_factors(name, base.tensors[name], skeleton, grouping):
                owner = skeleton.places[name][0]
                row, b, a = _decomposed(delta, name, grouping.group_of[name], rank, energy, device)
                rows.append(row)
                # A Conv1D keeps Wᵀ = Aᵀ·Bᵀ.
                factors[name] = Factors(owner, b.T, a.T) if owner in skeleton.conv1d else Factors(owner, a, b)
            elif delta is not None:
                whole.append(name)
            advance(1)
    if not rows:
        raise IncompatibleModelsError(
            "there is nothing to extract",
            where=f"{model.label} and {base.label}",
            why="no matrix in their blocks differs",
            fix="give the fine-tuned model first, then the base it was made from",
        )
    saved = Saved(base, skeleton, {each.module for each in factors.values()}, whole)
    parameters = write_adapter(model, base, out, factors, saved)
    return Extraction(
        out,
        tuple(rows),
        tuple(sorted(saved.tensors)),
        tuple(sorted(saved.biases)),
        len(names) - len(rows) - len(whole),
        parameters,
    )


def _difference(model: Checkpoint, base: Checkpoint, name: str) -> Floats | None:
    """θ - θ_0 of one tensor as float32 in its shape; None if the two are equal. Raises NonFiniteError, IncompatibleModelsError."""
    spec, theirs = base.tensors[name], model.tensors[name]
    raw, other = base.read(name, 0, spec.elements), model.read(name, 0, spec.elements)
    if spec.dtype not in FLOATS:
        if spec.dtype != theirs.dtype or raw.tobytes() != other.tobytes():
            raise IncompatibleModelsError(
                "a tensor that is not floating point differs",
                where=f"'{name}' of {model.label} and {base.label}",
                why="an adapter can only add numbers to weights",
                fix="use the model that the fine-tune was made from as base",
            )
        return None
    for source, part, dtype in ((base, raw, spec.dtype), (model, other, theirs.dtype)):
        if not is_finite(part, dtype).all():
            raise NonFiniteError(
                "a weight is NaN or infinite",
                where=f"model {source.label}, tensor '{name}'",
                why="it has no decomposition",
                fix="use an undamaged copy of the model",
            )
    delta = to_float32(other, theirs.dtype) - to_float32(raw, spec.dtype)
    return delta.reshape(spec.shape) if delta.any() else None


def _has_factors(name: str, spec: TensorSpec, skeleton: Skeleton, grouping: Grouping) -> bool:
    """Whether a tensor is the matrix of a Linear or Conv1D inside a block."""
    owner, parameter = skeleton.places.get(name, ("", ""))
    inside = grouping.group_of[name] in grouping.layers
    return inside and parameter == "weight" and owner in skeleton.matrices and len(spec.shape) == 2


def _decomposed(
    delta: Floats, name: str, layer: str, rank: int | None, energy: float | None, device: str
) -> tuple[ExtractedMatrix, Floats, Floats]:
    """The best approximation of a matrix [m, n] by factors [m, r] and [r, n] (Eckart-Young), and what it keeps."""
    import torch

    matrix = torch.from_numpy(delta).to(device)
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    shares = sizes.double().square().cumsum(0)
    shares = shares / shares[-1]
    if rank is None:
        assert energy is not None
        rank = int((shares < energy).sum()) + 1
    rank = min(rank, len(sizes))
    root = sizes[:rank].sqrt()
    b, a = left[:, :rank] * root, root[:, None] * right[:rank]
    norm = float(torch.linalg.matrix_norm(matrix))
    error = float(torch.linalg.matrix_norm(matrix - b @ a)) / norm
    row = ExtractedMatrix(name, layer, rank, float(shares[rank - 1]), error, norm)
    return row, b.cpu().numpy(), a.cpu().numpy()
