"""Which of several trials are equally good on one test split: paired tests and ties. Pure functions over arrays.

Each trial's score is known with one number an example, its influence; a resample of the test split is a product of
these with how often it holds each example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.metrics.intervals import NORMAL_95, influence
from hpsearch.metrics.metric import Examples, Floats
from hpsearch.metrics.statistics import score, summands

RESAMPLES = 2000
MOST_PAIRED = 1000
"""Trials of which each is compared with each, within seconds."""
_MOST_BLOCKS = 2000
"""Test splits with more examples than this are resampled in so many random blocks of examples: the same spread, and a
cost that no longer grows."""


def resample(
    metric: str, trials: list[Examples], contract: Mapping[str, Any], *, resamples: int = RESAMPLES, seed: int = 0
) -> Floats:
    """Scores on resampled test splits, the same resamples for all trials: shape (trials, resamples).

    To first order: the score, plus the influences of examples that were drawn too often, less those of examples that
    were left out (multiplier bootstrap; van der Vaart & Wellner, Weak Convergence and Empirical Processes, 1996,
    section 2.9). An exact resample would lose classes of few examples, and call equal models of rare classes different.
    """
    influences = [influence(metric, trial, contract) for trial in trials]
    values = [float(score(metric, summands(metric, trial).sum(axis=0), contract)) for trial in trials]
    block_of, drawn = _drawn(len(influences[0]), resamples, seed)
    blocks = np.stack([np.bincount(block_of, each, drawn.shape[1]) for each in influences])
    return np.asarray(np.array(values)[:, None] + blocks @ (drawn - 1).T)


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
    deviation = (high - low) / (2 * NORMAL_95)
    spread = np.maximum(deviation + deviation[winner], 1e-300)
    distance = np.abs(observed - observed[winner]) / spread
    pairs = len(observed) * (len(observed) - 1) / 2
    return np.minimum(1.0, pairs * np.array([math.erfc(value / math.sqrt(2)) for value in distance]))


def difference(observed: Floats, resampled: Floats, examples: int) -> tuple[float, float, float]:
    """95 % interval of the first trial's score minus the second's, and its two-sided p-value (paired Student's t).

    `observed` has shape (2,), `resampled` (2, resamples); `examples` is the size of the test split.
    """
    from scipy.special import stdtr, stdtrit  # whoever compares nothing does without it

    gap, freedom = float(observed[0] - observed[1]), max(1, examples - 1)
    spread = float((resampled[0] - resampled[1]).std()) * math.sqrt(examples / freedom)
    # Trials with the same answers differ by nothing, rounding aside.
    if spread <= 1e-9 * np.abs(observed).max(initial=1e-300):
        return gap, gap, 1.0
    half = float(stdtrit(freedom, 0.975)) * spread
    return gap - half, gap + half, float(2 * stdtr(freedom, -abs(gap) / spread))
