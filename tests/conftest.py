"""What tests share: one tiny family of untrained models, and one trained family a session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# No test asks the real hub. Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from sensmerge.zoo.family import Family, train_family
from tests.oracle.families import FamilyFiles, FamilySpec, build_family

ROOT = Path(__file__).resolve().parent.parent

# As XDG_CACHE_HOME it makes a subprocess find the family that this session trained.
CACHE = ROOT / ".cache"

# Subprocesses must not reach for a hub, and two of them at once must not fight for the cores.
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def small_family() -> Family:
    """The tiny family that `sensmerge demo --size small` trains; kept in .cache under a hash of its recipe."""
    return train_family("small", 0, CACHE / "sensmerge" / "zoo")


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> FamilyFiles:
    """A random base and three experts with very unlike sensitivities, with a tokenizer and calibration files. Read only."""
    spec = FamilySpec("untied", seed=10, kinds=("pair", "instruction", "text"), sizes=(0.1, 0.3, 0.5))
    return build_family(spec, tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the calibration of `untrained`, so that it is measured once a session."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="session")
def sensmerge() -> Run:
    """Run the command in a process of its own; returns the finished process, never raises."""

    def run(
        *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sensmerge", *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env={**os.environ, **QUIET, **(env or {})}, capture_output=True, text=True, check=False
        )

    return run
