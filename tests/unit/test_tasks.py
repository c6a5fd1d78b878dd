"""Translation and classification: padding changes nothing, scores are sacrebleu's and scikit-learn's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_recall_fscore_support
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from hpsearch.data.prepare import prepare
from hpsearch.data.shards import load_labels, load_split, load_texts
from hpsearch.errors import UsageError
from hpsearch.metrics import statistics
from hpsearch.records import TrialConfig, TrialResult, TrialState
from hpsearch.spec.sections import DataSpec, FileSplits, TokenizerSpec
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import study_class
from hpsearch.spec.task import task_named
from hpsearch.tasks.base import bucketed, within_budget
from hpsearch.tasks.classification.definition import ClassificationOptions
from hpsearch.tasks.classification.training import Classification
from hpsearch.tasks.translation.definition import TranslationOptions
from hpsearch.tasks.translation.training import Translation
from hpsearch.training.random_states import seed_everything
from hpsearch.training.trainer import Trainer
from hpsearch.worker.run import run_trial

RUN = RunSettings(learning_rate=3e-3, batch_size=16, num_epochs=1, evaluations_per_epoch=1)
BART = ModelSettings(architecture="bart", hidden_size=32, num_heads=2, num_layers=1, context_length=24, init_std=0.08)
BERT = ModelSettings(architecture="bert", hidden_size=32, num_heads=2, num_layers=1, context_length=24)


def make(task: Any, data: DataSpec, folder: Path, **more: Any) -> Path:
    bpe = TokenizerSpec(vocab_size=600, shared=more.pop("shared", True))
    return prepare(study_class(task)(name="s", task=task, data=data, tokenizer=bpe, folder=str(folder), **more))[0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("translation", DataSpec(corpus="ui_messages", max_examples=900), tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def areas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("classification", DataSpec(corpus="python_areas", max_examples=900), tmp_path_factory.mktemp("areas"))


def translation(data: Path, model: ModelSettings = BART, **options: Any) -> Translation:
    seed_everything(0)
    return Translation(data, model, TranslationOptions(**options), label_smoothing=0.0)


def classification(data: Path, model: ModelSettings = BERT, **options: Any) -> Classification:
    seed_everything(0)
    return Classification(data, model, ClassificationOptions(**options), label_smoothing=0.0)


def trainer(task: Any, folder: Path, run: RunSettings = RUN) -> Trainer:
    return Trainer(task, run, seed=0, device=torch.device("cpu"), folder=folder)


def trial(
    task: str, data: Path, folder: Path, model: ModelSettings, run: RunSettings = RUN, **options: Any
) -> TrialResult:
    config = TrialConfig(
        study="s", number=0, task=task, seed=0, params={}, model=model, training=run, rule=None, data=str(data),
        folder=str(folder), threads=1, options=options,
    )  # fmt: skip
    running = run_trial(config)
    try:
        while True:
            next(running)
    except StopIteration as end:
        result: TrialResult = end.value
        assert result.error is None, result.error
        return result


def each_alone(task: Any, split: str) -> Iterator[np.ndarray]:
    for index in range(task.num_examples[split]):
        yield np.array([index])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["marian", "t5", "bart", "bert", "distilbert"])
def test_padding_and_bucketing_change_no_loss(pairs: Path, areas: Path, tmp_path: Path, kind: str) -> None:
    classifies = "bert" in kind
    task: Any = (
        classification(areas, BERT.model_copy(update={"architecture": kind}))
        if classifies
        else translation(pairs, BART.model_copy(update={"architecture": kind, "init_std": None}))
    )
    own = trainer(task, tmp_path).evaluator.mean_loss()
    task.evaluation_batches = lambda split: list(each_alone(task, split))
    alone = trainer(task, tmp_path).evaluator.mean_loss()
    task.evaluation_batches = lambda split: [np.arange(task.num_examples[split])]
    together = trainer(task, tmp_path).evaluator.mean_loss()
    assert own == pytest.approx(alone, rel=1e-5)
    assert own == pytest.approx(together, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["translation", "classification"])
def test_every_score_follows_from_what_is_kept_of_its_examples(
    pairs: Path, areas: Path, tmp_path: Path, kind: str
) -> None:
    data, model = (pairs, BART) if kind == "translation" else (areas, BERT)
    result = trial(kind, data, tmp_path, model)
    examples = statistics.unpack(result.examples)
    assert {score.metric for score in result.scores} == {*task_named(kind).metric_names(task_named(kind).options())}
    for score in result.scores:
        sums = statistics.summands(score.metric, examples).sum(axis=0)
        assert float(statistics.score(score.metric, sums, score.contract)) == pytest.approx(score.value, abs=1e-9)


def test_bucketed_batches_hold_every_example_once_and_pad_little() -> None:
    lengths = np.random.default_rng(0).lognormal(2.5, 0.7, 5000).astype(np.int64) + 1
    batches = bucketed(lengths, np.random.default_rng(0), 16)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert sum(len(batch) != 16 for batch in batches) <= 1
    real = lengths.sum()
    assert sum(len(batch) * lengths[batch].max() for batch in batches) < 1.1 * real
    random = np.random.default_rng(0).permutation(len(lengths))
    cut = [random[start : start + 16] for start in range(0, len(random), 16)]
    assert sum(len(batch) * lengths[batch].max() for batch in cut) > 1.5 * real
    again = bucketed(lengths, np.random.default_rng(1), 16)
    assert [sorted(batch) for batch in again] != [sorted(batch) for batch in batches], "epochs differ"


def test_evaluation_batches_keep_to_their_budget(pairs: Path) -> None:
    lengths = load_split(pairs, "train", "source").lengths
    batches = within_budget(lengths, tokens=256)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert max(len(batch) * lengths[batch].max() for batch in batches if len(batch) > 1) <= 256


def test_translation_losses_are_transformers_own(pairs: Path) -> None:
    task = translation(pairs)
    task.model.eval()
    batch = task.batch("validation", np.arange(8))
    source, target = batch.tensors
    with torch.no_grad():
        theirs = task.model(input_ids=source, attention_mask=(source != 1).long(), labels=target).loss
        ours = task.losses(batch).sum() / task.predicted("validation", np.arange(8))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.slow
def test_label_smoothing_touches_training_losses_only(pairs: Path, areas: Path) -> None:
    for make_task in (
        lambda smoothing: Translation(pairs, BART, TranslationOptions(), smoothing),
        lambda smoothing: Classification(areas, BERT, ClassificationOptions(), smoothing),
    ):
        losses = {}
        for smoothing in (0.0, 0.2):
            seed_everything(0)
            task = make_task(smoothing)
            for mode in (True, False):
                task.model.train(mode)
                losses[smoothing, mode] = task.losses(task.batch("validation", np.arange(4))).sum().item()
        assert losses[0.0, False] == losses[0.2, False]
        assert losses[0.0, True] != losses[0.2, True]


@pytest.mark.slow
def test_the_scores_of_a_translation_are_the_sacrebleu_commands(pairs: Path, tmp_path: Path) -> None:
    run = RUN.model_copy(update={"num_epochs": 6, "learning_rate": 1e-2})
    result = trial("translation", pairs, tmp_path / "trial", BART, run)
    outputs, references = result.details["outputs"], load_texts(pairs, "test", "target")
    assert len(outputs) == len(references)
    (tmp_path / "references.txt").write_text("\n".join(references) + "\n")
    (tmp_path / "outputs.txt").write_text("\n".join(outputs) + "\n")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        "references.txt",
        "-i",
        "outputs.txt",
        "-m",
        "bleu",
        "chrf",
        "ter",
        "--chrf-word-order",
        "2",
        "-w",
        "6",
    ]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    theirs = {entry["name"]: entry for entry in json.loads(printed)}
    for score, name in zip(result.scores, ("BLEU", "chrF2++", "TER"), strict=True):
        assert score.value == pytest.approx(theirs[name]["score"], abs=5e-7)
        assert score.low <= score.value <= score.high
        assert score.contract["signature"].split("|version")[0] == theirs[name]["signature"].split("|version")[0]
    assert result.details["samples"][0]["output"] == outputs[0]
    assert len(result.details["samples"]) == 5


@pytest.mark.slow
def test_a_translation_model_learns_and_its_folder_loads(tmp_path: Path) -> None:
    # Word for word: 30 words each with one translation, so that a small model has something to learn.
    words = [a + b for a in "bdfgk" for b in "aeiouy"]
    rng = np.random.default_rng(0)
    sentences = [[words[index] for index in rng.integers(0, 30, rng.integers(2, 6))] for _ in range(1200)]
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps({"source": " ".join(s), "target": " ".join(w.upper() for w in s)}) + "\n" for s in sentences)
    )
    data = make("translation", DataSpec(files=FileSplits(train=[str(file)])), tmp_path)
    run = RUN.model_copy(update={"num_epochs": 8, "learning_rate": 5e-3})
    greedy = trial("translation", data, tmp_path / "greedy", BART, run)
    assert greedy.scores[0].metric == "bleu"
    assert greedy.scores[0].value > 40
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "greedy")
    assert model.config.eos_token_id == 0
    beams = trial("translation", data, tmp_path / "beams", BART, run, num_beams=3, samples=2)
    assert beams.best_valid_loss == greedy.best_valid_loss
    assert len(beams.details["samples"]) == 2
    assert beams.scores[0].contract["num_beams"] == 3


@pytest.mark.slow
def test_two_vocabularies_train_and_decode(tmp_path: Path) -> None:
    data = make("translation", DataSpec(corpus="ui_messages", max_examples=400), tmp_path, shared=False)
    marian = BART.model_copy(update={"architecture": "marian"})
    assert trial("translation", data, tmp_path / "trial", marian).state is TrialState.COMPLETED
    with pytest.raises(UsageError, match="marian can have two"):
        translation(data)


def test_layers_of_encoder_and_decoder_are_settings_of_their_own(pairs: Path) -> None:
    for kind, names in {
        "marian": ("encoder_layers", "decoder_layers"),
        "t5": ("num_layers", "num_decoder_layers"),
    }.items():
        both = translation(
            pairs, BART.model_copy(update={"architecture": kind, "num_layers": 2, "init_std": None})
        ).model.config
        assert [getattr(both, name) for name in names] == [2, 2]
        each = BART.model_copy(update={"architecture": kind, "num_encoder_layers": 3, "init_std": None})
        assert [getattr(translation(pairs, each).model.config, name) for name in names] == [3, 1]


@pytest.mark.slow
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "binary"])
def test_the_scores_of_a_classifier_are_scikit_learns(areas: Path, tmp_path: Path, average: Any) -> None:
    positive = "web" if average == "binary" else None
    options = ClassificationOptions(f1=average, positive_label=positive)
    run = RUN.model_copy(update={"num_epochs": 3})
    result = trial("classification", areas, tmp_path / "trial", BERT, run, **options.model_dump())
    labels = result.details["confusion"]["labels"]
    predicted = np.array([labels[row[0]] for row in result.details["predictions"]])
    truth = np.array(labels)[load_labels(areas, "test").argmax(1)]
    scores = {score.metric: score for score in result.scores}
    if average == "binary":
        expected = precision_recall_fscore_support(
            truth == "web", predicted == "web", average="binary", zero_division=0
        )
    else:
        expected = precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)
    assert [scores[name].value for name in ("precision", "recall", "f1")] == pytest.approx(expected[:3])
    assert scores["f1_macro"].value == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    assert scores["accuracy"].value == pytest.approx((truth == predicted).mean())
    assert np.trace(result.details["confusion"]["counts"]) == (truth == predicted).sum()
    for score in result.scores:
        assert score.low <= score.value <= score.high
    assert scores["f1"].contract["average"] == average
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trial")
    assert model.config.id2label[0] == labels[0]


@pytest.mark.slow
def test_several_labels_are_learned_and_scored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(900):
        chosen = [word for word in ("red", "green", "blue") if rng.random() < 0.5] or ["red"]
        rows.append({"text": f"the {' and '.join(chosen)} thing number {rng.integers(1000)}", "label": chosen})
    file = tmp_path / "colours.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ClassificationOptions(multi_label=True, class_weights=True)
    data = make("classification", DataSpec(files=FileSplits(train=[str(file)])), tmp_path, classification=options)
    # Wide initial weights and Muon learn this from each of several seeds; AdamW's plain start needed a lucky one.
    model = BERT.model_copy(update={"init_std": 0.08})
    run = RUN.model_copy(update={"num_epochs": 10, "learning_rate": 5e-3, "optimizer": "muon", "weight_average": 0.1})
    result = trial("classification", data, tmp_path / "trial", model, run, **options.model_dump())
    assert result.scores[0].value > 0.95
    assert "confusion" not in result.details


@pytest.mark.slow
def test_class_weights_lift_the_rare_class(areas: Path) -> None:
    task = classification(areas, class_weights=True)
    counts = load_labels(areas, "train").sum(axis=0)
    assert task._weights is not None
    assert int(task._weights.argmax()) == int(counts.argmin())
    assert float((task._weights * torch.tensor(counts)).sum() / counts.sum()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.slow
def test_a_model_without_layers_can_be_trained(areas: Path, tmp_path: Path) -> None:
    none = BERT.model_copy(update={"num_layers": 0})
    assert trial("classification", areas, tmp_path / "trial", none).state is TrialState.COMPLETED


@pytest.mark.slow
def test_a_positive_label_that_is_not_there_is_named(areas: Path) -> None:
    with pytest.raises(UsageError, match="no label 'webb'; there are asyncio, concurrency"):
        classification(areas, f1="binary", positive_label="webb")
