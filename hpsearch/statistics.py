"""From per-example test statistics to scores, intervals, paired tests and ties. Pure functions over arrays.

Every score that ranks is a function of sums over test examples: of losses and tokens, of BLEU's n-gram counts, of right
and wrong labels. So a resample of the test split costs a matrix product, and no text is decoded or read again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Examples = Mapping[str, NDArray[Any]]
"""Arrays whose first axis is test examples: `nats`, `tokens` and `bytes`; or `bleu` of shape (examples, 10): length of
the output and of the reference, then matching and all n-grams of order 1 to 4; or `truth` and `predicted` of shape
(examples, labels), 1 where an example has a label."""

ZERO_DIVISION = 0.0
"""Precision, recall and F1 of a class that nothing was predicted as, or that does not occur."""
RESAMPLES = 2000
MOST_PAIRED = 1000
"""Trials of which each is compared with each, within seconds."""
_NORMAL_95 = 1.959964
_MOST_BLOCKS = 2000
"""Test splits with more examples than this are resampled in so many random blocks of examples: the same spread, and a
cost that no longer grows."""
_LABEL_METRICS = ("f1", "f1_macro", "f1_micro", "f1_weighted", "precision", "recall", "accuracy")


def pack(examples: Examples) -> bytes:
    """The arrays as a compressed npz file, to be kept with a trial."""
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **examples)
    return stream.getvalue()


def unpack(content: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def metrics_of(examples: Examples) -> tuple[str, ...]:
    """The metrics that these arrays can be summed up to."""
    if "nats" in examples:
        return ("perplexity", "bits_per_byte")
    return ("bleu",) if "bleu" in examples else _LABEL_METRICS


def summands(metric: str, examples: Examples) -> Floats:
    """What each example adds: shape (examples, columns). `score` takes sums of these over examples."""
    if metric == "perplexity":
        return np.stack([examples["nats"], examples["tokens"]], axis=1).astype(np.float64)
    if metric == "bits_per_byte":
        return np.stack([examples["nats"] / math.log(2), examples["bytes"]], axis=1).astype(np.float64)
    if metric == "bleu":
        return np.asarray(examples["bleu"], dtype=np.float64)
    truth, predicted = (np.asarray(examples[name], dtype=np.float64) for name in ("truth", "predicted"))
    if metric == "accuracy":
        right = (truth == predicted).all(axis=1).astype(np.float64)
        return np.stack([right, np.ones_like(right)], axis=1)
    return np.concatenate([truth * predicted, predicted, truth], axis=1)


def score(metric: str, sums: Floats, contract: Mapping[str, Any]) -> Floats:
    """Scores of sums of shape (..., columns). F1 takes its averaging and labels from the score's contract."""
    if metric == "perplexity":
        return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))
    if metric in ("bits_per_byte", "accuracy"):
        return np.asarray(sums[..., 0] / sums[..., 1])
    if metric == "bleu":
        return _bleu(sums)
    labels = contract["labels"]
    hits, guesses, actual = (sums[..., part * len(labels) : (part + 1) * len(labels)] for part in range(3))
    positive = contract.get("positive_label")
    index = labels.index(positive) if positive is not None else None
    return _label_score(metric, contract["average"], hits, guesses, actual, index)


