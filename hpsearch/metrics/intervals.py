"""95 % intervals of test scores, right for rare classes, perfect scores and few examples. Pure functions over arrays.

What is estimated: the score that the model would get on a test split of the same kind that is many times as large and
has this one's proportions of true labels. A class without a test example counts 0 in a macro average, in the score and
in the estimate alike: nothing is known of it. Everything comes from one number for each example: its influence, by how
much it moved the score. `benchmarks/intervals.py` shows the coverage by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.metrics.metric import Examples, Floats
from hpsearch.metrics.statistics import METRICS, score, summands

NORMAL_95 = 1.959964
_POOLED = 1.0
"""Examples of average quality that are added to each class, so that classes of one example show a spread, too."""
_POOLED_FOR_BIAS = 5.0
_DRAWS = 500
"""Simulated splits for the bias of an average over classes: their noise is a twentieth of the standard error."""
_FEW = 30
_WIDE = 0.2
"""A test split says little when it has fewer examples than that, or an interval wider than this part of the range (of a
perplexity: of the score)."""


def interval(metric: str, examples: Examples, contract: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of a score: around it, within the metric's range, with a width at 0 and 1, too."""
    added = summands(metric, examples)
    value = float(score(metric, added.sum(axis=0), contract))
    kind = METRICS[metric]
    if kind.estimate == "labels":
        low, high = _label_interval(value, _Ratios(metric, examples, contract))
    elif kind.estimate == "log":
        # The logarithm of a perplexity is a mean loss, whose errors are nearer to normal.
        logs = partial(_log_score, metric)
        low, high = _around(math.log(value), _jackknife(logs, added, contract), added, top=math.inf, seen=True)
        low, high = math.exp(low), math.exp(min(high, 700.0))
    else:
        influences = _jackknife(kind.score_from_sums, added, contract) / kind.unit
        top = kind.top / kind.unit
        low, high = _around(value / kind.unit, influences, added, top=top, seen=kind.is_relative)
        low, high = kind.unit * low, kind.unit * high
    return min(low, value), max(high, value)


def influence(metric: str, examples: Examples, contract: Mapping[str, Any]) -> Floats:
    """By how much each example moved the score; the sum of squares is the score's variance. Shape (examples,)."""
    kind = METRICS[metric]
    if kind.estimate == "labels":
        return _Ratios(metric, examples, contract).influence()
    return _jackknife(kind.score_from_sums, kind.sums(examples), contract)


def doubt(metric: str, count: int, low: float, high: float) -> str | None:
    """Why a score on n examples tells little, in a sentence; None where it tells enough."""
    kind = METRICS.get(metric)
    if kind is None:
        return None
    is_wide = high > (1 + _WIDE) * low if kind.is_relative else high - low > _WIDE * kind.unit
    if count >= _FEW and not is_wide:
        return None
    digits = kind.digits
    return (
        f"the test split has {count} examples, too few to tell: {metric} is {low:.{digits}f} to {high:.{digits}f} with "
        "95 % confidence, and models that differ by less than that may be equally good"
    )


def _score_interval(value: float, variance: float, examples: float, quantile: float, top: float) -> tuple[float, float]:
    """All p with |value - p| <= quantile * standard error at p, where the variance goes as p (1 - p / top).

    Wilson (JASA 1927) with the effective number of examples in place of their number, as for proportions in surveys
    (Korn & Graubard, Survey Methodology 1998). Where no variance can be seen, as at 0 and 1, that number is `examples`.
    """
    room = value * (1 - value / top)
    unseen = 0.1 / (examples + 1)
    effective = (room + unseen) / max(variance + unseen / examples, 1e-300)
    middle = value + quantile**2 / (2 * effective)
    half = quantile * math.sqrt(room / effective + (quantile / (2 * effective)) ** 2)
    whole = 1 + quantile**2 / (effective * top)
    return max(0.0, (middle - half) / whole), min(top, (middle + half) / whole)


def _around(value: float, influences: Floats, added: Floats, *, top: float, seen: bool) -> tuple[float, float]:
    """The score interval of a function of sums. As many degrees of freedom as examples of equal length, less one."""
    equal = _equal_weights(added[:, 1:].sum(axis=1))
    variance = float(np.square(influences).sum())
    if len(influences) < 2:
        # One example shows no spread: its score may be wrong by as much as it is.
        variance = value**2
    from scipy.special import stdtrit  # takes a moment, and nothing is scored at first

    quantile = float(stdtrit(max(1.0, equal - 1), 0.975))
    return _score_interval(value, variance, math.inf if seen else equal, quantile, top)


def _jackknife(
    score_from_sums: Callable[[Floats, Mapping[str, Any]], Floats], added: Floats, contract: Mapping[str, Any]
) -> Floats:
    """The score less that without each example (Tukey's jackknife; Efron & Stein, Annals of Statistics 1981)."""
    if len(added) < 2:
        return np.zeros(len(added))
    total = added.sum(axis=0)
    return np.asarray(score_from_sums(total, contract) - score_from_sums(total - added, contract))


def _log_score(metric: str, sums: Floats, contract: Mapping[str, Any]) -> Floats:
    return np.asarray(np.log(score(metric, sums, contract)))


def _equal_weights(weights: Floats) -> float:
    """How many examples of equal weight tell as much as these (Kish, Survey Sampling, 1965)."""
    return max(1.0, float(weights.sum() ** 2 / max(np.square(weights).sum(), 1e-300)))


