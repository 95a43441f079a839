"""Recipes: a good one is read as written; every bad one ends in exit code 2 with its line and a way out."""

from __future__ import annotations

import itertools
import textwrap
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sensmerge.errors import RecipeError
from sensmerge.methods import METHODS
from sensmerge.recipe import load_recipe, with_seed
from sensmerge.records import Conditional, Recipe, SensSettings, TokenizerPolicy
from sensmerge.sens_block import settings_of, with_settings

PLAIN = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: math
    parameters: {weight: 0.5}
  - model: code
parameters:
  lambda: 0.7
dtype: bfloat16
"""
SENS = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: math
    sens: {data: math.jsonl}
  - model: code
    sens: {data: code.jsonl}
sens:
  preset: paper
"""


def load(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.yml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return load_recipe(path)


def refused(folder: Path, text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load(folder, text)
    assert caught.value.exit_code == 2
    assert str(caught.value).count("\n") == 3, "four lines"
    assert "recipe.yml" in caught.value.where
    return caught.value


def line_of(error: RecipeError) -> int:
    return int(error.where.partition("recipe.yml:")[2].split(":")[0])


# ---------------------------------------------------------------------------------------------------- what is read


def test_a_plain_recipe_is_read_as_written(tmp_path: Path) -> None:
    recipe = load(tmp_path, PLAIN)
    assert (recipe.merge_method, recipe.base_model, recipe.dtype, recipe.out_dtype) == (
        "task_arithmetic", "base", "bfloat16", None,
    )  # fmt: skip
    assert [(expert.model, expert.weight, expert.line) for expert in recipe.models] == [
        ("math", 0.5, 4),
        ("code", 1.0, 6),
    ]
    assert recipe.lambda_ == 0.7
    assert recipe.parameters == {"lambda": 0.7}
    assert recipe.models[0].parameters == {"weight": 0.5}
    assert recipe.slices == ()
    assert recipe.sens is None
    assert recipe.text == PLAIN


def test_a_sens_recipe_has_the_defaults_of_the_design(tmp_path: Path) -> None:
    """The table of DESIGN section 4."""
    recipe = load(tmp_path, SENS)
    expected = {
        "preset": "paper", "samples": 100, "max_length": 1024, "seed": 0, "template": "none", "loss": "response",
        "score": "weight", "group": "block", "distance": "l2", "positions": "all", "axis": "row",
        "direction": "distance", "rule": "softmax", "temperature": 1.0, "total": "K", "other": "block_mean",
        "compute_dtype": None, "attn_implementation": None, "until": None,
    }  # fmt: skip
    assert recipe.sens is not None
    assert asdict(recipe.sens) == expected
    assert [expert.sens.data for expert in recipe.models if expert.sens] == ["math.jsonl", "code.jsonl"]


def test_the_design_s_own_example_is_read(tmp_path: Path) -> None:
    """DESIGN section 7, with the data set on disk in place of the hub's."""
    recipe = load(
        tmp_path,
        """\
        merge_method: task_arithmetic
        base_model: meta-llama/Llama-2-7b-hf
        models:
          - model: meta-llama/Llama-2-7b-chat-hf
            sens: {data: calibration/chat.jsonl}
          - model: TIGER-Lab/MAmmoTH-7B
            sens: {data: {path: gsm8k.jsonl, prompt: question, response: answer}}
          - model: mrm8488/llama-2-coder-7b
            sens: {profile: profiles/coder.json}
        parameters: {lambda: 1.0}
        dtype: bfloat16
        sens: {preset: paper, samples: 100, max_length: 1024, seed: 0, temperature: 1.0}
        """,
    )
    first, second, third = (expert.sens for expert in recipe.models)
    assert first is not None
    assert second is not None
    assert third is not None
    assert (second.data, dict(second.fields)) == ("gsm8k.jsonl", {"prompt": "question", "response": "answer"})
    assert (third.data, third.profile) == (None, "profiles/coder.json")


@pytest.mark.parametrize("text", [PLAIN, SENS], ids=["plain", "sens"])
@pytest.mark.parametrize(
    ("prefix", "newline"), [(b"", "\n"), (b"\xef\xbb\xbf", "\n"), (b"", "\r\n"), (b"\xef\xbb\xbf", "\r\n")]
)
def test_windows_files_are_read_alike(tmp_path: Path, text: str, prefix: bytes, newline: str) -> None:
    """A byte-order mark and CRLF change nothing, lines included."""
    path = tmp_path / "recipe.yml"
    path.write_bytes(prefix + text.replace("\n", newline).encode())
    recipe, plain = load_recipe(path), load(tmp_path, text)
    assert recipe.models == plain.models
    assert (recipe.lambda_, recipe.sens, recipe.dtype) == (plain.lambda_, plain.sens, plain.dtype)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_are_counted_the_same_behind_a_bom(tmp_path: Path, newline: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("dtype", "dtpye").replace("\n", newline).encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.where.endswith(":9")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 0.001),
        ("1.0e-3", 0.001),
        ("2E+1", 20.0),
        ("-0.5", -0.5),
        ("3", 3.0),
        ("'0.25'", 0.25),
        ("0", 0.0),
        (".5", 0.5),
    ],
)
def test_numbers_are_numbers_however_spelt(tmp_path: Path, written: str, value: float) -> None:
    """YAML 1.1 takes 1e-3 for text; a user does not."""
    recipe = load(tmp_path, PLAIN.replace("0.7", "{0}").replace("{weight: 0.5}", "{{weight: {0}}}").format(written))
    assert recipe.lambda_ == value
    assert recipe.models[0].weight == value