def interval(metric: str, examples: Examples, contract: Mapping[str, Any]) -> tuple[float, float]:
    """95 % percentile bootstrap interval over test examples.

    Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    (resampled,) = resample(metric, [examples], contract)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def resample(
    metric: str, trials: list[Examples], contract: Mapping[str, Any], *, resamples: int = RESAMPLES, seed: int = 0
) -> Floats:
    """Scores on resampled test splits, the same resamples for all trials: shape (trials, resamples)."""
    first = summands(metric, trials[0])
    block_of, drawn = _drawn(len(first), resamples, seed)
    blocks = drawn.shape[1]
    scores = []
    for trial in trials:
        added = first if trial is trials[0] else summands(metric, trial)
        if blocks < len(first):
            added = np.stack([np.bincount(block_of, column, blocks) for column in added.T], axis=1)
        scores.append(score(metric, drawn @ added, contract))
    return np.stack(scores)


@lru_cache(maxsize=1)
def _drawn(count: int, resamples: int, seed: int) -> tuple[NDArray[np.int64], Floats]:
    """The block of each example, and how often each resample holds each block: the same for all metrics of a trial."""
    rng = np.random.default_rng(seed)
    blocks = min(count, _MOST_BLOCKS)
    block_of = np.argsort(rng.permutation(count)) % blocks
    return block_of, rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples).astype(np.float64)


def tie_p_values(
    observed: Floats, resampled: Floats, examples: int, *, higher_is_better: bool, compared: int | None = None
) -> Floats:
    """For each trial, the p-value of "as good as the best one, which was picked for being best". Shape (trials,).

    `observed` has shape (trials,), `resampled` (trials, resamples); `examples` is the size of the test split.

    A paired bootstrap (Koehn, EMNLP 2004; as sacrebleu's, the spread of resampled differences around the observed
    ones stands for chance) of studentised differences. The winner was chosen among many, so a difference from it is
    held against the largest difference between any two trials in each resample: a single-step max-T correction (Romano
    & Wolf, Econometrica 2005), of which Tukey's range test is the normal case. Equal trials are all tied in 95 of 100
    test splits, however many there are. The pairs of more than MOST_PAIRED trials are not formed: Bonferroni's
    correction for their number takes the place of the largest difference, and ties some more of them. Of so many,
    `compared` in all, some may be left out; the best one may not.
    """
    compared = compared or len(observed)
    errors = resampled - observed[:, None]
    winner = int(np.argmax(observed) if higher_is_better else np.argmin(observed))
    if compared > MOST_PAIRED:
        return _bonferroni(observed, errors, winner, examples, compared)
    covariance = np.cov(errors) if len(observed) > 1 else np.zeros((1, 1))
    variance = np.diag(covariance)
    spread = np.sqrt(np.maximum(variance[:, None] + variance[None, :] - 2 * covariance, 0))
    # Trials with the same answers differ by nothing, rounding aside.
    spread[spread <= 1e-9 * np.abs(observed).max(initial=1e-300)] = np.inf
    largest = np.zeros(resampled.shape[1])
    for index in range(len(observed) - 1):
        differences = np.abs(errors[index + 1 :] - errors[index]) / spread[index, index + 1 :, None]
        largest = np.maximum(largest, differences.max(axis=0))
    # Resampling takes the spread of so many examples for the truth; Student's t does not (Fisher's expansion of it).
    largest *= np.sqrt(examples / max(1, examples - 1))
    largest += (largest**3 + largest) / (4 * max(1, examples - 1))
    distance = np.abs(observed - observed[winner]) / spread[winner]
    return np.asarray((1 + (largest[None, :] >= distance[:, None]).sum(axis=1)) / (1 + len(largest)))


def _bonferroni(observed: Floats, errors: Floats, winner: int, examples: int, compared: int) -> Floats:
    from scipy.special import stdtr

    spread = (errors - errors[winner]).std(axis=1, ddof=1) * math.sqrt(examples / max(1, examples - 1))
    spread[spread <= 1e-9 * np.abs(observed).max(initial=1e-300)] = np.inf
    distance = np.abs(observed - observed[winner]) / spread
    pairs = compared * (compared - 1) / 2
    return np.asarray(np.minimum(1.0, pairs * 2 * stdtr(max(1, examples - 1), -distance)))


def clearly_worse(observed: Floats, low: Floats, high: Floats, *, higher_is_better: bool) -> Floats:
    """For each trial, an upper bound of its p-value in `tie_p_values`, from scores and 95 % intervals alone. (trials,)

    For studies so large that comparing each with each would take minutes. The bound takes the errors of two trials to
    cancel each other, as those of paired ones never do, and corrects for all pairs of trials by Bonferroni: whoever is
    worse by it is worse. The others are then tested among themselves, as in the step-down test of Romano & Wolf (2005),
    which keeps the error rate.
    """
    winner = int(np.argmax(observed) if higher_is_better else np.argmin(observed))
    deviation = (high - low) / (2 * _NORMAL_95)
    spread = np.maximum(deviation + deviation[winner], 1e-300)
    distance = np.abs(observed - observed[winner]) / spread
    pairs = len(observed) * (len(observed) - 1) / 2
    return np.minimum(1.0, pairs * np.array([math.erfc(value / math.sqrt(2)) for value in distance]))


def difference(observed: Floats, resampled: Floats) -> tuple[float, float, float]:
    """95 % interval of the first trial's score minus the second's, and its two-sided p-value (paired bootstrap).

    `observed` has shape (2,), `resampled` (2, resamples). Koehn, EMNLP 2004; the p-value as sacrebleu counts it.
    """
    differences = resampled[0] - resampled[1]
    low, high = np.percentile(differences, [2.5, 97.5])
    gap = observed[0] - observed[1]
    as_far = np.abs(differences - differences.mean()) >= abs(gap)
    return float(low), float(high), float((1 + as_far.sum()) / (1 + len(differences)))


def _bleu(sums: Floats) -> Floats:
    """Corpus BLEU with exponential smoothing, as sacrebleu's default (Post, WMT 2018; Chen & Cherry, WMT 2014)."""
    length, reference = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2:6], sums[..., 6:10]
    # The k-th order without a match counts 1 / 2^k matches.
    nothing = (correct == 0) & (total > 0)
    smoothed = np.where(nothing, 0.5 ** np.cumsum(nothing, axis=-1), correct)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(smoothed / total).mean(axis=-1)
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
        values = 100 * brevity * np.exp(logs)
    # sacrebleu gives 0 where no word matches at all, and where an order has no n-grams.
    return np.asarray(np.where((correct.sum(axis=-1) > 0) & (total > 0).all(axis=-1), values, 0.0))


def _label_score(
    metric: str, average: str, hits: Floats, guesses: Floats, actual: Floats, positive: int | None
) -> Floats:
    weights = actual
    if average == "micro":
        hits, guesses, actual = (counts.sum(axis=-1, keepdims=True) for counts in (hits, guesses, actual))
    upper = hits if metric in ("precision", "recall") else 2 * hits
    lower = {"precision": guesses, "recall": actual}.get(metric, guesses + actual)
    each = np.divide(upper, lower, out=np.full(lower.shape, ZERO_DIVISION), where=lower > 0)
    if average == "binary":
        return np.asarray(each[..., positive])
    if average == "weighted":
        return np.asarray((each * weights).sum(axis=-1) / weights.sum(axis=-1))
    return np.asarray(each.mean(axis=-1))
