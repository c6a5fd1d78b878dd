"""Scores of resamples are the scores; equal trials are tied, better ones win; a paired test sees what it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from hpsearch.metrics import intervals, statistics
from hpsearch.metrics import ties as ties_module
from hpsearch.metrics.metric import Examples

REFERENCES = ["the cat sat on the mat", "a file was not found", "save all changes now", "open", "close the window"]


@pytest.mark.parametrize(
    "outputs",
    [
        REFERENCES,
        ["the cat sat on a mat", "file not found", "save changes", "open", "shut the window"],
        ["the cat", "a", "all now", "open", "the"],
        ["x y z w v", "b", "c", "d", "e"],
        ["", "", "", "", ""],
        ["the", "a", "save", "open", "close"],
    ],
)
def test_bleu_of_sums_is_sacrebleus(outputs: list[str]) -> None:
    metric = BLEU()
    theirs = metric.corpus_score(outputs, [REFERENCES]).score
    counts = np.array(metric._extract_corpus_statistics(outputs, [REFERENCES]))
    sums = statistics.summands("bleu", {"bleu": counts}).sum(axis=0)
    assert float(statistics.score("bleu", sums, {})) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("outputs", [["红 蓝", "大 小"], ["红 蓝", "大 大"], ["红", "小"], ["x", "y"]])
def test_bleu_of_references_without_four_words_is_sacrebleus_with_its_effective_order(outputs: list[str]) -> None:
    references = ["红 蓝", "大 小"]
    metric = BLEU(tokenize="zh", effective_order=True)
    theirs = metric.corpus_score(outputs, [references]).score
    counts = np.array(metric._extract_corpus_statistics(outputs, [references]))
    sums = statistics.summands("bleu", {"bleu": counts}).sum(axis=0)
    contract = {"signature": str(metric.get_signature())}
    assert float(statistics.score("bleu", sums, contract)) == pytest.approx(theirs, abs=1e-9)
    assert (theirs > 99.999) is (outputs == references)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "binary"])
def test_label_scores_of_sums_are_scikit_learns(average: str) -> None:
    rng = np.random.default_rng(0)
    truth, predicted = (np.eye(4, dtype=np.int64)[rng.integers(0, most, 200)] for most in (4, 3))
    contract: dict[str, Any] = {"average": average, "labels": list("abcd")}
    if average == "binary":
        contract["positive_label"] = "b"
    for name, theirs in {"f1": f1_score, "precision": precision_score, "recall": recall_score}.items():
        sums = statistics.summands(name, {"truth": truth, "predicted": predicted}).sum(axis=0)
        if average == "binary":
            expected = theirs(truth[:, 1], predicted[:, 1], zero_division=0)
        else:
            expected = theirs(truth, predicted, average=average, zero_division=0)
        assert float(statistics.score(name, sums, contract)) == pytest.approx(expected)
    sums = statistics.summands("accuracy", {"truth": truth, "predicted": predicted}).sum(axis=0)
    assert float(statistics.score("accuracy", sums, contract)) == pytest.approx(accuracy_score(truth, predicted))


def test_arrays_come_back_as_they_were_packed() -> None:
    arrays = {"nats": np.linspace(0, 9, 7), "tokens": np.arange(7), "bytes": np.arange(7) * 4}
    again = statistics.unpack(statistics.pack(arrays))
    assert all((again[name] == array).all() for name, array in arrays.items())


def likelihoods(rng: np.random.Generator, shifts: list[float], count: int = 120) -> list[Examples]:
    """Trials that differ in mean loss per document by `shifts`, each in units of a difference's standard error."""
    tokens = rng.integers(20, 60, count)
    hard = rng.normal(3.0, 0.4, count)
    noise = 0.2
    # A document of `tokens` tokens weighs so much: the standard error of the difference of two weighted means.
    error = noise * np.sqrt(2 * (tokens**2).sum()) / tokens.sum()
    return [
        {"nats": tokens * (hard + rng.normal(0, noise, count) + shift * error), "tokens": tokens, "bytes": 4 * tokens}
        for shift in shifts
    ]


