"""sensmerge: merge fine-tuned language models with coefficients measured from data (Sens-Merging, arXiv 2502.12420).

    import sensmerge as sm
    recipe = sm.load_recipe("recipe.yml")
    profiles, alignment = sm.calibrate(recipe)
    coefficients = sm.coefficients(profiles, alignment, temperature=0.1)
    sm.merge(recipe, "out", coefficients=coefficients)

Names are imported on first use: `import sensmerge` itself costs next to nothing and imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "load_recipe": "recipe",
    "calibrate": "pipeline",
    "coefficients": "pipeline",
    "merge": "pipeline",
    "check": "pipeline.verifying",
    "diff": "pipeline.comparing",
    "evaluate": "evaluation.run",
    "train_family": "zoo.family",
    "SensmergeError": "errors",
}

__all__ = [
    "SensmergeError",
    "__version__",
    "calibrate",
    "check",
    "coefficients",
    "diff",
    "evaluate",
    "load_recipe",
    "merge",
    "randomness",
    "train_family",
]

if TYPE_CHECKING:
    from . import randomness
    from .errors import SensmergeError
    from .evaluation.run import evaluate
    from .pipeline import calibrate, coefficients, merge
    from .pipeline.comparing import diff
    from .pipeline.verifying import check
    from .recipe import load_recipe
    from .zoo.family import train_family


def __getattr__(name: str) -> Any:
    if name == "randomness":
        return importlib.import_module(".randomness", __name__)
    if name not in _PLACES:
        raise AttributeError(f"module 'sensmerge' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
