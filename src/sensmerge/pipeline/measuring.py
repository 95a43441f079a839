"""Running the models of a recipe over calibration samples: each is loaded once, for its own sensitivity and for all tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import progress
from ..checkpoints.formats import FLOATS
from ..checkpoints.source import Checkpoint
from ..distances import DISTANCES
from ..errors import ResourceError
from ..records import CalibrationSet, SensSettings, write_atomically
from .models import RecipeModels

if TYPE_CHECKING:
    from ..calibration.activations import Activations
    from ..calibration.measure import MeasuredModel
    from ..calibration.per_sample import Score

# torch and what needs it are imported where something is measured.

Sums = Mapping[str, float]

# Positions for which the output heads are read once.
COMPARED_AT_ONCE = 4096


class SampleSums:
    """Per-sample sums of one expert in a file that grows while it is measured: what an interrupted calibration goes on from.

    The first line says what the sums came from; a file that came from something else is begun anew, and a line that cannot be read
    ends it. `by_row` maps a sample's row in its data file to its sums by tensor; `paths` counts modules by how they were measured
    (with the last samples: a module that takes one sample at a time may be found out on the way).
    """

    def __init__(self, path: Path, inputs: str) -> None:
        self._path = path
        self.by_row: dict[int, Sums] = {}
        self.paths: dict[str, int] = {}
        header = json.dumps({"schema": 1, "inputs": inputs})
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        sound = len(lines) > 0 and lines[0] == header
        for line in lines[1:] if sound else []:
            try:
                entry = json.loads(line)
                paths = {str(name): int(count) for name, count in entry["paths"].items()}
                sums = {str(name): float(value) for name, value in entry["sums"].items()}
                if not all(math.isfinite(value) for value in sums.values()):
                    break
                self.by_row[int(entry["row"])], self.paths = sums, paths
            except (ValueError, KeyError, TypeError, AttributeError):
                # A line that was being written when the process ended.
                break
        kept = [header, *(self._line(row) for row in self.by_row)]
        write_atomically(path, "".join(f"{line}\n" for line in kept))

    def add(self, found: Mapping[int, Sums], paths: Mapping[str, int]) -> None:
        """Append samples, by row. Raises ResourceError."""
        self.by_row |= found
        self.paths = dict(paths)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{self._line(row)}\n" for row in found)
        except OSError as error:
            raise ResourceError(
                "what was measured could not be kept",
                where=str(self._path),
                why=str(error),
                fix="free some space and run it again: it goes on where it stands",
            ) from error

    def _line(self, row: int) -> str:
        return json.dumps({"row": row, "paths": self.paths, "sums": self.by_row[row]})


@dataclass
class Work:
    """What is to be measured: the samples of each task, whose sums are wanted by expert, and which pairs of models are compared.

    `sums[i]` takes expert i's own sensitivities, absent where they are known; `pairs[i, j]` are the
    places of task j's samples on which the distance of model i from expert j is wanted, found in that order in `distances[i, j]`.
    """

    tasks: Sequence[CalibrationSet]
    sums: Mapping[int, SampleSums]
    pairs: Mapping[tuple[int, int], Sequence[int]]
    distances: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def places_of(self, model: int) -> dict[int, set[int]]:
        """The samples, by task, on which a model's hidden states are needed."""
        wanted: dict[int, set[int]] = {}
        for (first, task), places in self.pairs.items():
            if model in (first, task) and places:
                wanted.setdefault(task, set()).update(places)
        return wanted


def measure(
    models: RecipeModels, settings: SensSettings, work: Work, *, device: str, memory: str, scratch: Path
) -> None:
    """Do the work: every model is loaded once. Raises NonFiniteError, InputFileError, IncompatibleModelsError, ResourceError."""
    from ..calibration.activations import Activations
    from ..calibration.measure import MeasuredModel
    from ..calibration.models import choose_device

    chosen = choose_device(device)
    needed = [at for at in range(len(models.experts)) if at in work.sums or work.places_of(at)]
    measured: dict[int, MeasuredModel] = {}
    scratch.mkdir(parents=True, exist_ok=True)
    with Activations(scratch) as hidden:
        for at in needed:
            measured[at] = MeasuredModel(
                models.experts[at],
                label=models.names[at],
                device=chosen,
                compute_dtype=settings.compute_dtype,
                memory=memory,
                attention=settings.attn_implementation,
                scratch=scratch,
            )
            if measured[at].streamed:
                progress.message(f"{models.names[at]} is streamed: one of its blocks is in memory at a time")
            with measured[at].held():
                _run(models, settings, work, at, measured[at], hidden)
        _compare(models, settings, work, measured, hidden)