@pytest.mark.parametrize("written", ["1e-3", "0.001"])
def test_temperature_may_be_written_in_either_way(tmp_path: Path, written: str) -> None:
    assert settings_of(load(tmp_path, SENS + f"  temperature: {written}\n")).temperature == 0.001


def test_a_default_weight_applies_to_models_that_name_none(tmp_path: Path) -> None:
    recipe = load(tmp_path, PLAIN.replace("  lambda: 0.7", "  lambda: 0.7\n  weight: 0.3"))
    assert [expert.weight for expert in recipe.models] == [0.5, 0.3]


@pytest.mark.parametrize(("method", "default"), [("task_arithmetic", False), ("linear", True)])
@pytest.mark.parametrize("written", [None, True, False])
def test_normalize_is_mergekit_s(tmp_path: Path, method: str, default: bool, written: bool | None) -> None:
    parameters = "" if written is None else f"parameters: {{normalize: {str(written).lower()}}}\n"
    recipe = load(tmp_path, f"merge_method: {method}\nbase_model: b\nmodels: [{{model: a}}]\n{parameters}")
    assert recipe.parameters == ({} if written is None else {"normalize": written})
    assert METHODS.get(method, where="").by_name["normalize"].default == default


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_dtypes(tmp_path: Path, key: str, name: str) -> None:
    recipe = load(tmp_path, PLAIN.replace("dtype: bfloat16", f"{key}: {name}"))
    assert getattr(recipe, key) == name


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_base_among_the_models_does_not_count(tmp_path: Path, place: int) -> None:
    """DESIGN section 5: a base listed among the models does not count in K, except for linear."""
    names = ["math", "code"]
    names.insert(place, "base")
    entries = "\n".join(f"  - model: {name}" for name in names)
    text = f"merge_method: {{}}\nbase_model: base\nmodels:\n{entries}\n"
    assert [e.model for e in load(tmp_path, text.format("task_arithmetic")).models] == ["math", "code"]
    assert [e.model for e in load(tmp_path, text.format("linear")).models] == names


@pytest.mark.parametrize(
    ("preset", "rule", "total", "scale", "temperature"),
    [
        ("paper", "softmax", "K", None, 1.0),
        ("paper-tables", "normalized", 1.0, None, 1.0),
        ("calibrated", "normalized", "K", "auto", 1.0),
        ("l2s", "softmax", "K", None, None),
    ],
)
def test_presets_are_the_design_s_bundles(
    tmp_path: Path, preset: str, rule: str, total: object, scale: object, temperature: float | None
) -> None:
    recipe = load(tmp_path, SENS.replace("preset: paper", f"preset: {preset}"))
    settings = settings_of(recipe)
    assert (settings.preset, settings.rule, settings.total) == (preset, rule, total)
    assert settings.temperature == temperature
    assert recipe.lambda_ == scale


@pytest.mark.parametrize("preset", ["paper", "paper-tables", "calibrated", "l2s"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("rule", "additive"), ("temperature", 0.25), ("total", 2.5), ("total", "K"), ("samples", 7), ("axis", "column"),
     ("direction", "similarity"), ("other", "base"), ("distance", "js"), ("positions", "last"), ("loss", "all"),
     ("score", "fisher"), ("group", "tensor"), ("template", "chat"), ("compute_dtype", "bfloat16"), ("seed", 5),
     ("max_length", 2)],
)  # fmt: skip
def test_any_single_key_overrides_its_preset(tmp_path: Path, preset: str, key: str, value: object) -> None:
    """And touches no other key."""
    without = asdict(settings_of(load(tmp_path, SENS.replace("preset: paper", f"preset: {preset}"))))
    changed = asdict(settings_of(load(tmp_path, SENS.replace("preset: paper", f"preset: {preset}\n  {key}: {value}"))))
    assert changed == without | {key: value}


@pytest.mark.parametrize("scale", [0.3, "auto"])
@pytest.mark.parametrize("preset", ["paper", "calibrated", "l2s"])
def test_a_preset_s_lambda_yields_to_the_recipe_s(tmp_path: Path, preset: str, scale: object) -> None:
    text = SENS.replace("preset: paper", f"preset: {preset}") + f"parameters: {{lambda: {scale}}}\n"
    assert load(tmp_path, text).lambda_ == scale


def test_with_settings_changes_what_it_is_told_and_checks_it(tmp_path: Path) -> None:
    recipe = load(tmp_path, SENS)
    changed = with_settings(recipe, {"temperature": 0.5, "rule": None, "seed": 3})
    assert asdict(settings_of(changed)) == asdict(settings_of(recipe)) | {"temperature": 0.5, "seed": 3}
    with pytest.raises(RecipeError, match="did you mean 'softmax'") as caught:
        with_settings(recipe, {"rule": "softmaxx"})
    assert caught.value.where == "--rule"
    with pytest.raises(RecipeError, match="no `sens:` block"):
        with_settings(load(tmp_path, PLAIN), {"temperature": 1.0})


