"""Model Breadcrumbs (arXiv 2312.06795) in place of the trimming of TIES (arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import replace

from . import breadcrumbs
from .method import Call, Steps
from .task_vectors import task_vector_steps


def steps(call: Call) -> Steps:
    """Cut both tails, elect, sum what agrees."""
    return task_vector_steps(call, breadcrumbs.band(call), election=True)


METHOD = replace(
    breadcrumbs.METHOD,
    name="breadcrumbs_ties",
    summary="task vectors without their smallest and largest entries, signs elected",
    citation="Davari & Belilovsky, arXiv 2312.06795; Yadav et al., TIES-Merging, arXiv 2306.01708",
    steps=steps,
    # The election divides by the weights that agree, element by element.
    check=lambda call: None,
)
