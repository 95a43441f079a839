"""`sensmerge merge`, run as a user runs it, against the independent float64 oracle in `tests/oracle`.

Each case is a recipe on a tiny family. What the command leaves behind (profiles, alignment, coefficients, tensors) is
compared with the oracle's own numbers, made from the same folders and data files. The last tests show that the
comparison is sharp: the oracle loses one term of eq. 1-7 at a time, and the comparison must notice it in the right
numbers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from tests.oracle.families import FamilyFiles, FamilySpec, build_family, write_recipe
from tests.oracle.llama64 import Array
from tests.oracle.sens64 import WITHOUT, Result, Settings, block_names, read_weights, sens_merge, to_bfloat16

RELATIVE = 2e-3
"""What float32 calibration may differ from float64, relative; the terms of the equations matter far more than this."""

FAMILIES = {
    "untied": FamilySpec("untied", seed=10, kinds=("pair", "instruction", "text"), sizes=(0.1, 0.3, 0.5)),
    "tied": FamilySpec(
        "tied",
        seed=2,
        kinds=("pair", "instruction", "pair"),
        sizes=(0.1, 0.3, 0.5),
        layers=3,
        hidden=48,
        tied=True,
        adds_bos=False,
        dtype=torch.bfloat16,
    ),
    "biased": FamilySpec(
        "biased", seed=3, kinds=("instruction", "pair"), sizes=(0.2, 0.4), key_value_heads=1, attention_bias=True
    ),
}

PRESETS = {
    "paper": Settings(),
    "paper-tables": Settings(rule="normalized", total=1.0),
    "calibrated": Settings(rule="normalized", lam=None),
}


@dataclass(frozen=True)
class Case:
    """A recipe: a family, a preset (None: the recipe names none) and what the recipe sets besides."""

    family: str = "untied"
    preset: str | None = None
    dtype: str | None = "float32"
    change: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """The same for the oracle."""
        return replace(PRESETS[self.preset or "paper"], **self.change)


CASES = {
    "paper": Case(preset="paper"),
    "nothing named": Case(),
    "paper-tables": Case(preset="paper-tables"),
    "sharp": Case(change={"temperature": 0.05}),
    "normalized": Case(change={"rule": "normalized", "temperature": 0.5}),
    "additive": Case(change={"rule": "additive", "temperature": 0.1, "axis": "column"}),
    "alpha only": Case(change={"rule": "alpha_only", "temperature": 0.2, "other": "own_group"}),
    "cross-task only": Case(change={"rule": "cross_task_only", "temperature": 0.05, "direction": "similarity"}),
    "own group": Case(change={"temperature": 0.05, "other": "own_group", "total": 2.5}),
    "others from the base": Case(change={"temperature": 0.05, "other": "base", "lam": 0.7}),
    "column": Case(change={"temperature": 0.02, "axis": "column", "other": "uniform"}),
    "similarity": Case(change={"temperature": 0.02, "direction": "similarity"}),
    "linear": Case(change={"temperature": 0.05, "method": "linear", "weights": (0.5, 1.0, 2.0)}),
    "weights": Case(change={"temperature": 0.1, "weights": (0.5, 1.0, 2.0), "lam": 0.4}),
    # From here on every case runs the models again: each combines settings that show in different numbers. Two of them
    # share a folder of profiles, where an alignment of other positions must not be taken for theirs.
    "calibrated": Case("tied", preset="calibrated", change={"other": "own_group"}),
    "loss positions": Case("tied", change={"temperature": 0.1, "positions": "loss", "distance": "cosine"}),
    "task vector, cut": Case(
        "tied",
        change={
            "temperature": 0.1,
            "max_length": 30,
            "score": "task_vector",
            "positions": "last",
            "distance": "kl",
        },
    ),
    "fisher over all": Case("biased", change={"temperature": 0.05, "loss": "all", "score": "fisher", "distance": "js"}),
}
IN_BFLOAT16 = {
    "asked for": Case(dtype="bfloat16", change={"temperature": 0.05}),
    "as stored": Case("tied", dtype=None, change={"temperature": 0.05, "positions": "loss", "distance": "cosine"}),
}
SHARP = "sharp"
"""The case that the oracle is damaged on: far from uniform, so every term of the equations shows in the merged weights."""


@dataclass(frozen=True)
class Produced:
    """What `sensmerge merge` left: its records, sensitivity [K, L] from the profiles, and the merged tensors."""

    coefficients: dict[str, Any]
    alignment: dict[str, Any]
    sensitivity: Array
    merged: dict[str, Array]
    dtypes: frozenset[str]


class Disagreement(AssertionError):
    """The command and the oracle differ in these quantities."""

    def __init__(self, errors: Mapping[str, float]) -> None:
        self.quantities = frozenset(errors)
        listed = ", ".join(f"{name} by {error:.2g}" for name, error in errors.items())
        super().__init__(f"relative to a tolerance of {RELATIVE}: {listed}")


class Laboratory:
    """Builds each family once and runs each recipe and its oracle once; recipes share calibrations through `--profiles`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases = CASES | IN_BFLOAT16
        self.families: dict[str, FamilyFiles] = {}
        self.outputs: dict[str, Produced] = {}
        self.oracles: dict[tuple[str, str | None], Result] = {}

    def family(self, label: str) -> FamilyFiles:
        """The family of a case."""
        name = self.cases[label].family
        if name not in self.families:
            self.families[name] = build_family(FAMILIES[name], self.folder / name)
        return self.families[name]

    def base(self, label: str) -> dict[str, Array]:
        """The base's tensors."""
        return read_weights(self.family(label).base)

    def expected(self, label: str, without: str | None = None) -> Result:
        """What the oracle says, whole or without one term."""
        if (label, without) not in self.oracles:
            family, settings = self.family(label), self.cases[label].settings
            self.oracles[label, without] = sens_merge(family.base, family.experts, family.data, settings, without)
        return self.oracles[label, without]

    def produced(self, label: str) -> Produced:
        """What the command makes of the case's recipe."""
        if label not in self.outputs:
            family, settings = self.family(label), self.cases[label].settings
            stem = label.replace(", ", "-").replace(" ", "-")
            recipe, out = family.folder / f"{stem}.yml", family.folder / f"merged-{stem}"
            write_case(self.cases[label], family, recipe)
            profiles = family.folder / f"profiles-{settings.loss}-{settings.score}-{settings.max_length}"
            run_merge(recipe, out, profiles)
            self.outputs[label] = read_output(out, family)
        return self.outputs[label]