# -------------------------------------------------------------------------------------------------- what is refused

TOP_KEYS = (
    "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "chat_template", "sens",
)  # fmt: skip


def _misspelt(word: str) -> list[str]:
    """A letter left out, two exchanged, one doubled: in the middle of the word."""
    at = len(word) // 2
    forms = [
        word[:at] + word[at + 1 :],
        word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :],
        word[:at] + word[at - 1 :],
    ]
    return [form for form in dict.fromkeys(forms) if form != word]


@pytest.mark.parametrize(("key", "wrong"), [(key, wrong) for key in TOP_KEYS for wrong in _misspelt(key)])
def test_a_misspelt_top_level_key(tmp_path: Path, key: str, wrong: str) -> None:
    """DESIGN section 7: an unknown key is an error with its line and a suggestion, needed keys included."""
    text = (
        SENS
        + "dtype: float32\nout_dtype: float16\ntokenizer_source: base\nchat_template: auto\nparameters: {lambda: 1.0}\n"
    )
    lines = [wrong + line[len(key) :] if line.startswith(f"{key}:") else line for line in text.split("\n")]
    error = refused(tmp_path, "\n".join(lines))
    assert line_of(error) == next(n for n, line in enumerate(lines, 1) if line.startswith(wrong))
    assert f"'{wrong}'" in error.what
    assert f"'{key}'" in error.fix


SENS_KEYS = tuple(asdict(SensSettings()))


@pytest.mark.parametrize(("key", "wrong"), [(key, wrong) for key in SENS_KEYS for wrong in _misspelt(key)[:2]])
def test_a_misspelt_key_of_sens(tmp_path: Path, key: str, wrong: str) -> None:
    error = refused(tmp_path, f"{SENS}  {wrong}: 1\n")
    assert line_of(error) == 10
    assert f"'{wrong}'" in error.what
    assert f"'{key}'" in error.fix


@pytest.mark.parametrize(
    ("old", "new", "line", "right"),
    [
        ("- model: code", "- modle: code", 6, "model"),
        ("- model: math\n", "- model: math\n    wieght: 0.3\n", 5, "parameters"),
        ("{data: code.jsonl}", "{dta: code.jsonl}", 7, "data"),
        ("{data: code.jsonl}", "{profle: code.json}", 7, "profile"),
        ("{data: code.jsonl}", "{data: {pth: code.jsonl}}", 7, "path"),
        ("{data: code.jsonl}", "{data: {path: code.jsonl, promt: q}}", 7, "prompt"),
        ("sens: {data: code.jsonl}", "snes: {data: code.jsonl}", 7, "sens"),
        ("sens: {data: code.jsonl}", "parameters: {wieght: 2}", 7, "weight"),
    ],
)
def test_a_misspelt_key_of_a_model(tmp_path: Path, old: str, new: str, line: int, right: str) -> None:
    error = refused(tmp_path, SENS.replace(old, new))
    assert line_of(error) == line
    if right != "parameters":
        assert f"'{right}'" in error.fix


@pytest.mark.parametrize(
    ("wrong", "right"), [("lambd", "lambda"), ("lamda", "lambda"), ("normalise", "normalize"), ("wieght", "weight")]
)
def test_a_misspelt_parameter(tmp_path: Path, wrong: str, right: str) -> None:
    error = refused(tmp_path, PLAIN.replace("  lambda", f"  {wrong}"))
    assert line_of(error) == 8
    assert f"'{right}'" in error.fix


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("preset", "papre", "paper"), ("preset", "calibrate", "calibrated"), ("preset", "paper_tables", "paper-tables"),
        ("rule", "sofmax", "softmax"), ("rule", "normalised", "normalized"), ("distance", "cosin", "cosine"),
        ("distance", "L2", "l2"), ("template", "chatt", "chat"), ("loss", "respnse", "response"),
        ("score", "task-vector", "task_vector"), ("group", "blocks", "block"), ("positions", "lst", "last"),
        ("axis", "rows", "row"), ("direction", "similar", "similarity"), ("other", "blockmean", "block_mean"),
        ("compute_dtype", "bf16", "bfloat16"), ("compute_dtype", "fp32", "float32"),
    ],
)  # fmt: skip
def test_a_misspelt_value_of_sens(tmp_path: Path, key: str, wrong: str, right: str) -> None:
    """The line of the key, what was written, and the nearest choice."""
    error = refused(tmp_path, SENS.replace("preset: paper", f"samples: 5\n  {key}: {wrong}"))
    assert line_of(error) == 10
    assert f"'{wrong}'" in error.what
    if not wrong.startswith("fp"):
        assert f"'{right}'" in error.fix
    assert right in error.why


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("merge_method", "task_arithmatic", "task_arithmetic"),
        ("dtype", "bfloat", "bfloat16"),
        ("dtype", "float_32", "float32"),
    ],
)
def test_a_misspelt_method_or_dtype(tmp_path: Path, key: str, wrong: str, right: str) -> None:
    lines = [f"{key}: {wrong}" if line.startswith(f"{key}:") else line for line in PLAIN.split("\n")]
    error = refused(tmp_path, "\n".join(lines))
    assert line_of(error) == 1 + lines.index(f"{key}: {wrong}")
    assert f"'{right}'" in error.fix


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples", 0), ("samples", -3), ("samples", 1.5), ("samples", True), ("samples", "many"), ("samples", ".nan"),
     ("max_length", 1), ("max_length", "null_"), ("seed", -1), ("seed", 0.5), ("temperature", 0), ("temperature", -1),
     ("temperature", ".nan"), ("temperature", ".inf"), ("temperature", "warm"), ("temperature", True), ("total", "k2"),
     ("total", ".inf"), ("total", True), ("total", "[1]"), ("rule", "[softmax]"), ("distance", "{l2: 1}"),
     ("preset", "[]")],
)  # fmt: skip
def test_a_value_of_sens_that_cannot_be(tmp_path: Path, key: str, value: object) -> None:
    error = refused(
        tmp_path, SENS.replace("preset: paper", f"{key}: {value}".lower() if value is True else f"{key}: {value}")
    )
    assert line_of(error) == 9
    assert key in error.what or "unknown" in error.what


