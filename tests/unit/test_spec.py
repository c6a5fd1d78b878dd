"""A study file's mistakes end here: every one with its place, all at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hpsearch.errors import SpecError
from hpsearch.spec.json_schema import json_schema
from hpsearch.spec.load import load_study
from hpsearch.spec.parsing.space import parse_space
from hpsearch.spec.parsing.yaml_file import read_study_file
from hpsearch.spec.sections import AlignedFiles
from hpsearch.spec.space import Choice, Range
from hpsearch.spec.study import StudySpec, recorded_study

BASE = "name: a\ntask: causal_lm\ndata: {corpus: python_docs}\n"
ROOT = Path(__file__).parents[2]


def load(tmp_path: Path, text: str, **options: Any) -> StudySpec:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    return load_study(file, **options)


def mistakes(tmp_path: Path, text: str, **options: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, text, **options)
    return [line.removeprefix(f"{tmp_path}/") for line in caught.value.lines]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("trails: 3", "s.yaml:4:1: trails: unknown key 'trails'; did you mean 'budget.trials'?", id="unknown key"),
        pytest.param("num_layers: 3", "s.yaml:4:1: num_layers: unknown key 'num_layers'; it belongs under 'search', 'model' or 'training'", id="misplaced"),
        pytest.param("search: {n_layers: 3}", "s.yaml:4:10: search.n_layers: unknown setting; did you mean 'num_layers'?", id="synonym"),
        pytest.param("search: {learnig_rate: 3}", "s.yaml:4:10: search.learnig_rate: unknown setting; did you mean 'learning_rate'?", id="misspelt setting"),
        pytest.param("search: {num_layers: {min: 1, maximum: 4}}", "s.yaml:4:31: search.num_layers.maximum: unknown key 'maximum'; did you mean 'max'?", id="misspelt bound"),
        pytest.param("search: {num_layers: {min: 4, max: 1}}", "s.yaml:4:22: search.num_layers: min (4) must be below max (1)", id="low over high"),
        pytest.param("search: {num_layers: {min: 4, max: 4}}", "s.yaml:4:22: search.num_layers: min (4) must be below max (4)", id="empty range"),
        pytest.param("search: {learning_rate: {min: 0, max: 1, scale: log}}", "s.yaml:4:31: search.learning_rate.min: a log range must start above 0, got min: 0", id="log from 0"),
        pytest.param("search: {learning_rate: {min: x, max: 1}}", "s.yaml:4:31: search.learning_rate.min: expected a number, got 'x'", id="text bound"),
        pytest.param("search: {learning_rate: {max: 1}}", "s.yaml:4:25: search.learning_rate: a range needs 'min' (or give 'values' for choices)", id="half a range"),
        pytest.param("search: {batch_size: []}", "s.yaml:4:22: search.batch_size: empty: expected at least one value", id="no choices"),
        pytest.param("search: {batch_size: [8, 8]}", "s.yaml:4:26: search.batch_size.1: 8 is given twice", id="twice"),
        pytest.param("search: {batch_size: [8, 1.5]}", "s.yaml:4:26: search.batch_size.1: expected a whole number, got 1.5", id="part of a sequence"),
        pytest.param("search: {batch_size: {min: 1.0, max: 8}}", "s.yaml:4:28: search.batch_size.min: expected a whole number, got 1.0", id="part of a bound"),
        pytest.param("search: {dropout: {min: 0, max: 1}}", "s.yaml:4:33: search.dropout.max: expected less than 1.0, got 1", id="bound of a setting"),
        pytest.param("search: {num_layers: {min: 1, max: 4, step: 9}}", "s.yaml:4:45: search.num_layers.step: step (9) is larger than the range (1 to 4)", id="step"),
        pytest.param("search: {dropout: {min: 0, max: 0.5, when: {num_layer: 2}}, num_layers: [1, 2]}", "s.yaml:4:45: search.dropout.when.num_layer: 'num_layer' is not searched; did you mean 'num_layers'?", id="when of nothing"),
        pytest.param("search: {dropout: {values: [0.1], when: {num_layers: 2}}, num_layers: {values: [2], when: {dropout: 0.1}}}", "s.yaml:4:41: search.dropout.when: depends on itself, by way of other settings", id="when in a circle"),
        pytest.param("search: {learning_rate: {distribution: log_uniform, min: -9, max: -1}}", "log_uniform_values", id="W&B exponents"),
        pytest.param("search: {learning_rate: {min: 0.1, max: 1.0, prior: 3}}", "s.yaml:4:53: search.learning_rate.prior: expected a number from 0.1 to 1, got 3", id="prior outside"),
        pytest.param("search: {num_layers: {min: 1, max: 4, prior: 1.5}}", "search.num_layers.prior: expected a whole number, got 1.5", id="part of a prior"),
        pytest.param("search: {batch_size: {values: [8, 16], prior: 9}}", "search.batch_size.prior: expected one of 8, 16, got 9", id="prior of no choice"),
        pytest.param("search: {batch_size: {value: 8, prior: 8}}", "search.batch_size.prior: a fixed value needs no prior", id="prior of a fixed value"),
        pytest.param("search: {batch_size: [8, 16]}\nenqueue: [{batch_size: 9}]", "s.yaml:5:24: enqueue.0.batch_size: 9 is not in the search space", id="enqueue outside"),
        pytest.param("search: {batch_size: [8, 16]}\nenqueue: [{dropout: 0.1}]", "s.yaml:5:12: enqueue.0.dropout: 'dropout' is not searched; searched are batch_size", id="enqueue of another"),
        pytest.param("search: {batch_size: [8, 16]}\nsampler: grid\ntransfer_from: [x]", "transfer_from: the grid sampler tries every setting once", id="a start of a grid"),
        pytest.param("budget: {trials: -1}", "s.yaml:4:18: budget.trials: expected at least 1, got -1", id="negative budget"),
        pytest.param("budget: {minutes: 0}", "s.yaml:4:19: budget.minutes: expected more than 0.0, got 0", id="no time"),
        pytest.param("seed: yes", "s.yaml:4:7: seed: expected a whole number, got 'yes'", id="text for a number"),
        pytest.param("sampler: tpee", "s.yaml:4:10: sampler.name: unknown sampler 'tpee'; expected tpe, gp, random, cmaes, grid, qmc, or package.module:name of your own", id="sampler"),
        pytest.param("sampler: grid\nsearch: {learning_rate: {min: 0.1, max: 1.0}}", "s.yaml:5:25: search.learning_rate: the grid sampler needs a list of values, or a range with step", id="endless grid"),
        pytest.param("prune: {overfit: {patince: 3}}", "s.yaml:4:19: prune.overfit.patince: unknown key 'patince'; did you mean 'patience'?", id="rule"),
        pytest.param("model: {dropout: 0.1}\nsearch: {dropout: [0.1, 0.2]}", "s.yaml:4:9: model.dropout: 'dropout' stands under 'search' as well; keep one", id="fixed and searched"),
        pytest.param("model: {hidden_size: 100, num_heads: 3}", "num_heads (3) does not divide hidden_size (100)", id="heads"),
        pytest.param("resources: {gpus_per_trial: 1.5}", "s.yaml:4:29: resources.gpus_per_trial: expected auto, packed, a part of one or a whole number, got 1.5", id="gpus"),
        pytest.param("backend: inline\nresources: {gpus_per_trial: 2}", "s.yaml:5:29: resources.gpus_per_trial: the inline backend has one process", id="several GPUs in one process"),
        pytest.param("store: ${HPSEARCH_NOT_SET}", "s.yaml:4:8: store: the environment has no HPSEARCH_NOT_SET; set it, or write ${HPSEARCH_NOT_SET:-default}", id="environment"),
        pytest.param("classification: {f1: micro}", "s.yaml:4:1: classification: settings of another task; this study's is causal_lm", id="other task"),
        pytest.param("tokenizer: {shared: false}", "s.yaml:4:21: tokenizer.shared: this study's task is causal_lm, which has one vocabulary", id="two vocabularies"),
        pytest.param("metric: bleu", "s.yaml:4:9: metric: bleu is no test metric of causal_lm studies like this; expected perplexity or bits_per_byte", id="metric of another task"),
        pytest.param("metric: {name: perplexity, goal: maximize}", "s.yaml:4:34: metric.goal: expected minimize of perplexity, got maximize", id="goal of a metric"),
        pytest.param("metric: {name: val/loss, goal: most}", "s.yaml:4:32: metric.goal: expected minimize or maximize, got 'most'", id="W&B goal"),
        pytest.param("metric: {goal: minimize}", "s.yaml:4:9: metric: expected the name of a metric", id="W&B metric without a name"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    found = mistakes(tmp_path, BASE + text + "\n")
    assert len(found) == 1
    assert line in found[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("task: causal_lm\ndata: {corpus: python_docs}\n", "s.yaml:1:1: missing key 'name'", id="name"),
        pytest.param("name: ../up\ntask: causal_lm\ndata: {corpus: python_docs}\n", "s.yaml:1:7: name: expected letters", id="path"),
        pytest.param("name: a\ntask: lm\ndata: {corpus: python_docs}\n", "s.yaml:2:7: task: unknown task 'lm'; expected causal_lm, translation, classification, instruction, or package.module:name of your own", id="task"),
        pytest.param("name: a\ntask: translation\ndata: {corpus: python_docs}\n", "s.yaml:3:16: data.corpus: python_docs is no translation data; expected ui_messages", id="corpus of another task"),
        pytest.param("name: a\ntask: causal_lm\ndata: {}\n", "s.yaml:3:7: data: expected exactly one of corpus, files, hub and mix, got none", id="no data"),
        pytest.param("name: a\ntask: causal_lm\ndata: {files: gone.txt}\n", "data.files.train: no such file", id="no file"),
        pytest.param("name: a\ntask: causal_lm\ndata: {files: s.yaml}\n", "cannot tell the format of s.yaml", id="format"),
    ],
)  # fmt: skip
def test_what_must_be_there_is_asked_for(tmp_path: Path, text: str, line: str) -> None:
    found = mistakes(tmp_path, text)
    assert len(found) == 1
    assert line in found[0]


def test_all_mistakes_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "name: a b\ntask: lm\ntrails: 3\ndata: {corpus: python_docs}\nsearch:\n  bs: [8]\n  num_layers: {min: 3, max: 1}\nbudget: {trials: 0}\n"
    assert [int(line.split(":")[1]) for line in mistakes(tmp_path, text)] == [1, 2, 3, 6, 7, 8]


def test_a_wrong_override_is_named_as_typed(tmp_path: Path) -> None:
    assert mistakes(tmp_path, BASE, overrides=["search.num_layers.max=4"])[0].startswith(
        "--set search.num_layers.max=4: "
    )
    assert "expected KEY=VALUE" in mistakes(tmp_path, BASE, overrides=["trials"])[0]
    assert mistakes(tmp_path, BASE, name="no/slash")[0].startswith("--name no/slash: ")


@pytest.mark.parametrize(
    ("raw", "dimension"),
    [
        pytest.param({"min": 1e-4, "max": 1, "scale": "log"}, Range(low=1e-4, high=1, log=True), id="ours"),
        pytest.param({"min": 1e-4, "max": 1e-1, "distribution": "log_uniform_values"}, Range(low=1e-4, high=0.1, log=True), id="W&B log"),
        pytest.param({"distribution": "uniform", "min": 1, "max": 2}, Range(low=1, high=2), id="W&B uniform"),
        pytest.param({"distribution": "q_uniform", "min": 0.5, "max": 2, "q": 0.5}, Range(low=0.5, high=2, step=0.5), id="W&B q"),
        pytest.param({"values": [1e-3, 1e-2]}, Choice(values=(1e-3, 1e-2)), id="W&B values"),
        pytest.param([1e-3, 1e-2], Choice(values=(1e-3, 1e-2)), id="list"),
    ],
)  # fmt: skip
def test_spaces_as_people_write_them(raw: Any, dimension: Any) -> None:
    space, problems = parse_space({"learning_rate": raw})
    assert not problems
    assert space.dimensions == {"learning_rate": dimension}


def test_quantised_distributions_hold_multiples_of_q() -> None:
    """As W&B has them: of `min: 10, q: 16` not 10, 26, 42."""
    space, problems = parse_space(
        {
            "batch_size": {"distribution": "q_uniform", "min": 10, "max": 100, "q": 16},
            "config.n_inner": {"distribution": "q_log_uniform_values", "min": 30, "max": 8192, "q": 32},
            "learning_rate": {"distribution": "q_log_uniform_values", "min": 1e-3, "max": 4e-3, "q": 1e-3},
        }
    )
    assert not problems
    assert space.dimensions["batch_size"] == Range(low=16, high=96, integer=True, step=16)
    inner = space.dimensions["config.n_inner"]
    assert isinstance(inner, Choice)
    assert (inner.values[0], inner.values[-1]) == (32, 8192)
    assert all(isinstance(value, int) and value % 32 == 0 for value in inner.values)
    small = sum(value <= 512 for value in inner.values)
    assert small > len(inner.values) / 4, "evenly spread on a logarithmic scale, as far as multiples of 32 are"
    rates = space.dimensions["learning_rate"]
    assert isinstance(rates, Choice)
    assert rates.values == pytest.approx((1e-3, 2e-3, 3e-3, 4e-3))
    for wrong in ({"min": 17, "max": 31, "q": 16}, {"min": 0, "max": 31, "q": 16}):
        assert parse_space({"batch_size": {"distribution": "q_log_uniform_values", **wrong}})[1], wrong


def test_whole_numbers_at_both_ends_make_an_integer_range() -> None:
    space, problems = parse_space(
        {
            "num_layers": {"min": 1, "max": 4},
            "batch_size": {"min": 8, "max": 64, "distribution": "log_uniform_values"},
            "dropout": {"min": 0, "max": 0.5},
            "config.n_inner": {"min": 64, "max": 128, "step": 32},
        }
    )
    assert not problems
    assert [dimension.integer for dimension in space.dimensions.values()] == [True, True, False, True]  # type: ignore[union-attr]
    assert space.size == math.inf
    assert space.dimensions["config.n_inner"].size == 3  # type: ignore[union-attr]


def test_conditions_order_the_space_and_decide() -> None:
    space, problems = parse_space(
        {
            "dropout": {"min": 0.0, "max": 0.5, "when": {"num_layers": {"min": 3}, "schedule": ["cosine", "linear"]}},
            "num_layers": {"min": 1, "max": 4},
            "schedule": ["cosine", "linear", "constant"],
        }
    )
    assert not problems
    assert list(space.dimensions) == ["num_layers", "schedule", "dropout"]
    assert space.is_active("dropout", {"num_layers": 3, "schedule": "linear"})
    assert not space.is_active("dropout", {"num_layers": 2, "schedule": "linear"})
    assert not space.is_active("dropout", {"num_layers": 4, "schedule": "constant"})


def test_a_pasted_wandb_sweep_is_understood(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        BASE + "method: bayes\nparameters:\n  learning_rate: {distribution: log_uniform_values, min: 1e-5, max: 0.1}\n"
        "  batch_size: {values: [16, 32]}\n  num_epochs: {value: 5}\n  num_layers: {min: 2, max: 8}\n",
    )
    assert spec.sampler.name == "tpe"
    assert spec.space.fixed == {"num_epochs": 5}
    assert list(spec.space.dimensions) == ["learning_rate", "batch_size", "num_layers"]
    wrong = mistakes(tmp_path, BASE + "parameters:\n  lr: {values: [1]}\n")
    assert wrong == ["s.yaml:5:3: search.lr: unknown setting; did you mean 'learning_rate'?"]


@pytest.mark.parametrize(
    ("line", "metric"),
    [
        ("metric: {name: val_loss, goal: minimize}", "perplexity"),
        ("metric: {name: eval/loss}", "perplexity"),
        ("metric: {name: test.bits_per_byte, goal: minimize}", "bits_per_byte"),
        ("metric: {name: bits_per_byte, goal: minimize}", "bits_per_byte"),
        ("metric: bits_per_byte", "bits_per_byte"),
        ("objective: loss", "perplexity"),
    ],
)
def test_a_study_is_ranked_by_the_metric_that_it_names(tmp_path: Path, line: str, metric: str) -> None:
    assert load(tmp_path, f"{BASE}{line}\n").ranking_metric == metric


def test_the_longest_run_gets_some_forty_evaluations(tmp_path: Path) -> None:
    def per_epoch(epochs: str) -> int:
        return load(tmp_path, BASE + f"search: {{num_epochs: {epochs}}}\n").evaluations_per_epoch

    assert per_epoch("{min: 2, max: 16}") in (2, 3)
    assert per_epoch("[2, 4]") == 10
    assert per_epoch("100") == 1
    assert load(tmp_path, BASE + "training: {evaluations_per_epoch: 7}\n").evaluations_per_epoch == 7


def test_settings_of_a_trial_lie_over_the_files(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        BASE
        + "model: {hidden_size: 64, config: {n_inner: 99}}\nsearch: {dropout: 0.3, num_layers: [1, 5], config.n_inner: [7, 8]}\n",
    )
    model, training = spec.settings_for({"num_layers": 5, "config.n_inner": 8})
    assert (model.num_layers, model.hidden_size, model.dropout, model.config) == (5, 64, 0.3, {"n_inner": 8})
    assert training.evaluations_per_epoch == 10


def test_the_store_comes_from_option_environment_file_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path, BASE).store == "sqlite:///hpsearch.db"
    with_store = BASE + "store: ${HPSEARCH_SOME_STORE:-sqlite:///file.db}\n"
    assert load(tmp_path, with_store).store == "sqlite:///file.db"
    monkeypatch.setenv("HPSEARCH_SOME_STORE", "sqlite:///some.db")
    assert load(tmp_path, with_store).store == "sqlite:///some.db"
    monkeypatch.setenv("HPSEARCH_STORE", "sqlite:///environment.db")
    assert load(tmp_path, with_store).store == "sqlite:///environment.db"
    assert load(tmp_path, with_store, store="sqlite:///option.db").store == "sqlite:///option.db"


def test_the_fingerprint_is_of_the_study_not_of_its_place(tmp_path: Path) -> None:
    one = load(tmp_path, BASE)
    assert load(tmp_path, BASE, trials=99, store="sqlite:///x.db", backend="inline").fingerprint == one.fingerprint
    assert load(tmp_path, BASE + "seed: 1\n").fingerprint != one.fingerprint


def test_the_schema_accepts_our_studies_and_refuses_a_misspelt_key() -> None:
    schema = json_schema()
    for file in (ROOT / "studies").glob("*.yaml"):
        study = read_study_file(file).content
        jsonschema.validate(study, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**study, "trails": 3}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**study, "search": {"num_layer": 3}}, schema)


def test_aligned_files_are_for_translations(tmp_path: Path) -> None:
    for name in ("a.en", "a.fr"):
        (tmp_path / name).write_text("one\n")
    pair = "data: {files: {source: a.en, target: a.fr}}\n"
    spec = load(tmp_path, f"name: s\ntask: translation\n{pair}")
    assert spec.data.files is not None
    assert isinstance(spec.data.files.train, AlignedFiles)
    assert spec.data.files.train.target == [str(tmp_path / "a.fr")]
    jsonschema.validate(read_study_file(tmp_path / "s.yaml").content, json_schema())
    (line,) = mistakes(tmp_path, f"name: s\ntask: causal_lm\n{pair}")
    assert line.endswith(
        "data.files.train: source and target files are for pairs of texts; this study's task is causal_lm"
    )
    (tmp_path / "a.txt").write_text("one\n")
    (line,) = mistakes(tmp_path, "name: s\ntask: translation\ndata: {files: a.txt}\n")
    assert "a.txt has texts and nothing beside them" in line
    (line,) = mistakes(tmp_path, "name: s\ntask: translation\ndata: {files: {train: 5}}\n")
    assert "data.files.train: expected" in line


@pytest.mark.parametrize(
    ("task", "objective", "message"),
    [
        ("causal_lm", "bleu", "causal_lm studies like this have no validation bleu; expected loss"),
        ("translation", "f1", "translation studies like this have no validation f1; expected loss or bleu"),
    ],
)
def test_an_objective_that_the_task_lacks_is_refused(tmp_path: Path, task: str, objective: str, message: str) -> None:
    corpus = {"causal_lm": "python_docs", "translation": "ui_messages"}[task]
    (line,) = mistakes(tmp_path, f"name: s\ntask: {task}\ndata: {{corpus: {corpus}}}\nobjective: {objective}\n")
    assert line.endswith(f"objective: {message}")


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("1", "1"),
        ("01", "01"),
        ("1.0", "1.0"),
        ("true", "true"),
        ("'1'", "1"),
        ("yes", "yes"),
        ("2020-01-01", "2020-01-01"),
    ],
)
def test_a_positive_label_is_text_as_written(tmp_path: Path, written: str, label: str) -> None:
    text = (
        "name: a\ntask: classification\ndata: {corpus: python_areas}\nclassification: {f1: binary, positive_label: x}\n"
    )
    assert load(tmp_path, text.replace(": x", f": {written}")).options.positive_label == label
    assert load(tmp_path, text, overrides=[f"classification.positive_label={written}"]).options.positive_label == label
    jsonschema.validate(
        {
            "name": "a",
            "task": "classification",
            "data": {"corpus": "python_areas"},
            "classification": {"positive_label": 1},
        },
        json_schema(),
    )


def test_languages_and_rare_labels_belong_to_a_task(tmp_path: Path) -> None:
    data = "data: {corpus: python_docs, source_language: en, target_language: fr, rare_labels: drop}\n"
    assert mistakes(tmp_path, f"name: a\ntask: causal_lm\n{data}") == [
        "s.yaml:3:29: data.source_language: only a text and its translation have languages; this study's task is causal_lm",
        "s.yaml:3:50: data.target_language: only a text and its translation have languages; this study's task is causal_lm",
        "s.yaml:3:71: data.rare_labels: this study's task is causal_lm, whose examples have no labels",
    ]


def test_defaults_that_depend_on_the_file_are_recorded_with_the_study(tmp_path: Path) -> None:
    record = load(tmp_path, BASE).record()
    assert record["model"]["architecture"] == "gpt2"
    assert (record["training"]["optimizer"], record["training"]["weight_average"]) == ("muon", 0.1)
    assert record["training"]["evaluations_per_epoch"] >= 1
    searched = load(tmp_path, BASE + "search: {optimizer: [muon, adamw], architecture: [gpt2, llama]}\n").record()
    assert searched["training"]["optimizer"] is None
    assert searched["model"]["architecture"] is None
    named = load(tmp_path, BASE + "training: {optimizer: adamw, evaluations_per_epoch: 3}\n").record()
    assert (named["training"]["optimizer"], named["training"]["evaluations_per_epoch"]) == ("adamw", 3)


def test_a_setting_that_is_searched_under_a_condition_has_its_default_elsewhere(tmp_path: Path) -> None:
    search = "search: {schedule: [cosine, linear], optimizer: {values: [muon, adamw], when: {schedule: cosine}}}\n"
    spec = load(tmp_path, BASE + search)
    assert spec.settings_for({"schedule": "linear"})[1].optimizer == "muon"
    assert spec.settings_for({"schedule": "cosine", "optimizer": "adamw"})[1].optimizer == "adamw"


def test_a_misspelt_option_of_the_python_functions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unknown options: trails; known: overrides, name, trials"):
        load(tmp_path, BASE, trails=3)


def test_a_recorded_study_is_read_without_the_package_of_its_sampler(tmp_path: Path) -> None:
    spec = load(tmp_path, BASE)
    record = {**spec.record(), "sampler": {"name": "of_a_package", "startup_trials": 3}}
    again = recorded_study(record, spec.placement(), spec.store, trials=3)
    assert again.sampler.name == "of_a_package"
