"""Interpolation on a sphere between two vectors that are known by their inner products alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .method import Numbers


def slerp_factors(t: float, cosine: Numbers, colinear: NDArray[np.bool_]) -> Numbers:
    """The factors (f_a, f_b), float64 [G, 2], of f_a·a + f_b·b at `t` between a (0) and b (1), for G pairs of vectors.

    Plain interpolation where a pair is `colinear` (bool [G]). Shoemake, 1985, Animating rotation with quaternion curves.
    """
    angle = np.arccos(np.where(colinear, 0.0, np.clip(cosine, -1.0, 1.0)))
    sine = np.where(colinear, 1.0, np.sin(angle))
    first = np.where(colinear, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
    second = np.where(colinear, t, np.sin(t * angle) / sine)
    return np.column_stack([first, second])