@pytest.mark.parametrize("wrong", [".nan", ".inf", "-.inf", "nan", "heavy", "true", "1e999", "''", "9" * 400])
@pytest.mark.parametrize(("old", "line"), [("0.5", 5), ("0.7", 8)], ids=["weight", "lambda"])
def test_a_weight_or_lambda_that_is_no_finite_number(tmp_path: Path, wrong: str, old: str, line: int) -> None:
    error = refused(tmp_path, PLAIN.replace(old, wrong))
    assert line_of(error) == line
    assert "number" in error.what


@pytest.mark.parametrize("key", ["modules", "merge_parameters"])
def test_mergekit_s_other_keys_are_refused_by_name(tmp_path: Path, key: str) -> None:
    error = refused(tmp_path, f"{PLAIN}{key}: x\n")
    assert line_of(error) == 10
    assert f"'{key}' is not supported" in error.what


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (PLAIN + "dtype: float16\n", 10, "'dtype' stands twice"),
        (PLAIN.replace("lambda: 0.7", "lambda: 0.7\n  lambda: 0.8"), 9, "'lambda' stands twice"),
        (PLAIN.replace("{weight: 0.5}", "{weight: 0.5, weight: 0.6}"), 5, "'weight' stands twice"),
        (SENS + "  preset: paper\n", 10, "'preset' stands twice"),
        (PLAIN.replace("model: code", "model: math"), 6, "'math' is listed twice"),
        (PLAIN.replace("merge_method: task_arithmetic\n", ""), 1, "merge_method"),
        (PLAIN.replace("task_arithmetic", "''"), 1, "merge_method"),
        (PLAIN.replace("base_model: base\n", ""), 1, "needs a base"),
        ("merge_method: linear\nmodels: []\n", 2, "no models"),
        ("merge_method: linear\nmodels: a\n", 2, "list"),
        ("merge_method: linear\nmodels:\n  - a\n", 3, "mapping"),
        ("merge_method: linear\nmodels:\n  - model: a\n  - {}\n", 4, "no `model:`"),
        ("merge_method: linear\nmodels:\n  - model: [a]\n", 3, "text"),
        ("merge_method: linear\nmodels:\n  - model:\n", 3, "no `model:`"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {lambda: 1}\n", 3, "no lambda"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {normalize: 1}\n", 3, "true or false"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: 3\n", 3, "mapping"),
        ("merge_method: linear\nmodels: [{model: a}]\ndtype: [float32]\n", 3, "text"),
        ("merge_method: task_arithmetic\nbase_model: b\nmodels:\n- model: b\n", 3, "only model is the base"),
        (SENS.replace("  preset: paper\n", ""), 8, "empty"),
        (SENS.replace("sens:\n  preset: paper", "sens: true"), 8, "mapping"),
        (SENS.replace("{data: math.jsonl}", "{data: a, profile: b}"), 5, "either data or a profile"),
        (SENS.replace("{data: math.jsonl}", "{}"), 5, "either data or a profile"),
        (SENS.replace("{data: math.jsonl}", "{data: {path: a}, profile: b}"), 5, "either data or a profile"),
        (SENS.replace("{data: math.jsonl}", "{data: {prompt: q}}"), 5, "path"),
        (SENS.replace("{data: math.jsonl}", "{data: {path: a, splt: train}}"), 5, "unknown key 'splt'"),
        (SENS.replace("{data: math.jsonl}", "{data: [a]}"), 5, "text"),
        (SENS.replace("sens:\n  preset: paper\n", ""), 4, "the recipe has none"),
    ],
)
def test_other_faults_are_told_with_their_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    error = refused(tmp_path, text)
    assert words in error.what
    assert line_of(error) == line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLAIN.replace("0.7", "auto"), "`lambda: auto` needs calibration data"),
        (
            "merge_method: linear\nmodels: [{model: a, sens: {data: x}}]\nsens: {rule: uniform}\n",
            "`sens:` needs a base model",
        ),
    ],
)
def test_a_merge_that_lacks_something(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, text).what


