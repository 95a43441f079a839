"""DELLA (arXiv 2406.11617) without the election: entries dropped by rank, then summed."""

from __future__ import annotations

from dataclasses import replace

from . import della
from .method import Call, Steps
from .option import normalize
from .task_vectors import task_vector_steps


def steps(call: Call) -> Steps:
    """Drop by rank, rescale, sum."""
    return task_vector_steps(call, della.pruned(call), election=False)


METHOD = replace(
    della.METHOD,
    name="della_linear",
    summary="task vectors with entries dropped by rank and the rest rescaled, then summed",
    steps=steps,
    options=tuple(normalize(False) if option.name == "normalize" else option for option in della.METHOD.options),
    check=lambda call: della.check(call) or call.divides_by_zero(),
)
