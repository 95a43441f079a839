"""The zoo: a tiny base model and three fully fine-tuned experts (chat, math, code), trained on the spot from a seed.

Everything the family needs is generated here: no download, no network, no GPU. `train_family` is the one public verb.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .family import Family, train_family

__all__ = ["Family", "train_family"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when a family is asked for."""
    if name in __all__:
        from . import family

        return getattr(family, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