def _run(
    models: RecipeModels, settings: SensSettings, work: Work, at: int, model: MeasuredModel, hidden: Activations
) -> None:
    """One model: its own sums, and its hidden states on every task that needs them."""
    from ..calibration.alignment import compared_positions

    tasks = work.places_of(at)
    if tasks:
        model.check_head(work.tasks[at])
    heard: set[tuple[int, int]] = set()

    def keep_for(task: int) -> Callable[..., None]:
        def keep(place: int, hidden_TH: object) -> None:
            if place not in tasks[task]:
                return
            heard.add((task, place))
            positions = compared_positions(work.tasks[task].loss_mask[place], settings.positions)
            hidden.put((at, task, place), hidden_TH[positions])  # type: ignore[index]

        return keep

    if at in work.sums:
        samples, sums = work.tasks[at], work.sums[at]
        left = [place for place, row in enumerate(samples.rows) if row not in sums.by_row]
        if len(left) < len(samples.rows):
            progress.message(f"{model.label}: {len(samples.rows) - len(left)} samples were measured before")

        def save(found: Mapping[int, Sums], paths: Mapping[str, int]) -> None:
            sums.add({samples.rows[place]: values for place, values in found.items()}, paths)

        model.sums(
            samples,
            _score(settings.score, models.experts[at], models.base),
            places=left,
            save=save,
            keep=keep_for(at) if at in tasks else None,
        )
    for task in sorted(tasks):
        left = [place for place in sorted(tasks[task]) if (task, place) not in heard]
        if left:
            model.hidden(work.tasks[task], places=left, keep=keep_for(task), task=models.names[task])


def _compare(
    models: RecipeModels,
    settings: SensSettings,
    work: Work,
    measured: Mapping[int, MeasuredModel],
    hidden: Activations,
) -> None:
    """The distances of all pairs, from hidden states and output heads."""
    from ..calibration.alignment import mean_distances

    distance = DISTANCES.get(settings.distance, where="sens.distance")
    heads = {at: model.head() for at, model in measured.items()}
    with progress.task("distances between experts", len(work.pairs)) as advance:
        for (first, task), places in work.pairs.items():
            found: list[float] = []
            ours: list[Any] = []
            theirs: list[Any] = []
            for place in places:
                ours.append(hidden.get((first, task, place)))
                theirs.append(hidden.get((task, task, place)))
                if sum(len(each) for each in ours) >= COMPARED_AT_ONCE or place == places[-1]:
                    found += mean_distances(ours, heads[first], theirs, heads[task], distance)
                    ours, theirs = [], []
            work.distances[first, task] = found
            advance(1)


def _score(name: str, expert: Checkpoint, base: Checkpoint | None) -> Score:
    import numpy as np
    import torch

    from ..calibration.scores import FisherScore, TaskVectorScore, WeightScore
    from ..checkpoints.formats import to_float32

    if name == "fisher":
        return FisherScore()
    if name == "weight":
        return WeightScore()
    assert base is not None

    def read(
        source: Checkpoint, tensor: str, first: int, count: int
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        spec = source.tensors[tensor]
        columns = spec.elements // spec.shape[0] if len(spec.shape) > 1 else spec.elements
        assert spec.dtype in FLOATS
        return to_float32(source.read(tensor, first * columns, count * columns), spec.dtype).reshape(count, columns)

    def rows(tensor: str, first: int, count: int) -> torch.Tensor:
        # From both files, exactly: a weight rounded to the compute dtype differs from the base by more than δ.
        return torch.from_numpy(read(expert, tensor, first, count) - read(base, tensor, first, count))

    return TaskVectorScore(rows)