def run_merge(recipe: Path, out: Path, profiles: Path) -> None:
    """Run the real command, as a user does."""
    command = [sys.executable, "-m", "sensmerge", "merge", str(recipe), str(out), "--profiles", str(profiles)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def write_case(case: Case, family: FamilyFiles, path: Path) -> None:
    """Write the recipe of a case: only what it changes, so that the presets and defaults are tested too."""
    method = case.change.get("method", "task_arithmetic")
    sens = {} if case.preset is None else {"preset": case.preset}
    sens |= {key: value for key, value in case.change.items() if key not in ("method", "weights", "lam")}
    parameters: dict[str, Any] = {}
    if "lam" in case.change:
        parameters["lambda"] = "auto" if case.change["lam"] is None else case.change["lam"]
    write_recipe(
        family,
        path,
        method=method,
        sens=sens,
        parameters=parameters,
        weights=case.change.get("weights"),
        dtype=case.dtype,
    )


def read_output(out: Path, family: FamilyFiles) -> Produced:
    """Read what a merge left in OUT."""
    records = out / "sensmerge"
    profiles = [json.loads((records / "profiles" / f"{expert.name}.json").read_text()) for expert in family.experts]
    dtypes = set()
    for file in out.glob("*.safetensors"):
        dtypes |= {tensor["dtype"] for _, tensor in safetensors.deserialize(file.read_bytes())}
    return Produced(
        coefficients=json.loads((records / "coefficients.json").read_text()),
        alignment=json.loads((records / "alignment.json").read_text()),
        sensitivity=np.array([profile["sensitivity"] for profile in profiles]),
        merged=read_weights(out),
        dtypes=frozenset(dtypes),
    )


def assert_agrees(produced: Produced, expected: Result, base: Mapping[str, Array]) -> None:
    """Compare every record and the merged tensors with the oracle; raise a `Disagreement` that names what differs."""
    record = produced.coefficients
    assert record["layers"] == block_names(tuple(base))
    assert record["other"].keys() == expected.other.keys()
    assert produced.merged.keys() == expected.merged.keys()
    # While lambda is to be tuned, the record has none and its weights leave it out.
    weights = expected.weights if record["lambda"] is not None else expected.weights / expected.lam
    pairs = {
        "sensitivity": (produced.sensitivity, expected.sensitivity),
        "distances": (produced.alignment["distances"], expected.distances),
        "alpha": (record["alpha"], expected.alpha),
        "tau": (record["tau"], expected.tau),
        "sigma": (record["sigma"], expected.sigma),
        "weights": (record["weights"], weights),
        "spread": (record["spread"], expected.spread),
        "lambda": (expected.lam if record["lambda"] is None else record["lambda"], expected.lam),
    }
    pairs |= {f"other {role}": (sigma, expected.other[role]) for role, sigma in record["other"].items()}
    errors = {name: relative_error(np.array(ours), np.array(theirs)) for name, (ours, theirs) in pairs.items()}
    errors["merged"] = merged_error(produced.merged, expected.merged, base)
    wrong = {name: error for name, error in errors.items() if not error <= RELATIVE}  # not >: a NaN is wrong
    if wrong:
        raise Disagreement(wrong)


def relative_error(ours: Array, theirs: Array) -> float:
    """Return the largest |ours - theirs| / |theirs|; entries that must be 0 must be 0."""
    assert ours.shape == theirs.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(ours == theirs, 0.0, np.abs(ours - theirs) / np.abs(theirs)).max())