@pytest.mark.parametrize("preset", ["calibrated", "l2s"])
def test_a_preset_that_chooses_lambda_is_refused_where_there_is_none(tmp_path: Path, preset: str) -> None:
    """`linear` has no lambda: a preset's lambda would be dropped in silence."""
    text = SENS.replace("task_arithmetic", "linear").replace("preset: paper", f"preset: {preset}")
    error = refused(tmp_path, text)
    assert line_of(error) == 8
    assert "linear" in error.what


@pytest.mark.parametrize("preset", ["paper", "paper-tables"])
def test_linear_takes_the_other_presets(tmp_path: Path, preset: str) -> None:
    text = SENS.replace("task_arithmetic", "linear").replace("preset: paper", f"preset: {preset}")
    assert load(tmp_path, text).lambda_ is None


def test_a_fault_in_a_lambda_of_linear_comes_with_a_way_out(tmp_path: Path) -> None:
    """What to type: another method, or no lambda."""
    error = refused(tmp_path, "merge_method: linear\nmodels: [{model: a}]\nparameters: {lambda: 1}\n")
    assert "task_arithmetic" in error.fix


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"", None),
        (b"# only a comment\n", None),
        (b"---\n", None),
        (b"- a\n- b\n", 1),
        (b"just text\n", 1),
        (b"merge_method: linear\nmodels:\n\t- model: a\n", 3),
        (b"merge_method: linear\n  models: [\n", 2),
        (b"merge_method: 'linear\n", None),
        (b"merge_method: linear\nmodels: [a, b\n", None),
        (b"merge_method: linear\n---\nmerge_method: linear\n", 2),
        (b"merge_method: !!python/object/apply:os.system ['true']\n", 1),
        (b"merge_method: linear\nbase_model: *nowhere\n", 2),
        (b"merge_method: linear\nbase_model: !secret x\n", 2),
        (b"merge_method: linear\nmodels: &loop [*loop]\n", None),
        (b"merge_method: \xff\xfe\n", None),
        (b"merge_method: linear\x00\n", None),
        (b"merge_method: linear\nmodels: " + b"[" * 1200 + b"]" * 1200, None),
        (b"merge_method: linear\nmodels: [{model: a}]\ndtype: 2020-13-45\n", 3),
        (b"merge_method: linear\nmodels: [{model: a}]\n<<: {dtype: float32}\n", 3),
        (b"merge_method: linear\nmodels: [{model: a}]\n[a, b]: c\n", 3),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, place: int | None) -> None:
    """Always a RecipeError naming the file, and the line where there is one."""
    path = tmp_path / "recipe.yml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2
    assert str(path) in caught.value.where
    if place is not None:
        assert caught.value.where.startswith(f"{path}:{place}")


def test_a_recipe_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "no.yml", tmp_path):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert caught.value.where == str(path)


def test_yaml_that_runs_code_is_not_run(tmp_path: Path) -> None:
    """Only plain values are constructed."""
    marker = tmp_path / "ran"
    text = f"merge_method: !!python/object/apply:os.mkdir ['{marker}']\nmodels: [{{model: a}}]\n"
    refused(tmp_path, text)
    assert not marker.exists()


@pytest.mark.parametrize("cut", range(0, len(SENS), 7))
def test_a_recipe_cut_anywhere_never_ends_in_a_traceback(tmp_path: Path, cut: int) -> None:
    """A file cut off is read, or refused as a recipe: nothing else."""
    with suppress(RecipeError):
        load(tmp_path, SENS[:cut])


ODD = (
    "null",
    "[]",
    "{}",
    "''",
    "0",
    "true",
    "[[]]",
    "{a: 1}",
    "2020-01-01",
    "!!binary aGk=",
    "!!set {a}",
    "0x10",
    "~",
    "'\\n'",
)
PLACES: dict[str, Any] = {
    "merge_method": (PLAIN, "task_arithmetic"), "base_model": (PLAIN, "base_model: base"), "model": (PLAIN, "math"),
    "weight": (PLAIN, "0.5"), "lambda": (PLAIN, "0.7"), "dtype": (PLAIN, "bfloat16"), "data": (SENS, "math.jsonl"),
    "preset": (SENS, "paper"), "model's sens": (SENS, "{data: math.jsonl}"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "odd"), list(itertools.product(PLACES, ODD)))
def test_odd_values_never_end_in_a_traceback(tmp_path: Path, place: str, odd: str) -> None:
    """Whatever stands in place of a value, it is taken or refused as a recipe fault."""
    text, old = PLACES[place]
    new = f"base_model: {odd}" if place == "base_model" else odd
    with suppress(RecipeError):
        load(tmp_path, text.replace(old, new, 1))


# ------------------------------------------------------------------------------------- mergekit's recipes, unchanged

SLERP = """\
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""
DARE = """\
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: abacusai/Slerp-CM-mist-dpo
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
  normalize: false
