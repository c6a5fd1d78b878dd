"""From per-example test statistics to scores. Pure functions over arrays.

Every score is a function of sums over test examples: of losses and tokens, of n-gram counts, of right and wrong labels.
So what an example adds is known without decoding or reading text again; see `intervals` and `ties`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
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
LABEL_METRICS = ("f1", "f1_macro", "f1_micro", "f1_weighted", "precision", "recall", "accuracy")


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
    return ("bleu",) if "bleu" in examples else LABEL_METRICS


def summands(metric: str, examples: Examples) -> Floats:
    """What each example adds: shape (examples, columns). `score` takes sums of these over examples."""
    if metric == "perplexity":
        return np.stack([examples["nats"], examples["tokens"]], axis=1).astype(np.float64)
    if metric == "bits_per_byte":
        return np.stack([examples["nats"] / math.log(2), examples["bytes"]], axis=1).astype(np.float64)
    if metric in ("bleu", "chrf", "ter"):
        return np.asarray(examples[metric], dtype=np.float64)
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
        return _bleu(sums, only_there="eff:yes" in str(contract.get("signature", "")))
    if metric == "chrf":
        return _chrf(sums)
    if metric == "ter":
        return np.asarray(100 * sums[..., 0] / sums[..., 1])
    labels = contract["labels"]
    hits, guesses, actual = (sums[..., part * len(labels) : (part + 1) * len(labels)] for part in range(3))
    positive = contract.get("positive_label")
    index = labels.index(positive) if positive is not None else None
    return _label_score(metric, contract["average"], hits, guesses, actual, index)


def _bleu(sums: Floats, *, only_there: bool) -> Floats:
    """Corpus BLEU with exponential smoothing, as sacrebleu's default (Post, WMT 2018; Chen & Cherry, WMT 2014).

    With `only_there`, sacrebleu's effective order, orders without n-grams are left out of the mean.
    """
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


def _chrf(sums: Floats) -> Floats:
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
