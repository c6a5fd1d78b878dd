"""From per-example test statistics to scores. Pure functions over arrays.

Every score is a function of sums over test examples: of losses and tokens, of n-gram counts, of right and wrong labels.
So what an example adds is known without decoding or reading text again; see `intervals` and `ties`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.metrics.metric import Examples, Floats, Metric

ZERO_DIVISION = 0.0
"""Precision, recall and F1 of a class that nothing was predicted as, or that does not occur."""


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
    return tuple(name for name, metric in METRICS.items() if set(metric.needs) <= set(examples))


def summands(metric: str, examples: Examples) -> Floats:
    """What each example adds: shape (examples, columns). `score` takes sums of these over examples."""
    return METRICS[metric].sums(examples)


def score(metric: str, sums: Floats, contract: Mapping[str, Any]) -> Floats:
    """Scores of sums of shape (..., columns)."""
    return METRICS[metric].score_from_sums(sums, contract)


def ratio(upper: str, lower: str, unit: float = 1.0) -> Callable[[Examples], Floats]:
    """Sums of a metric that is a ratio of two: `upper`, in such units, and `lower`."""
    return lambda examples: np.stack([examples[upper] / unit, examples[lower]], axis=1).astype(np.float64)


def mean_of(name: str) -> Callable[[Examples], Floats]:
    """Sums of a metric that is the mean of what each example scores, in an array of this name."""
    return lambda examples: np.stack([examples[name], np.ones(len(examples[name]))], axis=1).astype(np.float64)


def as_kept(name: str) -> Callable[[Examples], Floats]:
    """Sums that are kept as they are, in an array of this name."""
    return lambda examples: np.asarray(examples[name], dtype=np.float64)


def of_sums(factor: float = 1.0) -> Callable[[Floats, Mapping[str, Any]], Floats]:
    """The score of a ratio."""
    return lambda sums, contract: np.asarray(factor * sums[..., 0] / sums[..., 1])


def _perplexity(sums: Floats, contract: Mapping[str, Any]) -> Floats:
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))


def _right(examples: Examples) -> Floats:
    truth, predicted = (np.asarray(examples[name], dtype=np.float64) for name in ("truth", "predicted"))
    right = (truth == predicted).all(axis=1).astype(np.float64)
    return np.stack([right, np.ones_like(right)], axis=1)


def _label_counts(examples: Examples) -> Floats:
    """Of each label: hits, predictions, true labels."""
    truth, predicted = (np.asarray(examples[name], dtype=np.float64) for name in ("truth", "predicted"))
    return np.concatenate([truth * predicted, predicted, truth], axis=1)


def _of_labels(metric: str) -> Callable[[Floats, Mapping[str, Any]], Floats]:
    """A score of label counts; its averaging and labels come from the contract."""

    def score_from_sums(sums: Floats, contract: Mapping[str, Any]) -> Floats:
        labels = contract["labels"]
        hits, guesses, actual = (sums[..., part * len(labels) : (part + 1) * len(labels)] for part in range(3))
        positive = contract.get("positive_label")
        index = labels.index(positive) if positive is not None else None
        return _label_score(metric, contract["average"], hits, guesses, actual, index)

    return score_from_sums


def _bleu(sums: Floats, contract: Mapping[str, Any]) -> Floats:
    """Corpus BLEU with exponential smoothing, as sacrebleu's default (Post, WMT 2018; Chen & Cherry, WMT 2014).

    Columns: length of the output and of the reference, then matching and all n-grams of order 1 to 4. With sacrebleu's
    effective order, as the contract's signature says, orders without n-grams are left out of the mean.
    """
    only_there = "eff:yes" in str(contract.get("signature", ""))
    length, reference = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2:6], sums[..., 6:10]
    counts = total > 0
    # The k-th order without a match counts 1 / 2^k matches.
    nothing = (correct == 0) & counts
    smoothed = np.where(nothing, 0.5 ** np.cumsum(nothing, axis=-1), correct)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(counts, np.log(smoothed / total), 0.0).sum(axis=-1) / np.maximum(counts.sum(axis=-1), 1)
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
        values = 100 * brevity * np.exp(logs)
    # sacrebleu gives 0 where no word matches at all, and where an order has no n-grams.
    is_there = counts.any(axis=-1) if only_there else counts.all(axis=-1)
    return np.asarray(np.where((correct.sum(axis=-1) > 0) & is_there, values, 0.0))


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


def _chrf(sums: Floats, contract: Mapping[str, Any]) -> Floats:
    """Corpus chrF with beta 2 (Popovic, WMT 2015), as sacrebleu's: n-grams of outputs, of references, and in both."""
    output, reference, matches = (sums[..., part::3] for part in range(3))
    there = (output > 0) & (reference > 0)
    orders = np.maximum(there.sum(axis=-1), 1)
    precision, recall = (
        np.divide(matches, part, out=np.zeros(part.shape), where=there).sum(axis=-1) / orders
        for part in (output, reference)
    )
    lower = 4 * precision + recall
    return np.asarray(np.divide(500 * precision * recall, lower, out=np.zeros(lower.shape), where=lower > 0))


def _label_metric(name: str) -> Metric:
    return Metric(
        name=name,
        higher_is_better=True,
        digits=3,
        needs=("truth", "predicted"),
        sums=_label_counts,
        score_from_sums=_of_labels(name),
        top=1.0,
        estimate="labels",
    )


def _mean_metric(name: str) -> Metric:
    return Metric(
        name=name,
        higher_is_better=True,
        digits=3,
        needs=(name,),
        sums=mean_of(name),
        score_from_sums=of_sums(),
        top=1.0,
    )


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="perplexity",
            higher_is_better=False,
            needs=("nats", "tokens"),
            sums=ratio("nats", "tokens"),
            score_from_sums=_perplexity,
            estimate="log",
        ),
        Metric(
            name="bits_per_byte",
            higher_is_better=False,
            digits=3,
            needs=("nats", "bytes"),
            sums=ratio("nats", "bytes", math.log(2)),
            score_from_sums=of_sums(),
        ),
        *map(_mean_metric, ("rouge_l", "token_f1", "exact_match")),
        Metric(
            name="bleu",
            higher_is_better=True,
            needs=("bleu",),
            sums=as_kept("bleu"),
            score_from_sums=_bleu,
            top=100.0,
            unit=100.0,
        ),
        Metric(
            name="chrf",
            higher_is_better=True,
            needs=("chrf",),
            sums=as_kept("chrf"),
            score_from_sums=_chrf,
            top=100.0,
            unit=100.0,
        ),
        Metric(
            name="ter",
            higher_is_better=False,
            needs=("ter",),
            sums=as_kept("ter"),
            score_from_sums=of_sums(100.0),
            unit=100.0,
        ),
        *map(_label_metric, ("f1", "f1_macro", "f1_micro", "f1_weighted", "precision", "recall")),
        Metric(
            name="accuracy",
            higher_is_better=True,
            digits=3,
            needs=("truth", "predicted"),
            sums=_right,
            score_from_sums=of_sums(),
            top=1.0,
            estimate="labels",
        ),
    )
}
"""Every metric, by the name that scores carry. A new one is added here, or by the task that has it."""
BUILT_IN = frozenset(METRICS)
