"""README.md of a merged model: a Hugging Face model card with the recipe and the coefficients."""

from __future__ import annotations

from collections.abc import Iterable

from ..methods import METHODS, Method
from ..methods.option import WEIGHT
from ..records import Coefficients, Recipe, Settings
from ..settings import LAMBDA


def _front_matter(parents: Iterable[str]) -> list[str]:
    """The card's metadata; `parents` are the hub's names of models, which the hub links."""
    named = [f"- {name}" for name in dict.fromkeys(parents)]
    return [
        "---",
        "library_name: transformers",
        *(["base_model:", *named] if named else []),
        "base_model_relation: merge",
        "tags:",
        "- merge",
        "- sensmerge",
        "---",
    ]


def coefficient_table(coefficients: Coefficients) -> list[str]:
    """Markdown: what multiplies each expert's task vector, by layer group, with half the width of its 95 % interval."""
    header = "| layer | " + " | ".join(coefficients.models) + " |"
    rule = "|---|" + "---:|" * len(coefficients.models)
    between = None if coefficients.intervals is None else coefficients.intervals.weights
    rows = [
        f"| {layer} | " + " | ".join(_cells(at, coefficients.weights, between)) + " |"
        for at, layer in enumerate(coefficients.layers)
    ]
    return [header, rule, *rows]


def _cells(at: int, weights: list[list[float]], between: list[list[list[float]]] | None) -> list[str]:
    if between is None:
        return [f"{row[at]:.4f}" for row in weights]
    halves = [(ends[at][1] - ends[at][0]) / 2 for ends in between]
    return [f"{row[at]:.4f} ± {half:.4f}" for row, half in zip(weights, halves, strict=True)]


def _ingredients(recipe: Recipe, method: Method) -> list[str]:
    """Markdown: the models, with their weights where the method has any, or the slices that were stacked."""
    if not recipe.slices:
        weighted = WEIGHT.name in method.by_name
        return [
            f"- `{expert.model}`"
            + (f" (weight {expert.weight:g}{_varies(expert.parameters, WEIGHT.name)})" if weighted else "")
            for expert in recipe.models
        ]
    lines, first = [], 0
    for part in recipe.slices:
        start, end = part.sources[0].layers
        sources = ", ".join(f"`{each.model}` {_numbers(*each.layers)}" for each in part.sources)
        lines.append(f"- {_numbers(first, first + end - start)} of the result: {sources}")
        first += end - start
    return lines


def _numbers(first: int, end: int) -> str:
    return f"layer {first}" if end - first == 1 else f"layers {first} to {end - 1}"


def _varies(settings: Settings, name: str) -> str:
    """What to say of a number that is not the same for every tensor."""
    return ", differs between tensors" if isinstance(settings.get(name), tuple) else ""


def model_card(recipe: Recipe, coefficients: Coefficients | None, scale: float, parents: Iterable[str] = ()) -> str:
    """The card's text: what was merged, with which coefficients, and the recipe; `scale` is λ, told where the method has one.

    `parents` are the hub's names (`org/name`) of the models that came from it.
    """
    method = METHODS.get(recipe.merge_method, where=recipe.where())
    lines = [*_front_matter(parents), "", "# A merge made with sensmerge", ""]
    base = f" on the base `{recipe.base_model}`" if recipe.base_model else ""
    number = f", λ = {scale:g}{_varies(recipe.parameters, LAMBDA.name)}" if method.adds else ""
    lines += [f"Method `{recipe.merge_method}`{base}{number}. {'Slices' if recipe.slices else 'Models'}:", ""]
    lines += _ingredients(recipe, method)
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
        uncertainty = coefficients.uncertainty()
        lines += [] if uncertainty is None else ["", f"{uncertainty[0].upper()}{uncertainty[1:]}."]
        lines += ["", *(f"> {warning}" for warning in coefficients.warnings)] if coefficients.warnings else []
    lines += ["", "## Recipe", "", "```yaml", recipe.text.rstrip("\n"), "```", ""]
    return "\n".join(lines)