def merged_error(ours: Mapping[str, Array], theirs: Mapping[str, Array], base: Mapping[str, Array]) -> float:
    """Return ||ours - theirs|| / ||theirs - base|| over all tensors: relative to the update, not to the weights."""
    apart = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in theirs)
    moved = sum(float(((theirs[name] - base[name]) ** 2).sum()) for name in theirs)
    return math.sqrt(apart / moved)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("label", CASES)
def test_the_command_agrees_with_the_oracle(label: str, laboratory: Laboratory) -> None:
    produced = laboratory.produced(label)
    assert produced.dtypes == {"F32"}
    assert produced.coefficients["models"] == [expert.name for expert in laboratory.family(label).experts]
    assert_agrees(produced, laboratory.expected(label), laboratory.base(label))


@pytest.mark.parametrize("label", IN_BFLOAT16)
def test_bfloat16_output_is_the_rounded_oracle(label: str, laboratory: Laboratory) -> None:
    """Within one unit in the last place, and what float32 arithmetic may be off where base and update nearly cancel."""
    produced, base = laboratory.produced(label), laboratory.base(label)
    assert produced.dtypes == {"BF16"}
    for name, exact in laboratory.expected(label).merged.items():
        ours = produced.merged[name]
        off = 1e-5 * (np.abs(base[name]) + np.abs(exact - base[name]))
        unit = np.ldexp(1.0, np.frexp(exact)[1] - 8)
        assert np.all(ours >= to_bfloat16(exact - off) - unit), name
        assert np.all(ours <= to_bfloat16(exact + off) + unit), name
        same = float((ours == to_bfloat16(exact)).mean())
        assert same > 0.99, f"{name}: rounding to nearest would hit nearly every entry, here {same:.3f}"


