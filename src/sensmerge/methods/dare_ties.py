"""DARE (arXiv 2311.03099) in place of the trimming of TIES (arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import replace

from . import dare_linear
from .method import Call, Steps
from .task_vectors import task_vector_steps


def steps(call: Call) -> Steps:
    """Drop, rescale, elect, sum what agrees."""
    return task_vector_steps(call, dare_linear.dropped(call), election=True)


METHOD = replace(
    dare_linear.METHOD,
    name="dare_ties",
    summary="task vectors with entries dropped at random and the rest rescaled, signs elected",
    citation="Yu et al., DARE, arXiv 2311.03099; Yadav et al., TIES-Merging, arXiv 2306.01708",
    steps=steps,
    # The election divides by the weights that agree, element by element.
    check=lambda call: None,
)
