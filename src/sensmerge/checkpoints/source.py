"""What every reader of the project sees of a model: `TensorSource`, its tensors; `Checkpoint`, a whole model.

A folder is a checkpoint; a LoRA adapter on a base or a model whose vocabulary was aligned are others. `Wrapped` is what they
are made from: a checkpoint that shows another one, changed in part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..records import TensorSpec
from .formats import FLOATS, ITEM_SIZES, Raw

# What a tokenizer is made of: a change in any of these changes the token ids of the samples.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of each tokenizer file in a model folder: the same weights with another tokenizer are another model."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in TOKENIZER_FILES
        if (folder / name).is_file()
    }


class TensorSource(Protocol):
    """A model as a set of named tensors that can be read in pieces."""

    @property
    def label(self) -> str:
        """What to call the model in messages."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the model."""

    def read(self, name: str, start: int, count: int) -> Raw:
        """`count` elements of tensor `name` from element `start` on, flat, in the stored dtype (BF16 as uint16 bits)."""

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the bytes of tensor `name` from element `start` on; may be called from several threads at once."""


class Checkpoint(TensorSource, Protocol):
    """A whole model: tensors, config, and where the files lie that it was made from."""

    @property
    def path(self) -> Path:
        """The folder of config.json, which `transformers` loads (of the base, for an adapter)."""

    @property
    def tokenizer_path(self) -> Path:
        """The folder whose tokenizer files belong to the model."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder that is read for the model, resolved: an output may touch none of them."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""

    def stored_dtype(self, name: str) -> str:
        """The dtype in which a merged tensor of this name is written unless the recipe says otherwise.

        That of the file, which differs from the dtype that is read where the numbers are computed (a LoRA's).
        """

    def fingerprint(self) -> str:
        """The model's identity, SHA-256 (hex): it does not depend on shards or paths, and costs no pass over the weights."""

    def close(self) -> None:
        """Close all files; reading opens them again."""


def parameters_of(source: TensorSource) -> int:
    """Number of elements of all floating-point tensors."""
    return sum(spec.elements for spec in source.tensors.values() if spec.dtype in FLOATS)


def read_through(source: TensorSource, name: str, start: int, count: int) -> Raw:
    """`TensorSource.read` for a source that has `read_into`."""
    dtype = source.tensors[name].dtype
    item = ITEM_SIZES[dtype]
    data = np.empty(count * item, np.uint8)
    source.read_into(name, start, data)
    return data.view(FLOATS.get(dtype, np.dtype(f"V{item}")))


class Wrapped:
    """A checkpoint that shows another one; subclasses change what they are for. Closing it closes the other."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner = inner

    @property
    def label(self) -> str:
        """See TensorSource."""
        return self.inner.label

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """See TensorSource."""
        return self.inner.tensors

    @property
    def path(self) -> Path:
        """See Checkpoint."""
        return self.inner.path

    @property
    def tokenizer_path(self) -> Path:
        """See Checkpoint."""
        return self.inner.tokenizer_path

    @property
    def folders(self) -> tuple[Path, ...]:
        """See Checkpoint."""
        return self.inner.folders

    @property
    def config(self) -> Mapping[str, Any]:
        """See Checkpoint."""
        return self.inner.config

    def stored_dtype(self, name: str) -> str:
        """See Checkpoint."""
        return self.inner.stored_dtype(name)

    def read(self, name: str, start: int, count: int) -> Raw:
        """See TensorSource."""
        return read_through(self, name, start, count)

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """See TensorSource."""
        self.inner.read_into(name, start, out)

    def fingerprint(self) -> str:
        """See Checkpoint: that of the model that is shown."""
        return self.inner.fingerprint()

    def close(self) -> None:
        """See Checkpoint."""
        self.inner.close()
