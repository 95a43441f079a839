"""What a merge method is: facts that a recipe and a plan need, and a few pure functions that the engine runs over tiles.

The engine reads a tensor in tiles of float32 elements. For each tile it has the base `base[n]` and one row for each expert,
`x[k, n]`: its task vector δ_k = θ_k - θ_0, or θ_k itself where the method works on weights. A method may first *reduce* a tensor
(passes that give small arrays: sums, order statistics), then *sparsify* the rows of a tile, then *combine* them into one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .option import Option, Value

if TYPE_CHECKING:
    import torch

    from .kernel import Kernel

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Call:
    """All that a method may know of one output tensor before it is read.

    `weights` are the recipe's w_k and `coefficients` the data-driven c_k (all exactly 1.0 in a plain merge), K of each, in
    processing order; `options` the method's own parameters for this tensor, `per_model` those with a value for each expert;
    `has_base` tells whether there is a base beside the K experts.
    """

    shape: tuple[int, ...]
    weights: tuple[float, ...]
    coefficients: tuple[float, ...]
    options: Mapping[str, Value]
    per_model: Mapping[str, tuple[Value, ...]]
    has_base: bool

    @property
    def experts(self) -> int:
        """K."""
        return len(self.weights)

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension, 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    def divides_by_zero(self) -> tuple[str, str] | None:
        """What is wrong if the sum of the weights, which a normalising method divides by, is zero; for `Method.check`."""
        if self.options.get("normalize") and math.fsum(self.weights) == 0.0:
            why = "the weights sum to zero, and `normalize: true` divides by their sum"
            return why, "write `normalize: false` into the recipe's top-level `parameters:`, or change a weight"
        return None

    def numbers(self, name: str) -> list[float]:
        """The K values of a per-model number."""
        return [float(value) for value in self.per_model[name]]


@dataclass(frozen=True)
class Sums:
    """A pass that adds up: float64 [groups, width], whatever the order in which the tensor is read.

    `kernel(n, first, columns, base, x, experts, groups, keys, out)` adds one tile's part to `out` [groups, width]: one group, or
    one for each of `columns` columns. With `by` `row` it *sets* the rows that lie in the tile, which is then made of whole rows.
    `sparsified` passes see the experts' rows after `sparsify`.
    """

    kernel: Kernel
    width: int
    by: Literal["tensor", "row", "column"] = "tensor"
    sparsified: bool = False


@dataclass(frozen=True)
class Ranks:
    """A pass that selects exactly: the values at given places of each measured row, sorted ascending; float32 [rows, places].

    `places(elements, zeros)` gives, for each of `rows` rows, the same number of 0-based places; `zeros[row]` is how many of its
    values are zero. The place `elements`, one past the largest, holds infinity. Measured is |x_k| (K rows), or what
    `measure(n, first, columns, base, x, experts, groups, keys, out)` writes into `out[rows, n]`: non-negative numbers. With
    `everywhere` the rows run over all tensors of the model.
    """

    places: Callable[[int, Sequence[int]], Sequence[Sequence[int]]]
    rows: int
    measure: Kernel | None = None
    everywhere: bool = False


@dataclass(frozen=True)
class Steps:
    """How one tensor is merged: passes, then for each tile `sparsify` and `combine`.

    Before each pass and before the merge `numbers(results so far)` gives what the kernels are told: `experts` float64 [K, P] and
    `groups` float64 [G, Q]. `sparsify(n, first, columns, x, experts, groups, keys)` changes `x` in place;
    `combine(n, first, columns, base, x, experts, groups, out)` writes `out[n]`. `first` is the place of the tile's first element
    in the tensor, `columns` the length of a row (the last dimension, unless named here), `keys` uint32 [K, 2] the draws'
    (sensmerge.randomness). Tiles are made of whole rows where `whole_rows` asks for them.
    """

    combine: Kernel
    numbers: Callable[[Sequence[Any]], tuple[Numbers, Numbers]]
    passes: tuple[Sums | Ranks, ...] = ()
    sparsify: Kernel | None = None
    whole_rows: bool = False
    columns: int | None = None


@dataclass(frozen=True)
class Method:
    """A merge method.

    `base` says what it needs of `base_model`: it is `required`, `optional` (task vectors if there is one, else weights), a `member`
    (one of the models where it is listed among them) or `joins` (one of the models, listed or not). `experts` are the least and
    the largest number of models beside the base (None: any). `vectors` says whether x holds task vectors: `always`, `with_base`,
    or `never`. Where `adds` is true the result is the *update*, to be scaled by λ and added to the base; otherwise it is the
    merged tile itself, and the method has no λ.
    `draws` methods have a `seed` among their options. A method has either `steps`, or `whole`: a function of whole tensors (θ, not
    task vectors), in torch, on any device.
    """

    name: str
    summary: str
    citation: str
    steps: Callable[[Call], Steps] | None = None
    whole: Callable[[Call, torch.Tensor | None, Sequence[torch.Tensor]], torch.Tensor] | None = None
    options: tuple[Option, ...] = ()
    base: Literal["required", "optional", "member", "joins"] = "required"
    experts: tuple[int, int | None] = (1, None)
    vectors: Literal["always", "with_base", "never"] = "always"
    adds: bool = False
    takes_sens: bool = False
    draws: bool = False
    # What the options of one tensor must satisfy together; returns what is wrong and a line that mends it, or None.
    check: Callable[[Call], tuple[str, str] | None] = field(default=lambda call: None)

    @property
    def by_name(self) -> dict[str, Option]:
        """The options by name."""
        return {option.name: option for option in self.options}
