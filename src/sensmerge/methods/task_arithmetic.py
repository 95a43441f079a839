"""Task Arithmetic: θ_0 + λ Σ w_i c_i δ_i with δ_i = θ_i - θ_0 (Ilharco et al., 2023, arXiv 2212.04089)."""

from __future__ import annotations

from .method import Call, Method, Steps
from .option import INT8_MASK, WEIGHT, normalize
from .task_vectors import task_vector_steps


def steps(call: Call) -> Steps:
    """The update is Σ w c δ; with `normalize`, divided by Σ w."""
    return task_vector_steps(call, election=False)


METHOD = Method(
    name="task_arithmetic",
    summary="base + lambda * sum of weighted task vectors",
    citation="Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089",
    steps=steps,
    options=(WEIGHT, normalize(False), INT8_MASK),
    adds=True,
    takes_sens=True,
    check=Call.divides_by_zero,
)