def test_the_cases_are_far_from_a_plain_merge(laboratory: Laboratory) -> None:
    """Agreement on K sigma = 1 would prove little: half of the cases are more than 0.3 from it, and one over 0.8."""
    spreads = {label: laboratory.expected(label).spread for label in CASES}
    assert sum(spread > 0.3 for spread in spreads.values()) >= len(CASES) / 2, spreads
    assert spreads[SHARP] > 0.8


def test_lambda_is_not_chosen_between_near_equals(laboratory: Laboratory) -> None:
    """Float32 and float64 can only be asked to choose the same lambda where the choice is clear and inside the grid."""
    automatic = [label for label, case in CASES.items() if case.settings.lam is None]
    assert automatic
    for label in automatic:
        result = laboratory.expected(label)
        best, second = sorted(result.tuning.values())[:2]
        assert second > best * 1.001, label
        assert 0.1 < result.lam < 1.5, label


def test_every_setting_of_the_oracle_is_used_by_a_case() -> None:
    changed = {key for case in CASES.values() for key in case.change}
    assert changed == {setting.name for setting in fields(Settings)}


NOTICED = {
    "abs_per_sample": {"sensitivity", "alpha", "sigma", "weights", "merged"},
    "abs": {"sensitivity", "alpha", "sigma", "weights", "merged"},
    "theta": {"sensitivity", "alpha", "sigma", "weights", "merged"},
    "gradient": {"sensitivity", "alpha", "sigma", "weights", "merged"},
    "samples": {"sensitivity", "alpha", "sigma", "weights", "merged"},
    "loss_mask": {"sensitivity", "alpha", "sigma", "weights", "merged"},
    "loss_mean": {"sensitivity", "alpha", "sigma", "weights", "merged"},
    "eos": {"sensitivity", "alpha", "sigma", "weights", "merged"},
    "bos": {"sensitivity", "distances", "alpha", "tau", "sigma", "weights", "merged"},
    "alpha_norm": {"alpha", "sigma", "weights", "merged"},
    "alpha_l2": {"alpha", "sigma", "weights", "merged"},
    "distance_root": {"distances", "tau", "sigma", "weights", "merged"},
    "distance_expert": {"distances", "tau", "sigma", "weights", "merged"},
    "distance_sorted": {"distances", "tau", "sigma", "weights", "merged"},
    "positions": {"distances", "tau", "sigma", "weights", "merged"},
    "tau_norm": {"tau", "sigma", "weights", "merged"},
    "alpha": {"sigma", "weights", "spread", "merged"},
    "tau": {"sigma", "weights", "spread", "merged"},
    "softmax": {"sigma", "weights", "spread", "merged"},
    "temperature": {"sigma", "weights", "spread", "merged"},
    "K": {"weights", "merged"},
    "delta": {"merged"},
    "base": {"merged"},
    "layers": {"sigma", "weights", "spread", "merged"},
    "other": {"other embed", "other final_norm", "other lm_head", "merged"},
}
"""For every term that the oracle can lose: the quantities in which the comparison must then find a difference."""


def test_every_term_is_taken_away_once() -> None:
    assert NOTICED.keys() == WITHOUT.keys()


@pytest.mark.parametrize("term", NOTICED)
def test_the_comparison_notices_a_missing_term(term: str, laboratory: Laboratory) -> None:
    produced, damaged, base = laboratory.produced(SHARP), laboratory.expected(SHARP, term), laboratory.base(SHARP)
    with pytest.raises(Disagreement) as caught:
        assert_agrees(produced, damaged, base)
    assert caught.value.quantities >= NOTICED[term]
    if not WITHOUT[term].startswith("L:"):  # other samples or another loss may show in everything
        untouched = {"sensitivity", "distances", "alpha", "tau"} - NOTICED[term]
        assert not caught.value.quantities & untouched, "a term that is missing late must not show early"
