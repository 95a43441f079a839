"""Checking a merged model: its files by their hashes, its inputs by their fingerprints, its numbers by merging them again."""

from __future__ import annotations

import math
import random
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from .. import progress
from ..checkpoints.header import read_header
from ..checkpoints.opening import Opening
from ..checkpoints.source import Checkpoint
from ..errors import Faults, InputFileError, RecipeError
from ..execution.comparing import ComparingSink, Difference
from ..execution.engine import run_plan
from ..execution.tiles import position
from ..methods import METHODS
from ..plan import make_plan
from ..recipe import load_recipe, with_seed
from ..records import Coefficients, MergePlan, MergeRecord, Recipe
from ..settings import without_filters
from .models import RecipeModels, open_models
from .tracing import RECORD, companion_files, hash_of_file
from .weighing import preset_scale, sized

RECIPE = "sensmerge.yml"
COEFFICIENTS = str(Path("sensmerge") / "coefficients.json")
_AGAIN = "restore the file from a copy; or delete it and merge again, with `--overwrite`"
# The plan's own shards do not matter here: tensors are compared by name.
_ONE_FILE = 1 << 62


@dataclass(frozen=True)
class CheckResult:
    """What was found sound: the files that were hashed, the models by `model:` string with their folders, the tensors recomputed.

    `tensors` is empty, and `inputs` too, where only the outputs were checked; `of` is the number of tensors of the merged model.
    """

    folder: Path
    files: tuple[str, ...]
    bytes_hashed: int
    inputs: Mapping[str, str]
    tensors: tuple[str, ...]
    of: int
    seed: int
    seconds: float


def check(
    folder: str | Path,
    *,
    sample: float = 0.01,
    full: bool = False,
    seed: int | None = None,
    outputs_only: bool = False,
    models_in: Sequence[str | Path] = (),
    recipe: str | Path | None = None,
    allow_pickle: bool = False,
    jobs: int | None = None,
    device: str = "auto",
) -> CheckResult:
    """Check the merged model in `folder` against its merge.json, and recompute a share `sample` of its tensors from its inputs.

    (a) Every file has the hash it was written with, and no file of weights was added. (b) The inputs are found and have the
    fingerprints they had. (c) Tensors drawn at random with `seed` (at least one, each as likely as any other; all with `full`),
    and those of a damaged file, are merged again and compared bit for bit. `models_in` are folders in which the recipe's relative
    paths are tried first; `recipe` replaces the folder's own sensmerge.yml. Raises InputFileError naming file, tensor and first
    unlike element, all faults at once. Cost: one read of the output; of the inputs what the tensors need. Memory: that of a merge.
    """
    started, folder = time.monotonic(), Path(folder).resolve()
    if not 0 < sample <= 1:
        raise RecipeError(
            "the sample must be a share of the tensors", where="--sample", why=f"found {sample:g}", fix="--sample 0.01"
        )
    record = _read_record(folder)
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    checking = _Checking(folder, record, Faults(), jobs, device)
    changed, read = _check_files(folder, record, checking.faults)
    with checking.faults.gathered():
        holders = _read_headers(folder, record)
        # In the order of names, so that a seed means the same tensors wherever the model lies.
        count = len(holders) if full else max(1, math.ceil(sample * len(holders)))
        chosen = set(random.Random(seed).sample(sorted(holders), min(count, len(holders))))
        chosen |= {name for name, file in holders.items() if file in changed}
        inputs: dict[str, str] = {}
        if outputs_only:
            chosen = set()
        elif not {RECIPE, COEFFICIENTS} & changed:
            inputs = checking.compare(_recipe_of(folder, record, models_in, recipe), holders, chosen, allow_pickle)
    checking.faults.raise_all()
    files = (*record.outputs, *record.companions)
    return CheckResult(
        folder, files, read, inputs, tuple(sorted(chosen)), len(holders), seed, time.monotonic() - started
    )


def _read_record(folder: Path) -> MergeRecord:
    if not (folder / RECORD).is_file():
        raise InputFileError(
            f"'{folder.name}' is no model that sensmerge merged",
            where=str(folder),
            why=f"it has no {RECORD}",
            fix="give the folder that `sensmerge merge RECIPE OUT` wrote",
        )
    return MergeRecord.load(folder / RECORD)


def _check_files(folder: Path, record: MergeRecord, faults: Faults) -> tuple[set[str], int]:
    """The files that are missing or changed, and the bytes that were hashed; every fault is gathered."""
    expected = {**record.outputs, **record.companions}
    present = {name: (folder / name).stat().st_size for name in expected if (folder / name).is_file()}
    wrong = set()
    with progress.task("hashing", sum(present.values())) as advance:
        for name, digest in expected.items():
            with faults.gathered():
                if name not in present:
                    wrong.add(name)
                    raise InputFileError(
                        f"'{name}' is missing", where=str(folder), why=f"{RECORD} lists it", fix=_AGAIN
                    )
                found = hash_of_file(folder / name, advance)
                if found != digest:
                    wrong.add(name)
                    raise InputFileError(
                        f"'{name}' is not the file that the merge wrote",
                        where=str(folder / name),
                        why=f"its XXH3-128 is {found}, {RECORD} says {digest}",
                        fix=_AGAIN,
                    )
    weights = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")}
    for name in sorted((weights | set(companion_files(folder))) - expected.keys()):
        with faults.gathered():
            wrong.add(name)
            raise InputFileError(
                f"'{name}' was added after the merge",
                where=str(folder / name),
                why=f"{RECORD} does not list it, and a program that loads the model may read it",
                fix="move it out of the folder",
            )
    return wrong, sum(present.values())


