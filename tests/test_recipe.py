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
from sensmerge.recipe import load_recipe, settings_of, with_settings
from sensmerge.records import Recipe, SensSettings

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
    assert recipe.options == {"normalize": False}
    assert recipe.sens is None
    assert recipe.text == PLAIN


def test_a_sens_recipe_has_the_defaults_of_the_design(tmp_path: Path) -> None:
    """The table of DESIGN section 4."""
    recipe = load(tmp_path, SENS)
    expected = {
        "preset": "paper", "samples": 100, "max_length": 1024, "seed": 0, "template": "none", "loss": "response",
        "score": "weight", "group": "block", "distance": "l2", "positions": "all", "axis": "row",
        "direction": "distance", "rule": "softmax", "temperature": 1.0, "total": "K", "other": "block_mean",
        "compute_dtype": None,
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
    assert recipe.options == {"normalize": default if written is None else written}


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

TOP_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "sens")


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
    text = SENS + "dtype: float32\nout_dtype: float16\nparameters: {lambda: 1.0}\n"
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


@pytest.mark.parametrize("value", ["[0.1, 0.9]", "{filter: mlp, value: 1}", "[{filter: mlp, value: 0.5}, {value: 1}]"])
@pytest.mark.parametrize(("old", "line", "key"), [("0.5", 5, "weight"), ("0.7", 8, "lambda")], ids=["weight", "lambda"])
def test_gradients_and_filters_are_refused_by_name(tmp_path: Path, value: str, old: str, line: int, key: str) -> None:
    """mergekit's per-layer forms mean another merge: they are not ignored."""
    error = refused(tmp_path, PLAIN.replace(old, value))
    assert line_of(error) == line
    assert f"'{key}'" in error.what
    assert "not supported" in error.what


@pytest.mark.parametrize(
    ("text", "line", "name"),
    [
        *(
            (f"{PLAIN}{key}: x\n", 10, key)
            for key in ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")
        ),
        *((f"{PLAIN}".replace("lambda: 0.7", f"{key}: 1"), 8, key) for key in ("density", "rescale", "int8_mask", "t")),
    ],
)
def test_mergekit_s_other_keys_are_refused_by_name(tmp_path: Path, text: str, line: int, name: str) -> None:
    error = refused(tmp_path, text)
    assert line_of(error) == line
    assert f"'{name}' is not supported" in error.what


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
        (SENS.replace("{data: math.jsonl}", "{data: {path: a, split: train}}"), 5, "'split' is not supported"),
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
