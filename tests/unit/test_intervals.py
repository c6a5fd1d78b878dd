"""Intervals of test scores hold what they promise: few examples, rare classes, perfect scores."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from hpsearch.metrics import intervals, statistics

LABEL_METRICS = [("f1", "macro"), ("f1", "micro"), ("f1", "weighted"), ("precision", "macro"), ("accuracy", "accuracy")]
REFERENCES = ["the cat sat on the mat", "a file was not found", "save all changes now", "open", "close the window"]
OUTPUTS = ["the cat sat on a mat", "file not found", "save changes", "open", "shut the window"]


def benchmark() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "intervals.py"
    spec = importlib.util.spec_from_file_location("interval_benchmark", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def contract(classes: int, average: str) -> dict[str, Any]:
    return {"labels": [str(label) for label in range(classes)], "average": average}


@pytest.mark.parametrize(("metric", "average"), LABEL_METRICS)
def test_a_perfect_classifier_of_rare_classes_has_an_interval_that_ends_at_one(metric: str, average: str) -> None:
    truth = np.eye(133, dtype=np.uint8).repeat(3, 0)
    low, high = intervals.interval(metric, {"truth": truth, "predicted": truth}, contract(133, average))
    assert high == 1.0
    assert 0.97 < low < 1.0  # 399 right answers, and yet the 400th may be wrong


@pytest.mark.parametrize(("metric", "average"), LABEL_METRICS)
@pytest.mark.parametrize("examples", [1, 2, 5, 40])
def test_an_interval_holds_its_score_and_stays_within_the_range(metric: str, average: str, examples: int) -> None:
    rng = np.random.default_rng(examples)
    for classes in (2, 3, 30):
        for skill in (0.0, 0.5, 1.0):
            truth = rng.integers(0, classes, examples)
            predicted = np.where(rng.random(examples) < skill, truth, (truth + 1) % classes)
            arrays = {"truth": np.eye(classes)[truth], "predicted": np.eye(classes)[predicted]}
            given = contract(classes, average)
            value = float(statistics.score(metric, statistics.summands(metric, arrays).sum(0), given))
            low, high = intervals.interval(metric, arrays, given)
            assert 0 <= low <= value <= high <= 1
            assert high > low, "nothing is known for certain from a sample"


def test_a_class_without_a_test_example_counts_nothing_in_the_score_and_in_its_interval() -> None:
    truth = np.eye(4, dtype=np.uint8)[np.arange(300) % 3]
    low, high = intervals.interval("f1", {"truth": truth, "predicted": truth}, contract(4, "macro"))
    assert high == pytest.approx(0.75)
    assert low < 0.75


@pytest.mark.parametrize(("name", "scorer"), [("chrf", CHRF(word_order=2)), ("ter", TER())], ids=["chrf", "ter"])
def test_chrf_and_ter_of_sums_are_sacrebleus(name: str, scorer: Any) -> None:
    for outputs in (OUTPUTS, REFERENCES, ["", "", "", "", "x"], ["x y", "z", "w", "v", "u"]):
        theirs = scorer.corpus_score(outputs, [REFERENCES]).score
        counts = {name: np.array(scorer._extract_corpus_statistics(outputs, [REFERENCES]), dtype=float)}
        sums = statistics.summands(name, counts).sum(axis=0)
        assert float(statistics.score(name, sums, {})) == pytest.approx(theirs, abs=1e-9)
        low, high = intervals.interval(name, counts, {})
        assert 0 <= low <= theirs + 1e-9
        assert high >= theirs - 1e-9


@pytest.mark.parametrize(
    ("metric", "count", "low", "high", "tells"),
    [
        ("f1", 12, 0.41, 0.87, False), ("f1", 500, 0.80, 0.84, True), ("f1", 29, 0.80, 0.84, False),
        ("bleu", 100, 10.0, 35.0, False), ("bleu", 1000, 20.0, 24.0, True),
        ("perplexity", 133, 60.0, 66.0, True), ("perplexity", 133, 60.0, 80.0, False),
    ],
)  # fmt: skip
def test_a_split_that_is_too_small_to_tell_says_so(
    metric: str, count: int, low: float, high: float, tells: bool
) -> None:
    said = intervals.doubt(metric, count, low, high)
    assert (said is None) is tells
    if said is not None:
        assert f"{count} examples" in said
        assert metric in said


@pytest.mark.slow
def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    """A few of the cells that `benchmarks/intervals.py` counts in full."""
    simulated = benchmark()
    wanted = ("f1 macro rare", "f1 macro balanced n=399", "f1 macro balanced n=6", "accuracy accuracy", "perplexity")
    found = list(simulated.cells(0.2, wanted))
    assert len(found) > 20
    assert min(one.coverage for one in found) >= 0.87
    assert 0.94 <= np.mean([one.coverage for one in found]) <= 0.99


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_intervals_hold_the_truth_for_all_metrics_from_5_to_5000_examples_and_2_to_400_classes() -> None:
    simulated = benchmark()
    said = simulated.summary(list(simulated.cells()))
    assert said["least"] >= 0.89
    assert 0.945 <= said["mean"] <= 0.975
    assert said["within 0.93 and 0.985"] >= 0.85