def _read_headers(folder: Path, record: MergeRecord) -> dict[str, str]:
    """The file of each tensor, from the files' own headers; raises all faults at once."""
    holders: dict[str, str] = {}
    faults = Faults()
    for file in record.outputs:
        if (folder / file).is_file():
            with faults.gathered():
                holders |= dict.fromkeys((tensor.spec.name for tensor in read_header(folder / file)), file)
    faults.raise_all()
    return holders


def _recipe_of(folder: Path, record: MergeRecord, models_in: Sequence[str | Path], path: str | Path | None) -> Recipe:
    """The recipe as it was merged: with its seed, and with the folders in which its models were found."""
    recipe = load_recipe(folder / RECIPE if path is None else path)
    folders = [*(Path(each).expanduser().resolve() for each in models_in)]
    folders += [(folder / each).resolve() for each in record.searched]
    recipe = replace(recipe, folders=tuple(folders))
    method = METHODS.get(recipe.merge_method, where=recipe.where())
    levels = [recipe.parameters, *(part.parameters for part in recipe.slices)]
    # A seed from the command line stands in merge.json alone.
    if record.random_seed is not None and record.random_seed != without_filters(levels, method.by_name["seed"]):
        recipe = with_seed(recipe, record.random_seed)
    return recipe


@dataclass(frozen=True)
class _Checking:
    """One check: what is checked, the faults so far, and how tensors are merged again."""

    folder: Path
    record: MergeRecord
    faults: Faults
    jobs: int | None
    device: str

    def compare(
        self, recipe: Recipe, holders: Mapping[str, str], chosen: set[str], allow_pickle: bool
    ) -> dict[str, str]:
        """Compare the inputs with their fingerprints and, if they are the same, merge `chosen` again; the folder of each input."""
        opening = Faults()
        with opening.gathered(), open_models(recipe, allow_pickle=allow_pickle) as models:
            same = Faults()
            for model in models.all:
                with same.gathered():
                    _check_fingerprint(model, self.record)
            self.faults.found += same.found
            if not same.found:
                with self.faults.gathered():
                    self._recompute(recipe, models, holders, chosen)
            return {model.label: str(model.path) for model in models.all}
        command = shlex.join(["sensmerge", "check", str(self.folder)])
        hint = f"say where the models are: {command} --models-in DIR; or leave them out: --outputs-only"
        for error in opening.found:
            fix = f"{hint} ({error.fix})" if isinstance(error, InputFileError) else error.fix
            self.faults.found.append(type(error)(error.what, where=error.where, why=error.why, fix=fix))
        return {}

    def _recompute(self, recipe: Recipe, models: RecipeModels, holders: Mapping[str, str], chosen: set[str]) -> None:
        plan = _plan_again(self.folder, self.record, recipe, models)
        with closing(Opening([Path.cwd()]).open(str(self.folder), where=str(self.folder))) as stored:
            planned = {tensor.spec.name: tensor.spec for tensor in plan.tensors}
            names = planned.keys() | stored.tensors.keys()
            unlike = sorted(name for name in names if planned.get(name) != stored.tensors.get(name))
            if unlike:
                raise InputFileError(
                    "the recipe makes other tensors than the model has",
                    where=str(self.folder),
                    why=f"{len(unlike)} differ in name, shape or dtype: {', '.join(unlike[:4])}",
                    fix="give the recipe that was merged: --recipe FILE",
                )
            with progress.task("recomputing", sum(planned[name].elements for name in chosen)) as advance:
                sink = ComparingSink(stored, METHODS.get(plan.method, where=recipe.where()), advance)
                run_plan(plan, models.readers, sink, jobs=self.jobs, names=chosen, device=self.device)
        for name, found in sorted(sink.differences.items()):
            self.faults.found.append(_unlike(self.folder / holders[name], name, planned[name].shape, found))


def _check_fingerprint(model: Checkpoint, record: MergeRecord) -> None:
    expected = record.inputs.get(model.label)
    if expected is None:
        raise InputFileError(
            f"'{model.label}' was no model of this merge",
            where=str(model.path),
            why=f"{RECORD} lists {', '.join(record.inputs)}",
            fix="give the recipe that was merged",
        )
    if model.fingerprint() != expected:
        raise InputFileError(
            f"'{model.label}' is not the model that was merged",
            where=str(model.path),
            why=f"its fingerprint is {model.fingerprint()}, {RECORD} says {expected}",
            fix="restore the model, or say where the one that was merged is: --models-in DIR",
        )


def _plan_again(folder: Path, record: MergeRecord, recipe: Recipe, models: RecipeModels) -> MergePlan:
    """The plan that the merge had, with its coefficients and its λ."""
    recipe = sized(recipe, models)
    coefficients = Coefficients.load(folder / COEFFICIENTS) if COEFFICIENTS in record.companions else None
    scale = record.lambda_ if recipe.lambda_ == "auto" else preset_scale(recipe)
    return make_plan(recipe, models.readers, coefficients=coefficients, scale=scale, shard_bytes=_ONE_FILE)


def _unlike(file: Path, name: str, shape: Sequence[int], found: Difference) -> InputFileError:
    elements = math.prod(shape)
    return InputFileError(
        f"tensor '{name}' is not what the recipe makes of the inputs",
        where=f"{file}, tensor '{name}', element {position(shape, found.first)}",
        why=f"{found.count} of {elements} elements differ; the first is {found.stored} in the file and {found.computed} recomputed",
        fix=_AGAIN,
    )