def ties(trials: list[Examples], resamples: int = 400) -> tuple[np.ndarray, np.ndarray]:
    sums = [statistics.summands("perplexity", trial).sum(axis=0) for trial in trials]
    observed = np.array([statistics.score("perplexity", each, {}) for each in sums])
    resampled = ties_module.resample("perplexity", trials, {}, resamples=resamples)
    return observed, ties_module.tie_p_values(observed, resampled, len(trials[0]["nats"]), higher_is_better=False)


@pytest.mark.slow
@pytest.mark.parametrize("models", [2, 8])
def test_equal_models_are_tied_in_at_least_93_of_100_draws(models: int) -> None:
    rng = np.random.default_rng(models)
    tied = [bool((ties(likelihoods(rng, [0.0] * models))[1] > 0.05).all()) for _ in range(300)]
    assert np.mean(tied) >= 0.93
    assert np.mean(tied) < 1.0, "a test that never says 'different' is none"


def test_a_model_better_by_one_standard_error_is_first_in_at_least_80_of_100_draws() -> None:
    rng = np.random.default_rng(3)
    first = [int(np.argmin(ties(likelihoods(rng, [0.0, -1.0]), resamples=2)[0])) == 1 for _ in range(300)]
    assert np.mean(first) >= 0.80


def test_a_model_better_by_five_standard_errors_stands_alone_among_ten() -> None:
    rng = np.random.default_rng(4)
    alone = []
    for _ in range(50):
        _, p_values = ties(likelihoods(rng, [-7.0] + [0.0] * 9))
        alone.append(bool((p_values[1:] <= 0.05).all()))
    assert np.mean(alone) >= 0.95


def test_the_same_answers_are_tied_whatever_the_noise() -> None:
    (trial,) = likelihoods(np.random.default_rng(5), [0.0])
    observed, p_values = ties([trial, dict(trial), dict(trial)])
    assert len(set(observed)) == 1
    assert (p_values == 1).all()
    assert (ties([trial])[1] == 1).all()


def test_pairing_sees_a_difference_that_intervals_hide() -> None:
    better, worse = likelihoods(np.random.default_rng(6), [-3.5, 0.0])
    low, high = intervals.interval("perplexity", better, {})
    observed, p_values = ties([better, worse])
    assert low < observed[1] < high, "the intervals overlap"
    assert p_values[1] < 0.05
    resampled = ties_module.resample("perplexity", [better, worse], {})
    gap_low, gap_high, p_value = ties_module.difference(observed, resampled, 120)
    assert gap_low < observed[0] - observed[1] < gap_high < 0
    assert p_value < 0.05


def test_blocks_of_a_large_test_split_give_the_same_interval() -> None:
    (trial,) = likelihoods(np.random.default_rng(7), [0.0], count=50_000)
    low, high = intervals.interval("perplexity", trial, {})
    losses, tokens = trial["nats"], trial["tokens"]
    mean = losses.sum() / tokens.sum()
    error = np.sqrt(((losses - mean * tokens) ** 2).sum()) / tokens.sum()
    assert np.log(high / low) == pytest.approx(2 * 1.96 * error, rel=0.08)


@pytest.mark.parametrize("seed", range(5))
def test_whoever_is_clearly_worse_by_intervals_is_worse_by_the_paired_test(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = likelihoods(rng, [*rng.normal(0, 1.0, 20), *rng.normal(60, 30, 20)])
    observed, p_values = ties(trials)
    bounds = np.array([intervals.interval("perplexity", trial, {}) for trial in trials])
    upper = ties_module.clearly_worse(observed, bounds[:, 0], bounds[:, 1], higher_is_better=False)
    assert (p_values[upper <= 0.05] <= 0.05).all()
    assert (upper[p_values > 0.05] > 0.05).all()
    assert (upper <= 0.05).sum() > 5, "and there are some to be found so"
    assert upper[np.argmin(observed)] == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_of_very_many_trials_none_is_worse_that_the_paired_test_ties(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = likelihoods(np.random.default_rng(seed), [*np.zeros(20), *np.linspace(3, 12, 20)])
    _, exact = ties(trials, resamples=2000)
    monkeypatch.setattr(ties_module, "MOST_PAIRED", 10)
    _, quick = ties(trials, resamples=2000)
    assert (quick[exact > 0.05] > 0.05).all()
    assert (quick <= 0.05).sum() >= 0.7 * (exact <= 0.05).sum() > 5