def _label_interval(value: float, ratios: _Ratios) -> tuple[float, float]:
    """No Student's t: how much right and wrong answers vary follows from the score."""
    bias, spread = ratios.bias()
    # The bias is known roughly: as if it were anything from none to twice as much, evenly.
    variance = max(float(np.square(ratios.influence()).sum()), spread**2) + bias**2 / 3
    # Classes without an example count 0 in any case: an average over the others cannot reach 1.
    top = float(ratios.weights.sum()) or 1.0
    middle = min(top, max(0.0, value - bias))
    return _score_interval(middle, variance, ratios.equal_weights(), NORMAL_95, top)


class _Ratios:
    """A label metric as an average of ratios, one a class: `upper` over `lower`, both sums over examples."""

    def __init__(self, metric: str, examples: Examples, contract: Mapping[str, Any]) -> None:
        truth, predicted = (np.asarray(examples[name], dtype=np.float64) for name in ("truth", "predicted"))
        average = contract["average"]
        if average == "binary" and metric != "accuracy":
            index = contract["labels"].index(contract["positive_label"])
            truth, predicted = truth[:, [index]], predicted[:, [index]]
        hits = truth * predicted
        if metric == "accuracy":
            hits, truth = (truth == predicted).all(axis=1, keepdims=True).astype(np.float64), np.ones((len(truth), 1))
        elif average == "micro":
            hits, truth, predicted = (part.sum(axis=1, keepdims=True) for part in (hits, truth, predicted))
        # A ratio's upper part in hits, its lower part in guesses and in true labels.
        self.factors = {"precision": (1, 1, 0), "recall": (1, 0, 1), "accuracy": (1, 0, 1)}.get(metric, (2, 1, 1))
        self.hits, self.guesses, self.actual = hits.sum(axis=0), predicted.sum(axis=0), truth.sum(axis=0)
        self.upper = self.factors[0] * hits
        self.lower = {(1, 0, 1): truth, (1, 1, 0): predicted}.get(self.factors, predicted + truth)
        if self.factors == (1, 1, 0):
            # A class that was never predicted scores 0 because its examples were missed.
            self.lower = np.where(self.guesses > 0, predicted, truth)
        share = self.actual / max(1.0, self.actual.sum()) if average == "weighted" else 1 / truth.shape[1]
        # A class without an example counts 0, whatever is predicted.
        self.weights = np.where(self.actual > 0, share, 0.0)

    def influence(self) -> Floats:
        """The residuals of the ratios over their lower sums (linearisation; Cochran, Sampling Techniques, 1977, 6.4).

        A class of one example leaves no residual. So each ratio is drawn to that of all classes, as strata of one unit
        are pooled in surveys, and the residuals are scaled to the variance that they have where classes are alike.
        """
        lower = self.lower.sum(axis=0)
        used = (lower > 0) & (self.weights > 0)
        over = np.divide(1.0, lower, out=np.zeros_like(lower), where=used)
        size = lower**2 / np.maximum(np.einsum("ij,ij->j", self.lower, self.lower), 1e-300)
        average = self.upper[:, used].sum() / max(1.0, lower[used].sum())
        ratio = (size * self.upper.sum(axis=0) * over + _POOLED * average) / (size + _POOLED)
        scale = (size + _POOLED) / np.sqrt((size + _POOLED - 1) ** 2 + np.maximum(size - 1, 0) + 1e-12)
        weights = self.weights * scale * over
        return np.asarray(self.upper @ weights - self.lower @ (weights * ratio))

    def equal_weights(self) -> float:
        lower = self.lower.sum(axis=0)
        return _equal_weights(self.lower @ np.divide(self.weights, lower, out=np.zeros_like(lower), where=lower > 0))

    def bias(self) -> tuple[float, float]:
        """By how much an average over small classes is off, and its spread, in simulated splits.

        A ratio of small counts is off on average. A parametric bootstrap (Efron & Tibshirani, 1993, chapters 6.5 and
        10): a class's hits are binomial and what is wrongly taken for it is Poisson, at rates drawn to those of all.
        """
        there = self.actual > 0
        if len(there) == 1 or self.factors == (1, 0, 1) or not there.any():
            return 0.0, 0.0
        actual, hits = self.actual[there], self.hits[there]
        recall, false = (
            (part + _POOLED_FOR_BIAS * part.sum() / actual.sum()) / (actual + _POOLED_FOR_BIAS)
            for part in (hits, self.guesses[there] - hits)
        )
        rng, shape = np.random.default_rng(0), (_DRAWS, len(actual))
        simulated = self._average(rng.binomial(actual.astype(int), recall, shape), rng.poisson(actual * false, shape))
        return float(simulated.mean() - self._average(actual * recall, actual * false)), float(simulated.std())

    def _average(self, hits: NDArray[Any], false: NDArray[Any]) -> Floats:
        """The average of the ratios of classes that have examples, of these counts of shape (..., classes)."""
        there = self.actual > 0
        lower = self.factors[1] * (hits + false) + self.factors[2] * self.actual[there]
        ratios = np.divide(self.factors[0] * hits, lower, out=np.zeros(lower.shape), where=lower > 0)
        return np.asarray(ratios @ self.weights[there])
