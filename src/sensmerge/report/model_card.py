"""README.md of a merged model: a Hugging Face model card with the recipe and the coefficients."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..records import Coefficients, Recipe

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def is_hub_id(model: str, found_locally: bool) -> bool:
    """Whether a model string may be published as a hub id: `owner/name`, and no folder of that name was read."""
    return not found_locally and _HUB_ID.match(model) is not None


def _front_matter(hub_ids: Sequence[str]) -> list[str]:
    parents = ["base_model:", *(f"- {name}" for name in hub_ids)] if hub_ids else []
    return [
        "---",
        "library_name: transformers",
        *parents,
        "base_model_relation: merge",
        "tags:",
        "- merge",
        "- sensmerge",
        "---",
    ]


def coefficient_table(coefficients: Coefficients) -> list[str]:
    """Markdown: what multiplies each expert's task vector, by layer group."""
    header = "| layer | " + " | ".join(coefficients.models) + " |"
    rule = "|---|" + "---:|" * len(coefficients.models)
    rows = [
        f"| {layer} | " + " | ".join(f"{row[at]:.4f}" for row in coefficients.weights) + " |"
        for at, layer in enumerate(coefficients.layers)
    ]
    return [header, rule, *rows]


def model_card(recipe: Recipe, coefficients: Coefficients | None, hub_ids: Sequence[str], scale: float) -> str:
    """The card's text. `hub_ids` are the parents that may be linked (local paths are left out)."""
    lines = [*_front_matter(hub_ids), "", "# A merge made with sensmerge", ""]
    base = f" on the base `{recipe.base_model}`" if recipe.base_model else ""
    lines += [f"Method `{recipe.merge_method}`{base}, λ = {scale:g}. Models:", ""]
    lines += [f"- `{expert.model}` (weight {expert.weight:g})" for expert in recipe.models]
    if coefficients is not None:
        lines += [
            "",
            "## Coefficients",
            "",
            f"Sens-Merging (arXiv 2502.12420), preset `{coefficients.preset}`, rule `{coefficients.rule}`,"
            f" spread max|K·σ - 1| = {coefficients.spread:.3f}. What multiplies each task vector:",
            "",
            *coefficient_table(coefficients),
        ]
        lines += ["", *(f"> {warning}" for warning in coefficients.warnings)] if coefficients.warnings else []
    lines += ["", "## Recipe", "", "```yaml", recipe.text.rstrip("\n"), "```", ""]
    return "\n".join(lines)
