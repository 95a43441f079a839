"""The frozen records that flow between the floors, each a small JSON file.

Every record carries a `schema` number and, in `inputs`, a hash of what it was computed from; "resume" means: a file with the
same hash exists. Files are written with one top-level key a line, so that they can be read and compared by eye.
"""

from __future__ import annotations

from .measurements import (
    Alignment,
    CalibrationSet,
    Coefficients,
    DrawnSamples,
    Intervals,
    PairDistances,
    Scale,
    Scores,
    SensitivityProfile,
    TaskScore,
)
from .merge_record import MergeRecord
from .plans import MergePlan, TensorInput, TensorPlan
from .recipe import (
    Conditional,
    Expert,
    Recipe,
    SensSettings,
    SensSource,
    Settings,
    Slice,
    SliceSource,
    TokenizerPolicy,
    TokenRule,
)
from .record import Record, hash_of, write_atomically
from .tensors import Role, TensorSpec

__all__ = [
    "Alignment",
    "CalibrationSet",
    "Coefficients",
    "Conditional",
    "DrawnSamples",
    "Expert",
    "Intervals",
    "MergePlan",
    "MergeRecord",
    "PairDistances",
    "Recipe",
    "Record",
    "Role",
    "Scale",
    "Scores",
    "SensSettings",
    "SensSource",
    "SensitivityProfile",
    "Settings",
    "Slice",
    "SliceSource",
    "TaskScore",
    "TensorInput",
    "TensorPlan",
    "TensorSpec",
    "TokenRule",
    "TokenizerPolicy",
    "hash_of",
    "write_atomically",
]
