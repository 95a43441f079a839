"""README.md of a merged model: a Hugging Face model card with the recipe and the coefficients."""

from __future__ import annotations

from ..records import Coefficients, Recipe

# Parents are linked only where they are hub ids, and every model is read from a local folder: nothing to link.
_FRONT_MATTER = (
    "---",
    "library_name: transformers",
    "base_model_relation: merge",
    "tags:",
    "- merge",
    "- sensmerge",
    "---",
)


def coefficient_table(coefficients: Coefficients) -> list[str]:
    """Markdown: what multiplies each expert's task vector, by layer group."""
    header = "| layer | " + " | ".join(coefficients.models) + " |"
    rule = "|---|" + "---:|" * len(coefficients.models)
    rows = [
        f"| {layer} | " + " | ".join(f"{row[at]:.4f}" for row in coefficients.weights) + " |"
        for at, layer in enumerate(coefficients.layers)
    ]
    return [header, rule, *rows]


def model_card(recipe: Recipe, coefficients: Coefficients | None, scale: float) -> str:
    """The card's text: what was merged, with which coefficients, and the recipe."""
    lines = [*_FRONT_MATTER, "", "# A merge made with sensmerge", ""]
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
