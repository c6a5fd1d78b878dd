"""What docs/extending.md shows, run from the page: a task, a sampler, a tracker and a metric, each in one file."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpsearch
from hpsearch import registry
from hpsearch.data.prepare import measure
from hpsearch.errors import SpecError, UsageError
from hpsearch.metrics import ties
from hpsearch.metrics.intervals import interval
from hpsearch.metrics.statistics import METRICS, score, summands
from hpsearch.search.study import first_suggestions
from hpsearch.spec.load import load_study
from tests.commands import HPSEARCH

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def section(title: str, language: str = "python") -> str:
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", part, re.S)
    assert found is not None
    return found[1]


CLOZE = """
name: cloze
data: {corpus: python_docs, fraction: 0.05}
tokenizer: {vocab_size: 300}
model: {architecture: bert, hidden_size: 32, num_heads: 2, num_layers: 1, context_length: 32, init_std: 0.08}
training: {evaluations_per_epoch: 1, batch_size: 16, num_epochs: 4}
search:
  learning_rate: {min: 1e-6, max: 1e-1, scale: log}
enqueue: [{learning_rate: 0.02}, {learning_rate: 0.0201}, {learning_rate: 1e-6}]
budget: {trials: 3}
prune: {unpromising: {rule: median, startup_trials: 2, warmup_epochs: 1}}
resources: {gpus_per_trial: 0}
"""
"""Of the task that the page shows: two trials that nothing tells apart, and one that learns nothing."""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_samplers.py").write_text(section("A sampler"))
    (tmp_path / "my_trackers.py").write_text(section("A tracker"))
    (tmp_path / "my_tasks.py").write_text(section("A task"))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_sampler_proposes_what_a_study_tries(modules: Path, tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + section("A sampler", "yaml"))
    spec = load_study(tiny)
    assert spec.sampler.name == "my_samplers:halton"
    first = first_suggestions(spec, 8)
    assert len({str(params) for params in first}) == 8
    assert first == first_suggestions(spec, 8), "by the study's seed"
    assert first != first_suggestions(
        spec.model_copy(update={"sampler": spec.sampler.model_copy(update={"name": "qmc"})}), 8
    )


@pytest.mark.slow
def test_the_tracker_hears_of_every_trial(modules: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(modules)
    hpsearch.launch(tiny, trials=1, track=["my_trackers:Lines"])
    words = [line.split()[0] for line in (modules / "tiny.log").read_text().splitlines()]
    assert words[0] == "begin"
    assert words[-1] == "end"
    assert "point" in words


@pytest.mark.slow
def test_the_task_is_searched_pruned_ranked_and_shown(modules: Path) -> None:
    file = modules / "cloze.yaml"
    store = f"sqlite:///{modules}/studies.db"
    file.write_text(f"{CLOZE}{section('A task', 'yaml')}backend: inline\nstore: {store}\nfolder: {modules}/runs\n")
    hpsearch.launch(file)
    board = hpsearch.rank("cloze", store=store)
    assert (board.metric, board.objective) == ("filled", "filled")
    first, second = board.rows
    assert (first.test_rank, first.tie, second.tie) == (1, "1", "1=")
    assert first.score >= second.score, "more is better"
    for row in board.rows:
        assert 0 <= row.score_low <= row.score <= row.score_high <= 1
        assert row.valid_score == pytest.approx(row.score, abs=0.2)
    states = {row.number: row.state for row in hpsearch.open_study("cloze", store=store).trials()}
    assert states == {0: "completed", 1: "completed", 2: "unpromising"}
    assert hpsearch.show("cloze", first.trial, store=store).settings["model"]["architecture"] == "bert"
    page = hpsearch.report("cloze", store=store)
    for shown in ("test filled", "validation filled", "nats per gap"):
        assert shown in page
    exported = hpsearch.export("cloze", output=modules / "model", store=store)
    assert (Path(exported) / "tokenizer.json").is_file()


BROKEN = """
from hpsearch.spec.task import TaskDefinition
from my_tasks import Cloze
class Nameless(Cloze):
    name = None
class Unmeasured(Cloze):
    metric = "no_such"
class Lower(Cloze):
    objectives = ("loss", "ter")