dtype: bfloat16
tokenizer_source: base
"""
FRANKEN = """\
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 24]
  - sources:
      - model: mlabonne/NeuralHermes
        layer_range: [8, 32]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - value: 1.0
merge_method: passthrough
dtype: bfloat16
"""
TIES = """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
  lambda: [0.5, 1.0]
dtype: float16
"""


def test_a_slerp_of_slices_with_filtered_gradients(tmp_path: Path) -> None:
    recipe = load(tmp_path, SLERP)
    (part,) = recipe.slices
    assert [(source.model, source.layers, source.line) for source in part.sources] == [
        ("OpenPipe/mistral-ft-optimized-1218", (0, 32), 3), ("mlabonne/NeuralHermes-2.5-Mistral-7B", (0, 32), 5),
    ]  # fmt: skip
    assert part.base_model == recipe.base_model == "OpenPipe/mistral-ft-optimized-1218"
    assert [expert.model for expert in recipe.models] == ["mlabonne/NeuralHermes-2.5-Mistral-7B"]
    assert recipe.parameters == {
        "t": (
            Conditional("self_attn", (0.0, 0.5, 0.3, 0.7, 1.0)),
            Conditional("mlp", (1.0, 0.5, 0.7, 0.3, 0.0)),
            Conditional(None, 0.5),
        )
    }
    assert recipe.lambda_ is None


def test_dare_ties_as_it_is_published(tmp_path: Path) -> None:
    recipe = load(tmp_path, DARE)
    assert [(expert.model, expert.weight) for expert in recipe.models] == [
        ("samir-fama/SamirGPT-v1", 0.4), ("abacusai/Slerp-CM-mist-dpo", 0.3),
    ]  # fmt: skip
    assert recipe.models[0].parameters == {"density": 0.53, "weight": 0.4}
    assert recipe.parameters == {"int8_mask": True, "normalize": False}
    assert recipe.tokenizer == TokenizerPolicy("base", None, (), None, 18)


def test_a_frankenmerge(tmp_path: Path) -> None:
    recipe = load(tmp_path, FRANKEN)
    assert [part.sources[0].layers for part in recipe.slices] == [(0, 24), (8, 32)]
    assert [part.base_model for part in recipe.slices] == [None, None]
    assert recipe.slices[1].sources[0].parameters == {"scale": (Conditional("o_proj", 0.0), Conditional(None, 1.0))}
    assert [expert.model for expert in recipe.models] == ["OpenPipe/mistral-ft-optimized-1218", "mlabonne/NeuralHermes"]


def test_ties_with_gradients(tmp_path: Path) -> None:
    recipe = load(tmp_path, TIES)
    assert recipe.models[0].parameters == {"density": (1.0, 0.7, 0.1), "weight": 1.0}
    assert [expert.weight for expert in recipe.models] == [1.0, 0.5, 0.0]
    assert recipe.parameters["lambda"] == (0.5, 1.0)
    assert recipe.lambda_ == 0.75


def test_the_same_model_in_several_slices_is_one_expert(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """\
        merge_method: task_arithmetic
        base_model: base
        sens: {preset: paper}
        slices:
          - sources:
              - {model: base, layer_range: [0, 2]}
              - {model: a, layer_range: [0, 2], parameters: {weight: 0.5}, sens: {data: a.jsonl}}
              - {model: b, layer_range: [0, 2], sens: {data: b.jsonl}}
            parameters: {weight: 2, lambda: 0.3}
          - sources:
              - {model: b, layer_range: [1, 4]}
              - {model: a, layer_range: [1, 4]}
        """,
    )
    assert [(e.model, e.weight, e.sens and e.sens.data) for e in recipe.models] == [
        ("a", 0.5, "a.jsonl"),
        ("b", 2.0, "b.jsonl"),
    ]
    assert [part.base_model for part in recipe.slices] == ["base", "base"]
    assert recipe.lambda_ == 0.3


def test_karcher_takes_the_base_in(tmp_path: Path) -> None:
    text = "merge_method: karcher\nbase_model: b\nmodels: [{{model: a}}, {{model: {0}}}]\n"
    assert [expert.model for expert in load(tmp_path, text.format("c")).models] == ["a", "c", "b"]
    assert [expert.model for expert in load(tmp_path, text.format("b")).models] == ["a", "b"]


def test_multislerp_with_a_base_among_its_models(tmp_path: Path) -> None:
    text = "merge_method: multislerp\nbase_model: b\nmodels: [{model: a}, {model: b}, {model: c}]\n"
    assert [expert.model for expert in load(tmp_path, text).models] == ["a", "c"]


def _slices(*sources: str, method: str = "linear", rest: str = "") -> str:
    listed = "".join(f"      - {{{source}}}\n" for source in sources)
    return f"merge_method: {method}\n{rest}slices:\n  - sources:\n{listed}"


A = "model: a, layer_range: [0, 2]"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (_slices("model: a"), 4, "`layer_range` must be two whole numbers"),
        (_slices("model: a, layer_range: [0, 2, 4]"), 4, "`layer_range` must be two whole numbers"),
        (_slices("model: a, layer_range: [2, 2]"), 4, "`layer_range` must be two whole numbers"),
        (_slices("model: a, layer_range: [-1, 2]"), 4, "`layer_range` must be two whole numbers"),
        (_slices("model: a, layer_range: [0, 2.5]"), 4, "`layer_range` must be two whole numbers"),
        (_slices("model: a, layer_range: [false, true]"), 4, "`layer_range` must be two whole numbers"),
        (_slices("model: a, layer_range: 0-2"), 4, "`layer_range` must be two whole numbers"),
        (_slices("layer_range: [0, 2]"), 4, "no `model:`"),
        (_slices(A, "model: b, layer_range: [0, 3]"), 5, "unlike numbers of layers"),
        (_slices(A, "model: a, layer_range: [2, 4]"), 5, "'a' is listed twice in one slice"),
        (_slices(A, "model: b, layer_rnge: [0, 2]"), 5, "unknown key 'layer_rnge'"),
        (_slices(A) + "    residual_weight: 0.5\n", 5, "'residual_weight' is not supported"),
        (_slices(A) + "models: [{model: a}]\n", 2, "both `models` and `slices`"),
        ("merge_method: linear\nslices: []\n", 2, "no slices"),
        ("merge_method: linear\nslices: [{sources: []}]\n", 2, "no sources"),
        ("merge_method: linear\nslices: [{parameters: {}}]\n", 2, "no sources"),
        ("merge_method: linear\nslices: {sources: []}\n", 2, "list"),
        (_slices(A, method="ties"), 1, "needs a base model"),
        (_slices(A, method="ties", rest="base_model: a\n"), 4, "the only model is the base itself"),
        (
            _slices(A, "model: b, layer_range: [1, 3]", method="ties", rest="base_model: c\n"), 4,
            "not clear which layers of the base",
        ),
        (_slices(A + ", parameters: {normalize: true}"), 4, "'normalize' is not a parameter of one model"),
        (_slices(A, method="passthrough") + "    parameters: {scale: x}\n", 5, "'scale' of merge method 'passthrough' must be"),
        (_slices(A, "model: b, layer_range: [0, 2]", method="passthrough"), 3, "passthrough merges 1 model"),
        (
            _slices(A, method="task_arithmetic", rest="base_model: b\n") + "    parameters: {lambda: auto}\n", 6,
            "`lambda: auto` cannot stand in a slice",
        ),
    ],
)  # fmt: skip
def test_faults_of_slices_are_told_with_their_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    error = refused(tmp_path, text)
    assert words in error.what
    assert line_of(error) == line


@pytest.mark.parametrize(
    ("method", "models", "what"),
    [
        ("slerp", "abc", "slerp merges 2 models: base_model and one other"),
        ("slerp", "b", "the only model is the base itself"),
        ("nearswap", "acd", "nearswap merges 2 models: base_model and one other"),
        ("arcee_fusion", "acd", "arcee_fusion merges 2 models: base_model and one other"),
        ("nuslerp", "acd", "nuslerp merges 3 models: base_model and two others"),
        ("nuslerp", "ab", "nuslerp merges 3 models: base_model and two others"),
        ("passthrough", "ac", "passthrough merges 1 model"),
        ("model_stock", "a", "model_stock merges at least 2 models beside base_model"),
    ],
)
def test_too_many_or_too_few_models(tmp_path: Path, method: str, models: str, what: str) -> None:
    listed = "".join(f"  - model: {model}\n" for model in models)
    error = refused(tmp_path, f"merge_method: {method}\nbase_model: b\nmodels:\n{listed}")
    assert error.what == what
    assert line_of(error) == 3


@pytest.mark.parametrize(
    ("parameters", "what", "fix"),
    [
        ("density: 0.5", "merge method 'task_arithmetic' has no 'density'", "ties"),
        ("t: 0.5", "merge method 'task_arithmetic' has no 't'", "slerp"),
        ("densty: 0.5", "unknown key 'densty'", "remove it"),
        ("lambda: []", "'lambda' of merge method 'task_arithmetic' is an empty list", "lambda: 1"),
        ("lambda: [1, x]", "'lambda' of merge method 'task_arithmetic' must be a number", "lambda: 1"),
        ("lambda: [1, auto]", "'lambda' of merge method 'task_arithmetic' must be a number", "lambda: 1"),
        ("lambda: [[1]]", "'lambda' of merge method 'task_arithmetic' must be a number", "lambda: 1"),
        ("lambda: [1, {value: 2}]", "lambda[0] must be a mapping", "key: value"),
        ("lambda: {filter: mlp}", "a filtered 'lambda' has no value", "value: 1"),
        ("lambda: {filtr: mlp, value: 1}", "unknown key 'filtr'", "'filter'"),
        ("lambda: {filter: mlp, value: x}", "'lambda' of merge method 'task_arithmetic' must be a number", "value: 1"),
        ("lambda: [{filter: [mlp], value: 1}]", "'filter' must be text", "filter:"),
        ("lambda: [{value: {value: 1}}]", "'lambda' of merge method 'task_arithmetic' must be a number", "value: 1"),
        ("lambda: ", "'lambda' of merge method 'task_arithmetic' must be a number", "lambda: 1"),
        ("normalize: [true, 1]", "'normalize' of merge method 'task_arithmetic' must be true or false", "false"),
    ],
)
def test_faults_of_parameters(tmp_path: Path, parameters: str, what: str, fix: str) -> None:
    error = refused(tmp_path, PLAIN.replace("lambda: 0.7", parameters))
    assert what in error.what
    assert fix in error.fix
    assert line_of(error) == 8


def test_a_fault_deep_in_a_list_has_its_own_line(tmp_path: Path) -> None:
    error = refused(tmp_path, SLERP.replace("[1, 0.5, 0.7, 0.3, 0]", "[1, half]"))
    assert line_of(error) == 14
    assert "'t' of merge method 'slerp' must be a number" in error.what
    assert "'half'" in error.why


@pytest.mark.parametrize(
    ("written", "fault"), [("1.5", "from 0 to 1"), ("-0.1", "from 0 to 1"), ("[0.5, 2]", "from 0 to 1")]
)
def test_a_density_out_of_range(tmp_path: Path, written: str, fault: str) -> None:
    error = refused(tmp_path, DARE.replace("density: 0.53", f"density: {written}", 1))
    assert "'density' of merge method 'dare_ties' must be a number" in error.what
    assert fault in error.what
    assert line_of(error) == 6


@pytest.mark.parametrize("key", ["normalize: true", "lambda: 0.5"])
def test_what_all_models_share_does_not_stand_in_one(tmp_path: Path, key: str) -> None:
    error = refused(tmp_path, PLAIN.replace("{weight: 0.5}", f"{{{key}}}"))
    assert "is not a parameter of one model" in error.what
    assert "top-level" in error.fix
    assert line_of(error) == 5


SENS_SLICES = """\
merge_method: task_arithmetic
base_model: base
sens: {preset: paper}
slices:
  - sources:
      - {model: a, layer_range: [0, 2], sens: {data: a.jsonl}}
      - {model: b, layer_range: [0, 2]}
  - sources:
      - {model: a, layer_range: [2, 4]}
      - {model: b, layer_range: [2, 4], }
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("b, layer_range: [2, 4], ", "c, layer_range: [2, 4]", 5, "slices of unlike models"),
        ("[2, 4], }", "[2, 4], sens: {data: b.jsonl}}", 10, "the `sens:` of 'b' stands in a later source"),
        ("preset: paper", "preset: calibrated", 5, "`lambda: auto` with `slices:` is not supported"),
        ("[2, 4], }\n", "[2, 4]}\n    base_model: c\n", 8, "slices of unlike bases"),
        ("[2, 4], }\n", "[2, 4]}\n    base_model: a\n", 8, "slices of unlike bases"),
        ("{model: b, layer_range: [2, 4], }", "{model: b, layer_range: [1, 3]}\n      - {model: base, layer_range: [2, 4]}", 8,
         "slices of unlike ranges"),
        ("task_arithmetic", "multislerp", None, "does not work with `sens:`"),
    ],
)  # fmt: skip
def test_sens_with_slices(tmp_path: Path, old: str, new: str, line: int | None, words: str) -> None:
    assert len(load(tmp_path, SENS_SLICES).slices) == 2
    error = refused(tmp_path, SENS_SLICES.replace(old, new))
    assert words in error.what
    if line is not None:
        assert line_of(error) == line


