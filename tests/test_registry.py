"""The registry: every built-in name works, a misspelt one is answered with the nearest, plug-ins add names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sensmerge.distances import DISTANCES
from sensmerge.errors import RecipeError
from sensmerge.methods import METHODS, Method
from sensmerge.registry import Registry, suggestion, unknown_name
from sensmerge.rules import RULES, Rule

GROUP = "sensmerge.test_plugins"


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        (METHODS, {"linear", "task_arithmetic"}),
        (RULES, {"softmax", "normalized", "alpha_only", "cross_task_only", "additive", "uniform"}),
        (DISTANCES, {"l2", "kl", "js", "cosine"}),
    ],
)
def test_every_promised_name_can_be_imported(registry: Registry[Any], names: set[str]) -> None:
    """The names of DESIGN sections 4 and 5, sorted, and each gives an object that knows its own name."""
    assert names <= set(registry.names())
    assert registry.names() == sorted(registry.names())
    for name in registry.names():
        found = registry.get(name, where="here")
        assert callable(found) or found.name == name
        assert isinstance(found, (Method, Rule)) or callable(found)


@pytest.mark.parametrize(
    ("registry", "wrong", "right"),
    [
        (METHODS, "task_aritmetic", "task_arithmetic"),
        (METHODS, "Linear", "linear"),
        (METHODS, "task-arithmetic", "task_arithmetic"),
        (RULES, "sofmax", "softmax"),
        (RULES, "normalised", "normalized"),
        (RULES, "alpha", "alpha_only"),
        (DISTANCES, "cosin", "cosine"),
        (DISTANCES, "L2", "l2"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(registry: Registry[Any], wrong: str, right: str) -> None:
    """Exit code 2, the place, all known names, and the suggestion."""
    with pytest.raises(RecipeError) as caught:
        registry.get(wrong, where="r.yml:3")
    error = caught.value
    assert (error.exit_code, error.where) == (2, "r.yml:3")
    assert error.fix == f"did you mean '{right}'?"
    assert all(name in error.why for name in registry.names())
    assert str(error).count("\n") == 3, "four lines"


def test_nothing_near_gives_no_suggestion() -> None:
    """A wild guess is worse than the list."""
    assert suggestion("zzzzzz", ["linear", "slerp"]) is None
    error = unknown_name("method", "zzzzzz", ["slerp", "linear"], where="x")
    assert "did you mean" not in error.fix
    assert "linear, slerp" in error.why


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package (module and metadata on sys.path) whose entry points a test writes."""
    (tmp_path / "sensmerge_test_plugin.py").write_text("OBJECT = 'from the plug-in'\nOTHER = 7\n")
    info = tmp_path / "sensmerge_test_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sensmerge-test-plugin\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield info
    sys.modules.pop("sensmerge_test_plugin", None)


def test_a_package_can_add_a_name(package: Path) -> None:
    """A real entry point, found through importlib.metadata and imported on first use only."""
    (package / "entry_points.txt").write_text(f"[{GROUP}]\nextra = sensmerge_test_plugin:OBJECT\n")
    registry: Registry[str] = Registry("thing", {"os": "os:name"}, GROUP)
    assert registry.names() == ["extra", "os"]
    assert "sensmerge_test_plugin" not in sys.modules
    assert registry.get("extra", where="here") == "from the plug-in"
    with pytest.raises(RecipeError, match="did you mean 'extra'"):
        registry.get("extr", where="here")


def test_a_package_cannot_take_a_built_in_name(package: Path) -> None:
    """Nor can it be taken silently on the second look."""
    (package / "entry_points.txt").write_text(f"[{GROUP}]\nos = sensmerge_test_plugin:OBJECT\n")
    registry: Registry[str] = Registry("thing", {"os": "os:name"}, GROUP)
    with pytest.raises(RecipeError) as caught:
        registry.names()
    assert "'os'" in caught.value.what
    assert "sensmerge_test_plugin" in caught.value.where
    with pytest.raises(RecipeError):
        registry.get("os", where="here")


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    """A place that cannot be imported harms only who asks for it."""
    registry: Registry[object] = Registry("thing", {"bad": "no_such_module_at_all:X", "os": "os:name"}, GROUP)
    assert registry.names() == ["bad", "os"]
    assert registry.get("os", where="here")
    with pytest.raises(ModuleNotFoundError):
        registry.get("bad", where="here")
