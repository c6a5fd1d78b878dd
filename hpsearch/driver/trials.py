"""Trials of a study in flight, as the driver knows them between events."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpsearch.records import (
    Point,
    TrialConfig,
    TrialResult,
    TrialState,
)
from hpsearch.store.rows import PointRow


@dataclass
class LiveTrial:
    """A running trial, as the driver knows it."""

    config: TrialConfig
    started: float
    row_id: int = -1
    """Known once the outbox has written the trial's start."""
    refused: str = ""
    """Why the store takes nothing more of it."""
    verdict: str = ""
    last: Point | None = None
    best: float = math.inf
    best_score: float | None = None
    pulse: float = 0.0
    """When its worker last said that it is alive, by the clock of wherever its files lie: only changes count."""
    heard: float = math.inf
    """When we saw that, by our own monotonic clock."""


@dataclass
class WaitingTrial:
    """A trial in the queue, or paused at a rung: it ran before, or was about to."""

    number: int
    row_id: Callable[[], int] = lambda: -1
    """Known once the outbox has written the trial's start."""
    attempt: int = 0
    seed: int | None = None
    repeat_of: int | None = None
    settings: dict[str, Any] | None = None
    """Of its first attempt: an extended study may compute others."""
    last: Point | None = None
    best: float = math.inf
    best_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A trial of the finals: the settings of trial `of`, trained from another seed."""

    of: int
    seed: int


def point_of(row: PointRow) -> Point:
    """A point from its row; a NaN or infinite loss is NULL there."""
    values = {key: getattr(row, key) for key in Point.__dataclass_fields__}
    for key in ("train_loss", "valid_loss"):
        values[key] = math.nan if values[key] is None else values[key]
    return Point(**values)


def settings_of(config: TrialConfig) -> dict[str, Any]:
    """As the store keeps them."""
    return {"model": config.model.model_dump(), "training": config.training.model_dump()}


def until_next_attempt(live: LiveTrial) -> WaitingTrial:
    """A trial that ran, until its next attempt."""
    config = live.config
    return WaitingTrial(
        config.number,
        row_id=lambda: live.row_id,
        attempt=config.attempt,
        seed=config.seed,
        repeat_of=config.repeat_of,
        settings=settings_of(config),
        last=live.last,
        best=live.best,
        best_score=live.best_score,
    )


def as_failed(live: LiveTrial, result: TrialResult) -> TrialResult:
    return TrialResult(state=TrialState.FAILED, reason=live.refused, seconds=result.seconds, **best_loss_of(live.best))


def best_loss_of(value: float) -> dict[str, Any]:
    return {"best_valid_loss": value if math.isfinite(value) else None}


def optuna_notes(result: TrialResult, repeat_of: int | None) -> dict[str, Any]:
    """Attributes of the Optuna trial, named as a person reads them in the dashboard."""
    notes: dict[str, Any] = {"outcome": result.state.value, "why": result.reason[:1000]}
    if repeat_of is not None:
        notes["repeats trial"] = repeat_of
    if result.best_epoch is not None:
        notes["best epoch"] = round(result.best_epoch, 3)
    for score in result.scores:
        notes[f"test {score.metric.replace('_', ' ')}"] = score.value
    return notes