def test_a_slice_s_lambda_is_one_the_recipe_names(tmp_path: Path) -> None:
    """A preset's lambda stays out, and `lambda: auto` beside it is refused."""
    text = SENS_SLICES.replace("preset: paper", "preset: calibrated") + "    parameters: {lambda: 0.2}\n"
    assert load(tmp_path, text).lambda_ == 0.2
    error = refused(tmp_path, text + "parameters: {lambda: auto}\n")
    assert "a slice names a lambda" in error.what
    assert line_of(error) == 8


def test_another_seed_for_the_draws(tmp_path: Path) -> None:
    assert with_seed(load(tmp_path, DARE), 7).parameters["seed"] == 7
    with pytest.raises(RecipeError, match="takes no random seed") as caught:
        with_seed(load(tmp_path, PLAIN), 7)
    assert "--random-seed" in caught.value.fix
    with pytest.raises(RecipeError, match="must be a whole number"):
        with_seed(load(tmp_path, DARE), -1)


@pytest.mark.parametrize(
    "text", [SLERP, DARE, FRANKEN, TIES, SENS_SLICES], ids=["slerp", "dare", "franken", "ties", "sens"]
)
@pytest.mark.parametrize("odd", ODD)
def test_odd_values_in_mergekit_s_forms_never_end_in_a_traceback(tmp_path: Path, text: str, odd: str) -> None:
    """Each value of each line, one after another."""
    lines = text.split("\n")
    for at, line in enumerate(lines):
        key, colon, _ = line.partition(": ")
        if colon:
            with suppress(RecipeError):
                load(tmp_path, "\n".join([*lines[:at], f"{key}: {odd}", *lines[at + 1 :]]))
