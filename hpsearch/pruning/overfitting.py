"""Is this run overfitting? Pure functions over one run's training and validation losses.

Knows nothing of Optuna, Ray, torch or SQL. The stop rule joins a Mann-Kendall test for a rising trend
(Mann, Econometrica 13, 1945; Kendall, Rank Correlation Methods, 1975) over the last validation losses with plain
patience, after a warm-up. Validation loss says *when* to stop; the trend of the training loss says *why*:
still falling means overfitting, flat a plateau, rising divergence. The rule depends on the order of losses only,
so it is the same in nats, bits or any other unit.

Under a schedule that decays, many a run that stands still gains once more when the learning rate comes down. Until it
has, only overfitting ends a run: validation loss that rises while training loss falls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from hpsearch.spec.sections import TARGET_EVALUATIONS, OverfitRule


class Losses(Protocol):
    """One evaluation of a run: mean training loss since the last one, and validation loss, in nats."""

    @property
    def train_loss(self) -> float: ...

    @property
    def valid_loss(self) -> float: ...


class Verdict(StrEnum):
    TOO_EARLY = "too early"
    HEALTHY = "healthy"
    PLATEAU = "plateau"
    OVERFITTING = "overfitting"
    DIVERGING = "diverging"


SETTLED = 0.1
"""Part of the learning rate's decay that may be left when a run that stands still is ended."""
EXPLODED_FOR = 3
"""Evaluations in a row whose training loss must lie above the limit: a single peak often heals."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The numbers that led to a verdict."""

    rule: str
    """What decided: `too early`, `falling`, `no trend`, `decay to come`, `rising trend`, `patience`, `non-finite` or
    `exploding`."""
    evaluations: int
    best_evaluation: int | None
    best_valid_loss: float | None
    last_valid_loss: float | None
    last_train_loss: float | None
    since_best: int
    valid_trend_z: float | None
    """Mann-Kendall z of the validation loss over the window; positive when it rises."""
    train_trend_z: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a number that is not finite becomes its name."""
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict with its evidence."""

    verdict: Verdict
    evidence: Evidence

    @property
    def stops(self) -> bool:
        """True when the run should end now."""
        return self.verdict in (Verdict.OVERFITTING, Verdict.PLATEAU, Verdict.DIVERGING)


def judge(
    curve: Sequence[Losses],
    total_evaluations: int,
    rule: OverfitRule,
    *,
    evaluations_per_epoch: int = 1,
    decay_to_come: float = 0.0,
) -> Judgement:
    """The verdict on a run after `len(curve)` of `total_evaluations` evaluations.

    Training loss falls in steps, at the ends of epochs, when the model meets what it has seen before; so its trend
    compares evaluations at the same place within their epochs only.

    `decay_to_come` is the part of the learning rate's decay that the schedule has not made yet: 1 before it begins, 0
    at its end and where it never decays. A run that would end for anything but overfitting goes on while it is above
    `SETTLED`.

    A loss that is not finite, or a training loss that has exploded, is `diverging` at once; every other stop waits for
    the warm-up. An empty curve is `too early`.
    """
    valid = [point.valid_loss for point in curve]
    train = [point.train_loss for point in curve]
    best = best_evaluation(curve)
    finite = all(math.isfinite(loss) for loss in (*valid, *train))
    block = max(1, total_evaluations // TARGET_EVALUATIONS)
    window = rule.window * block
    rising = mann_kendall_z(_means(valid[-window:], block)) if finite and len(valid) >= window else None
    since_best = len(valid) - best if best is not None else len(valid)
    # What the training loss did since validation was at its best, or over the window or two epochs if that is longer.
    reach = max(window, since_best + 1, 2 * evaluations_per_epoch + 1)
    training = mann_kendall_z(train[-reach:], period=evaluations_per_epoch) if finite and len(train) > 1 else None

    def judgement(verdict: Verdict, reason: str) -> Judgement:
        evidence = Evidence(
            rule=reason,
            evaluations=len(curve),
            best_evaluation=best,
            best_valid_loss=valid[best - 1] if best is not None else None,
            last_valid_loss=valid[-1] if valid else None,
            last_train_loss=train[-1] if train else None,
            since_best=since_best,
            valid_trend_z=rising,
            train_trend_z=training,
        )
        return Judgement(verdict=verdict, evidence=evidence)

    if not finite:
        return judgement(Verdict.DIVERGING, "non-finite")
    if len(train) > EXPLODED_FOR and min(train[-EXPLODED_FOR:]) > rule.explode_factor * train[0]:
        return judgement(Verdict.DIVERGING, "exploding")
    if len(curve) < max(math.ceil(rule.warmup * total_evaluations), 1):
        return judgement(Verdict.TOO_EARLY, "too early")
    cause, is_settled = _cause(training, rule), decay_to_come <= SETTLED
    is_rising, is_spent = rising is not None and rising > rule.z, since_best >= rule.patience * block
    if is_rising and (is_settled or cause is Verdict.OVERFITTING):
        return judgement(cause, "rising trend")
    if is_spent and is_settled:
        return judgement(cause, "patience")
    if is_rising or is_spent:
        return judgement(Verdict.HEALTHY, "decay to come")
    if rising is None:
        return judgement(Verdict.TOO_EARLY, "too early")
    return judgement(Verdict.HEALTHY, "falling" if since_best == 0 else "no trend")


def best_evaluation(curve: Sequence[Losses]) -> int | None:
    """The 1-based evaluation with the lowest finite validation loss (the first of equals), if there is one."""
    best: int | None = None
    for number, point in enumerate(curve, start=1):
        if math.isfinite(point.valid_loss) and (best is None or point.valid_loss < curve[best - 1].valid_loss):
            best = number
    return best


def mann_kendall_z(values: Sequence[float], *, period: int = 1) -> float:
    """Mann-Kendall trend of a short series as a z score; positive when it rises, 0 when there is nothing to compare.

    With a period, the seasonal test of Hirsch, Slack & Smith (Water Resources Research 18, 1982): only values a whole
    number of periods apart are compared. Without the continuity correction, so that the default of 1.96 over 7 values
    means S >= 15; ties are not corrected for, which is conservative.
    """
    if len(values) <= period:
        period = 1
    score, variance = 0, 0.0
    for season in range(period):
        own = values[season::period]
        count = len(own)
        variance += count * (count - 1) * (2 * count + 5) / 18
        score += sum(
            (own[later] > own[earlier]) - (own[later] < own[earlier])
            for earlier in range(count)
            for later in range(earlier + 1, count)
        )
    return score / math.sqrt(variance) if variance else 0.0


def _means(values: Sequence[float], size: int) -> list[float]:
    """The mean of each block of `size` values."""
    return [sum(values[start : start + size]) / size for start in range(0, len(values), size)]


def _cause(training_trend: float | None, rule: OverfitRule) -> Verdict:
    trend = training_trend or 0.0
    if trend < -rule.z:
        return Verdict.OVERFITTING
    return Verdict.DIVERGING if trend > rule.z else Verdict.PLATEAU
