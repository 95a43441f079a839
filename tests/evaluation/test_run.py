"""`evaluate`: what it returns, what it refuses, and what importing it costs."""

import math
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest

from sensmerge import progress
from sensmerge.errors import EvaluationError, InputFileError, RecipeError
from sensmerge.evaluation import TASKS, Scores, Task, TaskScore, evaluate, read_items


@pytest.fixture
def counting_task(monkeypatch):
    """A task `even` whose items are numbers and whose score is 1 for even ones; it never looks at the model."""

    def score(model, items):
        return [1.0 - item["n"] % 2 for item in items]

    task = Task("even", "share", lambda folder: [{"n": n} for n in range(5)], score)
    found = TASKS.get
    monkeypatch.setattr(TASKS, "get", lambda name, where: task if name == "even" else found(name, where=where))
    return task


def test_scores_of_a_task(random_model, counting_task):
    scores = evaluate(random_model, ["even"], None)
    result = scores.tasks["even"]
    assert (result.metric, result.samples, result.items) == ("share", 5, [1.0, 0.0, 1.0, 0.0, 1.0])
    assert result.value == pytest.approx(60)
    assert result.stderr == pytest.approx(100 * math.sqrt(0.6 * 0.4 / 5))
    assert scores.average == result.value
    assert scores.model == "model"


def test_average_is_the_mean_over_tasks(random_model, counting_task):
    scores = evaluate(random_model, ["even", "math"], None)
    assert scores.tasks["math"].value == 0
    assert scores.average == pytest.approx(30)


def test_the_record_survives_json(random_model, counting_task):
    scores = evaluate(random_model, ["even"], None)
    assert Scores.from_json(scores.to_json(), source="here") == scores


def test_inputs_tell_models_items_and_tokenizers_apart(random_model, counting_task, tmp_path):
    inputs = evaluate(random_model, ["even"], None).inputs
    assert evaluate(random_model, ["even"], None).inputs == inputs
    assert evaluate(random_model, ["even"], None, limit=3).inputs != inputs
    copied = shutil.copytree(random_model.parent, tmp_path / "copy") / "model"
    assert evaluate(copied, ["even"], None).inputs == inputs
    with (copied / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert evaluate(copied, ["even"], None).inputs != inputs


def test_limit_takes_the_first_items(random_model, counting_task):
    assert evaluate(random_model, ["even"], None, limit=2).tasks["even"].items == [1.0, 0.0]


def test_progress_is_told(random_model, counting_task):
    steps = []

    class Listener:
        def task(self, label, total):
            steps.append((label, total))
            return nullcontext(steps.append)

        def message(self, text): ...
        def warning(self, text): ...

    with progress.listening(Listener()):
        evaluate(random_model, ["even"], None)
    assert steps == [("evaluating model", 1), 1]


@pytest.mark.parametrize("tasks", [["maths"], ["math", "maths"]])
def test_an_unknown_task_is_told_with_the_nearest_name(random_model, tasks):
    with pytest.raises(RecipeError, match="did you mean 'math'"):
        evaluate(random_model, tasks, None)


def test_no_folder_with_data(random_model, tmp_path):
    with pytest.raises(EvaluationError, match="--data-dir"):
        evaluate(random_model, ["math"], tmp_path / "nowhere")
    lonely = shutil.copytree(random_model, tmp_path / "lonely")
    with pytest.raises(EvaluationError, match="none beside the model"):
        evaluate(lonely, ["math"], None)


def test_no_test_file(random_model):
    with pytest.raises(EvaluationError, match=r"there is no test file chat\.jsonl"):
        evaluate(random_model, ["chat"], None)


@pytest.mark.parametrize(("tasks", "limit"), [([], None), (["math"], 0), (["math"], -1)])
def test_nothing_to_evaluate(random_model, tasks, limit):
    with pytest.raises(EvaluationError, match="nothing to evaluate"):
        evaluate(random_model, tasks, None, limit=limit)


def test_no_model(random_model):
    with pytest.raises(InputFileError):
        evaluate(random_model.parent / "nowhere", ["math"], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]\n", "not a JSON object"), ('{"a": 1}\n{"a"\n', "line 2"), ("", "empty"), ("\n\n", "empty")],
)
def test_a_damaged_test_file(tmp_path, text, message):
    (tmp_path / "math.jsonl").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_items(tmp_path / "math.jsonl")


@pytest.mark.parametrize(
    ("items", "value", "stderr"), [([1.0] * 7, 100, 0), ([0.0], 0, 0), ([1.0, 0.0], 50, 35.355339)]
)
def test_percent_and_binomial_error(items, value, stderr):
    score = TaskScore.of("m", items)
    assert (score.value, score.stderr) == (pytest.approx(value), pytest.approx(stderr))


def test_importing_costs_no_torch():
    code = "import sys, sensmerge.evaluation, sensmerge.zoo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_three_tasks_are_found_by_name():
    assert [TASKS.get(name, where="here").name for name in ("chat", "math", "code")] == ["chat", "math", "code"]
