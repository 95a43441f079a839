"""The parameters that a method takes from a recipe: mergekit's names, checked once, whatever level of the recipe they stand on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Value = float | bool | str

# A required option has no default.
REQUIRED: None = None


@dataclass(frozen=True)
class Option:
    """One parameter of a merge method.

    `kind` is what a value is: a `number` between `low` and `high` (both included), a `whole` number, a `truth` value, or one of
    `choices`, which maps what may be written to what it means (so that `rescale: true` and `rescale: keep` can be one thing).
    `per_model` parameters have a value for each expert, the others one for all. Numbers may be written as layer gradients (a list
    of numbers, interpolated over the layers); all may be filtered by tensor name.
    """

    name: str
    kind: Literal["number", "whole", "truth", "choice"]
    default: Value | None
    summary: str
    per_model: bool = False
    low: float = -math.inf
    high: float = math.inf
    choices: Mapping[bool | str, str] | None = None

    @property
    def required(self) -> bool:
        """Whether the recipe must name it."""
        return self.default is None

    def check(self, value: object) -> Value:
        """What `value` means; raises ValueError with the text "must be …" for what it cannot be."""
        if self.kind == "truth":
            if isinstance(value, bool):
                return value
            raise ValueError("must be true or false")
        if self.kind == "choice":
            choices = self.choices or {}
            # bool is an int in Python: 1 must not be taken for true.
            if isinstance(value, (bool, str)) and value in choices:
                return choices[value]
            raise ValueError(f"must be one of {', '.join(str(choice).lower() for choice in choices)}")
        number = _number(value)
        if number is None or (self.kind == "whole" and number != int(number)) or not self.low <= number <= self.high:
            raise ValueError(f"must be {self._needed()}")
        if self.kind == "whole":
            # Large seeds do not survive as floats.
            return value if isinstance(value, int) else int(number)
        return number

    def _needed(self) -> str:
        kind = "a whole number" if self.kind == "whole" else "a number"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{kind} from {self.low:g} to {self.high:g}"
        return f"{kind} from {self.low:g} up" if math.isfinite(self.low) else kind


def _number(value: object) -> float | None:
    """A finite number; YAML 1.1 reads `1e-3` as text, so text that is a number is taken as one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


WEIGHT = Option("weight", "number", 1.0, "how much the model counts", per_model=True)
DENSITY = Option("density", "number", 1.0, "share of each task vector that is kept", per_model=True, low=0.0, high=1.0)
SEED = Option("seed", "whole", 0, "of the random draws", low=0, high=2**63)
INT8_MASK = Option("int8_mask", "truth", False, "accepted for mergekit's recipes; changes nothing here")
L1: Mapping[bool | str, str] = {"none": "none", False: "none", "l1": "l1", True: "l1"}
RESCALE_L1 = Option("rescale", "choice", "none", "l1: the kept entries keep the L1 norm of all", choices=L1)


def normalize(default: bool) -> Option:
    """The option of dividing by the sum of the weights that took part."""
    return Option("normalize", "truth", default, "divide by the sum of the weights")