class Many(Cloze):
    fields = ("a", "b", "c")
class Unbuilt(TaskDefinition):
    name, architecture, metric = "unbuilt", "bert", "accuracy"
class Chat(Cloze):
    fields, marks = ("prompt", "answer"), "chat"
    def row_reader(self, data, options):
        return None
class Key(Cloze):
    name = "budget"
class Attribute(Cloze):
    name = "space"
class Word(Cloze):
    name = "method"
class Taken(Cloze):
    def metrics(self):
        (own,) = super().metrics()
        return [type(own)(**{**vars(own), "name": "f1"})]
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nameless", "the class has no name"),
        ("Unmeasured", "no metric is called no_such; there are perplexity"),
        ("Lower", "the objective ter is no metric of which more is better"),
        ("Many", "expected one field or two"),
        ("Unbuilt", "the class has no method build"),
        ("Chat", "its marks are `chat`, and the class has no method encode"),
        ("Key", "a task may not be named 'budget'"),
        ("Attribute", "a task may not be named 'space'"),
        ("Word", "a task may not be named 'method'"),
        ("Taken", "hpsearch has a metric f1 already"),
        ("ClozeTask", "expected a class of hpsearch.spec.task.TaskDefinition, got <class 'my_tasks.ClozeTask'>"),
    ],
)
def test_a_task_that_lacks_something_is_refused(modules: Path, name: str, message: str) -> None:
    (modules / "broken.py").write_text(BROKEN)
    file = modules / "cloze.yaml"
    module = "my_tasks" if name == "ClozeTask" else "broken"
    file.write_text(CLOZE + f"task: {module}:{name}\n")
    with pytest.raises(SpecError, match=re.escape(message)):
        load_study(file)


def test_a_module_that_fails_is_told_as_it_fails(modules: Path) -> None:
    (modules / "failing.py").write_text("nothing = None\nnothing.there\n")
    file = modules / "cloze.yaml"
    file.write_text(CLOZE + "task: failing:Task\n")
    with pytest.raises(SpecError, match="cannot import failing: AttributeError: 'NoneType' object has no attribute"):
        load_study(file)


@pytest.mark.slow
def test_a_study_whose_task_is_not_here_is_read_all_the_same(modules: Path) -> None:
    """In another process, which knows neither the task nor its metric."""
    file = modules / "cloze.yaml"
    store = f"sqlite:///{modules}/studies.db"
    file.write_text(f"{CLOZE}{section('A task', 'yaml')}backend: inline\nstore: {store}\nfolder: {modules}/runs\n")
    hpsearch.launch(file, trials=2)
    environment = {**os.environ, "PYTHONPATH": "", "HPSEARCH_STORE": store}

    def said(*arguments: str) -> str:
        done = subprocess.run([*HPSEARCH, *arguments], env=environment, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "cloze" in said("studies")
    assert "filled" in said("show", "cloze", "0")
    assert "cannot be imported here" in said("rank", "cloze")
    assert "filled" in said("status", "cloze")
    assert "trial" in said("best", "cloze")
    said("report", "cloze", "--output", str(modules / "report.html"))
    assert "test filled" in (modules / "report.html").read_text()


@pytest.mark.nightly
def test_the_task_runs_on_ray(modules: Path) -> None:
    file = modules / "cloze.yaml"
    file.write_text(f"{CLOZE}task: my_tasks:Cloze\nstore: sqlite:///{modules}/studies.db\nfolder: {modules}/runs\n")
    environment = {**os.environ, "PYTHONPATH": str(modules)}
    command = [*HPSEARCH, "launch", str(file), "--trials", "1"]
    done = subprocess.run(command, env=environment, cwd=modules, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "filled" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(["cloze.gaps=2"], "cloze.gaps: expected less than 1", id="an option out of bounds"),
        pytest.param(["cloze.gap=0.2"], "unknown key 'gap'; did you mean 'gaps'", id="a misspelt option"),
        pytest.param(
            ["objective=bleu"], "cloze studies like this have no validation bleu; expected loss or filled", id="score"
        ),
        pytest.param(["data.corpus=ui_messages"], "ui_messages is no cloze data; expected python_docs", id="corpus"),
        pytest.param(["translation.num_beams=2"], "settings of another task", id="another task's options"),
        pytest.param(["task=my_tasks:Close"], "my_tasks has no Close", id="no such class"),
        pytest.param(
            ["task=my_tasks:Options"], "expected a class of hpsearch.spec.task.TaskDefinition, got", id="no task"
        ),
        pytest.param(["task=causal"], "unknown task 'causal'; expected causal_lm, translation, classi", id="no name"),
    ],
)
def test_mistakes_in_a_study_of_the_task_are_told(modules: Path, changes: list[str], message: str) -> None:
    file = modules / "cloze.yaml"
    file.write_text(CLOZE + section("A task", "yaml"))
    with pytest.raises(SpecError, match=message):
        load_study(file, overrides=changes)


