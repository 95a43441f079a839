"""The house stands: a floor imports only from floors below it, and within a floor only what is listed before."""

from __future__ import annotations

import ast
from pathlib import Path

import sensmerge

SOURCE = Path(sensmerge.__file__).parent

# The parts of the house, lowest first; names on one line stand on one floor and are listed in order.
FLOORS = (
    ("errors", "records", "randomness", "registry", "progress"),
    ("methods", "rules", "distances"),
    ("checkpoints",),
    ("calibration",),
    ("yamlfile", "settings", "sens_block", "tokenizer_block", "recipe", "matching", "plan", "execution"),
    ("tuning", "evaluation", "report"),
    ("pipeline",),
    ("experiments", "zoo"),
    ("cli",),
    ("__main__",),
)
HEIGHT = {part: (floor, place) for floor, parts in enumerate(FLOORS) for place, part in enumerate(parts)}


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_parts(path: Path) -> set[str]:
    """The parts of sensmerge that a file imports, anywhere in it: imports in functions count as well."""
    found = set()
    package = path.relative_to(SOURCE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module or "") if part)
            names = [module] if module != "sensmerge" else [f"sensmerge.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("sensmerge.")}
    return {part for part in found if part in HEIGHT or (SOURCE / f"{part}.py").exists() or (SOURCE / part).is_dir()}


def files() -> list[Path]:
    """Every module of the package but its public face, which is lazy and may name anything."""
    return [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def test_every_file_has_a_floor() -> None:
    assert {part_of(path) for path in files()} <= HEIGHT.keys()


def test_floors_import_only_from_below() -> None:
    wrong = []
    for path in files():
        part = part_of(path)
        for other in imported_parts(path) - {part}:
            if HEIGHT[other] >= HEIGHT[part]:
                wrong.append(f"{path.relative_to(SOURCE)} ({part}) imports {other}")
    assert wrong == []


def test_the_reader_of_imports_sees_them() -> None:
    assert {"methods", "plan", "progress", "records", "checkpoints"} <= imported_parts(SOURCE / "execution" / "run.py")
    assert "tuning" in imported_parts(SOURCE / "pipeline" / "merging.py")


def test_no_rooms_for_odds_and_ends() -> None:
    names = {part for path in files() for part in path.relative_to(SOURCE).with_suffix("").parts}
    assert names.isdisjoint({"utils", "util", "common", "helpers", "helper", "manager", "misc"})


def test_files_stay_small() -> None:
    long = {
        str(path.relative_to(SOURCE)): lines for path in files() if (lines := len(path.read_text().splitlines())) > 400
    }
    assert long == {}
