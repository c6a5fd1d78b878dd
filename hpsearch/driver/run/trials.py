"""Trials of a study in flight, as the driver knows them between events."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpsearch.records import (
    UNFINISHED,
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

    def merit(self, objective: str) -> float:
        """Its best objective so far; lower is better."""
        return _merit(objective, self.best, self.best_score)


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

    def merit(self, objective: str) -> float:
        """Its best objective so far; lower is better."""
        return _merit(objective, self.best, self.best_score)


class Trials:
    """The trials of a study by what they do now, and how many are in each state."""

    def __init__(self) -> None:
        self.live: dict[int, LiveTrial] = {}
        self.queue: deque[WaitingTrial] = deque()
        """Interrupted ones."""
        self.paused: dict[int, WaitingTrial] = {}
        """At a rung."""
        self.states: dict[str, int] = {}

    @property
    def num_finished(self) -> int:
        """Trials that have ended in any state but interrupted."""
        return sum(count for state, count in self.states.items() if state not in UNFINISHED)

    @property
    def waiting(self) -> list[WaitingTrial]:
        """Paused and interrupted ones."""
        return [*self.paused.values(), *self.queue]

    def count(self, state: TrialState) -> None:
        self.states[state.value] = self.states.get(state.value, 0) + 1

    def uncount(self, state: TrialState) -> None:
        self.states[state.value] -= 1

    def pause(self, number: int) -> LiveTrial:
        """Move a live trial to the paused ones."""
        live = self.live.pop(number)
        self.paused[number] = until_next_attempt(live)
        self.count(TrialState.PAUSED)
        return live

    def requeue(self, number: int) -> LiveTrial:
        """Move a live trial to the front of the queue."""
        live = self.live.pop(number)
        self.queue.appendleft(until_next_attempt(live))
        self.count(TrialState.INTERRUPTED)
        return live

    def take_paused(self, number: int) -> WaitingTrial:
        """Pop a paused trial."""
        self.uncount(TrialState.PAUSED)
        return self.paused.pop(number)

    def take_queued(self, chosen: WaitingTrial | None = None) -> WaitingTrial:
        """Pop a trial from the queue: this one, or the first."""
        self.uncount(TrialState.INTERRUPTED)
        if chosen is None:
            return self.queue.popleft()
        self.queue.remove(chosen)
        return chosen


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A trial of the finals: the settings of trial `of`, trained from another seed."""

    of: int
    seed: int


def _merit(objective: str, best: float, best_score: float | None) -> float:
    if objective == "loss":
        return best
    return math.inf if best_score is None else -best_score


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