def test_the_metric_has_a_score_an_interval_and_ties() -> None:
    names: dict[str, Any] = {}
    try:
        exec(section("A metric"), names)
        METRICS["right_length"] = names["RIGHT_LENGTH"]
        rng = np.random.default_rng(0)
        good, bad = ({"fits": (rng.random(400) < share).astype(float)} for share in (0.8, 0.4))
        value = float(score("right_length", summands("right_length", good).sum(axis=0), {}))
        assert value == pytest.approx(good["fits"].mean())
        low, high = interval("right_length", good, {})
        assert low < value < high
        assert (low, high) == pytest.approx((value - 0.04, value + 0.04), abs=0.01), "as a binomial proportion has it"
        resampled = ties.resample("right_length", [good, bad], {})
        observed = np.array([value, bad["fits"].mean()])
        best, other = ties.tie_p_values(
            observed, resampled, 400, higher_is_better=METRICS["right_length"].higher_is_better
        )
        assert best > 0.5
        assert other < 0.01, "told from the winner"
    finally:
        METRICS.pop("right_length", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tpa",
            "unknown sampler 'tpa'; expected tpe, gp, random, cmaes, grid, qmc, or package.module:name of your own",
        ),
        ("os.path", "unknown sampler 'os.path'"),
    ],
)
def test_an_unknown_name_is_named_in_the_study_file(tiny: Path, name: str, message: str) -> None:
    tiny.write_text(f"{tiny.read_text()}sampler: {name}\n")
    with pytest.raises(SpecError, match=re.escape(message)):
        load_study(tiny)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:thing", "cannot import no_such_module"),
        ("hpsearch.errors:thing", "hpsearch.errors has no thing"),
        ("builtins:dict", "sampler builtins:dict: TypeError"),
        ("os.path:join", "sampler os.path:join"),
    ],
)
def test_what_cannot_be_loaded_is_a_usage_error(tiny: Path, name: str, message: str) -> None:
    spec = load_study(tiny, overrides=[f"sampler={name}"])
    with pytest.raises(UsageError, match=message):
        first_suggestions(spec, 1)


def test_everything_built_in_is_there() -> None:
    for kind in (registry.TASKS, registry.SAMPLERS, registry.TRACKERS):
        for name in kind.built_in:
            assert kind.load(name) is not None


PAIRS = """
from hpsearch.spec.task import TaskDefinition
from my_tasks import Cloze
class Entailment(Cloze):
    name, fields, has_labels, marks = "entailment", ("premise", "hypothesis"), True, "before"
"""


def test_a_pair_of_texts_may_have_a_label(modules: Path) -> None:
    """As natural language inference has it: two columns of text, and one of labels behind them."""
    (modules / "pairs.py").write_text(PAIRS)
    rows = [{"source": f"it rains {n}", "target": f"it is wet {n}", "label": ["yes", "no"][n % 2]} for n in range(80)]
    (modules / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = modules / "pairs.yaml"
    file.write_text("name: p\ntask: pairs:Entailment\ndata: {files: pairs.jsonl}\ntokenizer: {vocab_size: 300}\n")
    card = measure(load_study(file))[0]
    assert card.labels == ["no", "yes"]
    assert sum(card.documents.values()) == 80
    file.write_text(file.read_text().replace("pairs.jsonl", "{source: pairs.jsonl, target: pairs.jsonl}"))
    with pytest.raises(SpecError, match="source and target files are for pairs of texts"):
        load_study(file)
