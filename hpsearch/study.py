"""A study in flight: every event of a trial becomes rows. The only writer of the store.

Backends call the five events (`next_trial`, `on_progress`, `on_result`, `on_stopped`, `on_lost`) and take no decision
of their own; whatever order and process the trials ran in, the same events leave the same rows.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpsearch.errors import HpsearchError
from hpsearch.search import Search, Suggestion
from hpsearch.spec import StudySpec
from hpsearch.store import Row, Store
from hpsearch.trial import (
    LIVE,
    RANKED,
    Decision,
    Event,
    Listener,
    Point,
    Progress,
    TrialConfig,
    TrialResult,
    TrialState,
)


class StopRequestedError(HpsearchError):
    """Raised inside a backend's loop when the study should end now; `run` was told why by `request_stop`."""


@dataclass
class _Live:
    """A running trial, as the driver knows it."""

    row_id: int
    config: TrialConfig
    started: float
    verdict: str = ""
    last: Point | None = None
    best: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A trial of the finals: the settings of trial `of`, trained from another seed."""

    of: int
    seed: int


class StudyRun:
    """One launch of a study: hands out trials, hears their events, writes what happened.

    With `repeats` it runs these in place of new settings, whatever the budget of trials says.
    """

    def __init__(
        self,
        *,
        spec: StudySpec,
        study: Row,
        store: Store,
        search: Search,
        data: Path,
        threads: int,
        listen: Listener,
        repeats: Sequence[Repeat] | None = None,
    ) -> None:
        self.spec = spec
        self.stop_reason: str | None = None
        self._study = study
        self._store = store
        self._search = search
        self._data = data
        # Studies of one name in two stores may share a run folder; the time of birth keeps them apart.
        self._folder = Path(spec.folder).resolve() / f"{spec.name}-{study['created_at']:%Y%m%d-%H%M%S}"
        self._threads = threads
        self._listen = listen
        self._live: dict[int, _Live] = {}
        self._deadline = time.monotonic() + 60 * spec.budget.minutes if spec.budget.minutes else math.inf
        self._repeats = None if repeats is None else list(repeats)
        rows = [row for row in store.trials(study["id"]) if (row["repeat_of"] is not None) == (repeats is not None)]
        retried = {row["retry_of"] for row in rows}
        self._attempts = {row["number"]: row["attempt"] for row in rows}
        self._retries = [
            row["number"] for row in rows if row["state"] == TrialState.INTERRUPTED and row["number"] not in retried
        ]
        self.states: dict[str, int] = {}
        for row in rows:
            self._count(TrialState(row["state"]))

    @property
    def live(self) -> dict[int, Point | None]:
        """Running trials with their last point."""
        return {number: live.last for number, live in self._live.items()}

    @property
    def num_finished(self) -> int:
        """Trials that count against the budget: ended in any state but interrupted."""
        waiting = {TrialState.INTERRUPTED.value, *(state.value for state in LIVE)}
        return sum(count for state, count in self.states.items() if state not in waiting)

    @property
    def budget(self) -> int:
        """Trials that this launch should have finished in the end, those of earlier launches included."""
        if self._repeats is None:
            return self.spec.budget.trials
        return self.num_finished + len(self._live) + len(self._repeats)

    def request_stop(self, reason: str) -> None:
        """Ask the backend to end the launch; safe to call from a signal handler or another thread."""
        if self.stop_reason is None:
            self.stop_reason = reason

    def check_stop(self) -> None:
        """Raise StopRequestedError when a stop was asked for or the wall time of the budget is used up."""
        if self.stop_reason is None and time.monotonic() > self._deadline:
            self.stop_reason = f"the budget of {self.spec.budget.minutes:g} minutes is used up"
        if self.stop_reason is not None:
            raise StopRequestedError(self.stop_reason)

    # The five events

    def next_trial(self) -> TrialConfig | None:
        """The next trial to run, interrupted ones first; None when the budget or the space is used up."""
        if self._repeats is not None:
            return self._next_repeat(self._repeats)
        if self.num_finished + len(self._live) >= self.spec.budget.trials:
            return None
        retry_of = self._retries.pop(0) if self._retries else None
        if retry_of is None and self._search.is_exhausted:
            return None
        suggestion = self._search.ask() if retry_of is None else self._search.ask_again(retry_of)
        attempt = 1 if retry_of is None else self._attempts[retry_of] + 1
        return self._start(self._config(suggestion), attempt=attempt, retry_of=retry_of)

    def _next_repeat(self, waiting: list[Repeat]) -> TrialConfig | None:
        if not waiting:
            return None
        repeat = waiting.pop(0)
        config = self._config(self._search.repeat(repeat.of))
        return self._start(config.model_copy(update={"seed": repeat.seed, "repeat_of": repeat.of}))

    def _start(self, config: TrialConfig, *, attempt: int = 1, retry_of: int | None = None) -> TrialConfig:
        row_id = self._store.start_trial(self._study["id"], config, attempt=attempt, retry_of=retry_of)
        self._live[config.number] = _Live(row_id=row_id, config=config, started=time.monotonic())
        facts = {"params": config.params, "epochs": config.training.num_epochs, "repeat_of": config.repeat_of}
        self._listen(Event(kind="trial_started", trial=config.number, facts=facts))
        return config

    def on_progress(self, number: int, progress: Progress) -> Decision:
        """Record a point; STOP when the other trials show this one to be unpromising."""
        live = self._live[number]
        point, judgement = progress.point, progress.judgement
        self._store.add_point(live.row_id, point)
        if math.isfinite(point.valid_loss):
            live.best = min(live.best, point.valid_loss)
        stops = progress.stops
        if judgement.verdict != live.verdict or stops:
            live.verdict = judgement.verdict
            self._store.add_decision(
                live.row_id,
                evaluation=point.evaluation,
                verdict=judgement.verdict,
                action=Decision.STOP if stops else Decision.CONTINUE,
                evidence=judgement.evidence.as_dict(),
            )
        unpromising = False
        # A run is compared with others at the ends of its epochs; one that ends inside its first is noted there, too.
        if point.ends_epoch or (stops and (live.last is None or live.last.epoch < 1)):
            value = point.valid_loss if self.spec.objective == "loss" else point.valid_score
            if value is not None:
                unpromising = self._search.report(number, epoch=math.ceil(point.epoch), value=value)
        live.last = point
        facts = {"point": point, "verdict": judgement.verdict.value, "epochs": live.config.training.num_epochs}
        self._listen(Event(kind="point", trial=number, facts=facts))
        if stops or not unpromising or point.epoch >= live.config.training.num_epochs:
            return Decision.CONTINUE
        self._store.add_decision(
            live.row_id,
            evaluation=point.evaluation,
            verdict="unpromising",
            action=Decision.STOP,
            evidence={
                "rule": self.spec.prune.unpromising.rule,
                "epoch": point.epoch,
                "best_valid_loss": live.best,
                "valid_loss": point.valid_loss,
            },
        )
        return Decision.STOP

    def on_result(self, number: int, result: TrialResult) -> None:
        """A trial that ended by itself."""
        self._end(number, result)

    def on_stopped(self, number: int) -> None:
        """A trial that ended because `on_progress` answered STOP."""
        live = self._live[number]
        assert live.last is not None
        rule = self.spec.prune.unpromising.rule
        reason = f"behind the other trials at epoch {live.last.epoch:g} (best {live.best:.3f}, rule {rule})"
        self._end(
            number, TrialResult(state=TrialState.UNPROMISING, reason=reason, **self._last_known(live), **_best(live))
        )

    def on_lost(self, number: int, error: str) -> None:
        """A trial whose worker died."""
        live = self._live[number]
        reason = error.strip().splitlines()[-1] if error.strip() else "its worker died without a word"
        self._end(number, TrialResult(state=TrialState.FAILED, reason=reason, error=error, **self._last_known(live)))

    def interrupt_live(self) -> int:
        """End what still runs as `interrupted`, to be taken up by the next launch; returns how many."""
        numbers = list(self._live)
        for number in numbers:
            live = self._live[number]
            reason = self.stop_reason or "the backend ended"
            self._end(
                number,
                TrialResult(state=TrialState.INTERRUPTED, reason=reason, **self._last_known(live)),
            )
        return len(numbers)

    def adopt_orphans(self) -> int:
        """Give trials that an earlier driver left running an end, so that they can be retried; returns how many."""
        orphans = [row for row in self._store.trials(self._study["id"]) if TrialState(row["state"]) in LIVE]
        for row in orphans:
            result = TrialResult(state=TrialState.INTERRUPTED, reason="its driver died")
            points = self._store.points(row["id"])
            self._store.finish_trial(row["id"], result, last_epoch=points[-1]["epoch"] if points else None)
            if (row["repeat_of"] is not None) == (self._repeats is not None):
                self.states[row["state"]] -= 1
                self._count(TrialState.INTERRUPTED)
                self._retries.append(row["number"])
        ended = {row["number"]: row for row in self._store.trials(self._study["id"])}
        for number in self._search.unfinished():
            known = ended.get(number)
            state = TrialState(known["state"]) if known else TrialState.INTERRUPTED
            value = self._objective(known["best_valid_loss"], known["best_valid_score"]) if known else None
            self._search.tell(number, state, value=value, notes={"outcome": state.value})
        return len(orphans)

    # Below the events

    def _config(self, suggestion: Suggestion) -> TrialConfig:
        model, training = self.spec.settings_for(suggestion.params)
        folder = self._folder / f"trial-{suggestion.number:05d}"
        shutil.rmtree(folder, ignore_errors=True)
        return TrialConfig(
            study=self.spec.name,
            number=suggestion.number,
            task=self.spec.task,
            seed=self.spec.seed,
            params=suggestion.params,
            objective=self.spec.objective,
            model=model,
            training=training,
            translation=self.spec.translation,
            classification=self.spec.classification,
            rule=self.spec.prune.overfit,
            data=str(self._data),
            folder=str(folder),
            threads=self._threads,
        )

    def _end(self, number: int, result: TrialResult) -> None:
        live = self._live.pop(number)
        if result.state not in RANKED:
            shutil.rmtree(live.config.folder, ignore_errors=True)
        last_epoch = live.last.epoch if live.last else None
        self._store.finish_trial(live.row_id, result, last_epoch=last_epoch)
        value = self._objective(result.best_valid_loss, result.best_valid_score)
        self._search.tell(number, result.state, value=value, notes=_notes(result, live.config.repeat_of))
        self._count(result.state)
        facts = {"result": result, "last_epoch": last_epoch, "epochs": live.config.training.num_epochs}
        self._listen(Event(kind="trial_ended", trial=number, facts=facts))

    def _objective(self, best_loss: float | None, best_score: float | None) -> float | None:
        return best_loss if self.spec.objective == "loss" else best_score

    def _last_known(self, live: _Live) -> dict[str, Any]:
        """Device-seconds of a trial whose worker cannot tell them any more."""
        return {"seconds": live.last.seconds if live.last else time.monotonic() - live.started}

    def _count(self, state: TrialState) -> None:
        self.states[state.value] = self.states.get(state.value, 0) + 1


def _best(live: _Live) -> dict[str, Any]:
    return {"best_valid_loss": live.best if math.isfinite(live.best) else None}


def _notes(result: TrialResult, repeat_of: int | None) -> dict[str, Any]:
    """Attributes of the Optuna trial, named as a person reads them in the dashboard."""
    notes: dict[str, Any] = {"outcome": result.state.value, "why": result.reason[:1000]}
    if repeat_of is not None:
        notes["repeats trial"] = repeat_of
    if result.best_epoch is not None:
        notes["best epoch"] = round(result.best_epoch, 3)
    for score in result.scores:
        notes[f"test {score.metric.replace('_', ' ')}"] = score.value
    return notes
