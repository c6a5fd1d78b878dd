"""A study in flight: every event of a trial becomes rows. The only writer of the store.

Backends call the six events (`next_trial`, `on_progress`, `on_result`, `on_paused`, `on_stopped`, `on_lost`; one that
can lose its cluster has a seventh, `on_cluster_lost`) and take no decision of their own; whatever order and process the
trials ran in, the same events leave the same rows. Decisions are taken in memory and written through the outbox, so
that no event waits for the database. A trial that does not end goes back into the queue under its own number, and its
next attempt goes on from its last checkpoint; so does one that paused at a rung and is promoted.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hpsearch.backends import GRACE_S
from hpsearch.driver.disk import DISK_PATIENCE_S, DiskWait
from hpsearch.driver.endgame import Clock
from hpsearch.driver.failures import MOST_BACK_OFF_S, Consequence, Failures
from hpsearch.driver.liveness import ask_to_leave, cause_in, last_words_of, pulse_of
from hpsearch.driver.outbox import Outbox
from hpsearch.driver.trials import (
    LiveTrial,
    Repeat,
    WaitingTrial,
    as_failed,
    best_loss_of,
    optuna_notes,
    point_of,
    settings_of,
    until_next_attempt,
)
from hpsearch.errors import EXIT_IO, EXIT_TOO_MANY_FAILED, HpsearchError, StoreRefusedError
from hpsearch.files.layout import (
    PULSE_EVERY_S,
    attempt_folder,
    earlier_attempts,
    newest_first,
    run_folder,
)
from hpsearch.files.ownership import Owner
from hpsearch.files.storage import Folder
from hpsearch.pruning import rungs
from hpsearch.records import (
    PREEMPTED,
    RANKED,
    UNFINISHED,
    Decision,
    Event,
    Listener,
    Note,
    Point,
    PointReported,
    Progress,
    TrialConfig,
    TrialEnded,
    TrialResult,
    TrialStarted,
    TrialState,
)
from hpsearch.search.study import Search, Suggestion
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import StudySpec
from hpsearch.store.rows import StudyRow, TrialRow
from hpsearch.store.store import Store
from hpsearch.training.memory import PeakMemory
from hpsearch.upkeep.retention import CheckpointKeeper, begun

SCORE_S = 60.0
SCORE_PART = 0.05
"""A study whose time is used up begins no scoring after this part of it, or SCORE_S if that is longer."""
_STALL_MARGIN_S = 3 * PULSE_EVERY_S
"""What a worker that makes no step gets to end itself, with last words, before it is ended from outside."""


class StopRequestedError(HpsearchError):
    """Raised inside a backend's loop when the study should end now; `run` was told why by `request_stop`."""


class StudyRun:
    """One launch of a study: hands out trials, hears their events, writes what happened.

    With `repeats` it runs these in place of new settings, whatever the budget of trials says.
    """

    def __init__(
        self,
        *,
        spec: StudySpec,
        study: StudyRow,
        store: Store,
        search: Search,
        outbox: Outbox,
        data: Folder,
        owner: Owner,
        threads: int,
        listen: Listener,
        repeats: Sequence[Repeat] | None = None,
        on_cluster_lost: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self._now = now
        self.stop_reason: str | None = None
        self.stop_code: int | None = None
        """Exit code of a launch that ended by itself before its budget was used."""
        self._study = study
        self._store = store
        self._search = search
        self._outbox = outbox
        self._data = data
        self._owner = owner
        self._folder = run_folder(spec.folder, study)
        owner.claim(self._folder)
        self._threads = threads
        self._listeners = [listen]
        self._live: dict[int, LiveTrial] = {}
        self._clock = Clock(60 * spec.budget.minutes, self._now()) if spec.budget.minutes else None
        self._has_told_exhausted = False
        self._failures = Failures(now)
        self._is_ending = False
        """Whether the time that is left goes to the leading trials alone."""
        self._grace_until = math.inf
        self._to_score: deque[WaitingTrial] | None = None
        """Trials that have not ended, whose best checkpoints are to be scored; known when none trains any more."""
        self._score_until = math.inf
        self._disk = DiskWait(self._folder, data, now)
        self._looked = -math.inf
        """When workers were last looked at."""
        self._on_cluster_lost = on_cluster_lost
        self._repeats = None if repeats is None else list(repeats)
        rows = [row for row in store.trials(study.id) if (row.repeat_of is not None) == (repeats is not None)]
        self._keeper = CheckpointKeeper(store, study, spec.limits.keep_checkpoints, self._folder, remove=owner.remove)
        self._queue: deque[WaitingTrial] = deque()
        self._paused: dict[int, WaitingTrial] = {}
        self._worker_deaths: dict[int, int] = {}
        self._memory = PeakMemory()
        self._refused: deque[TrialState] = deque()
        """Ends that the store did not take, counted as what they are not."""
        self._row_ids: dict[int, Callable[[], int]] = {}
        """Of trials that are being scored."""
        self.scored: set[int] = set()
        """Trials that have not ended, and can be ranked all the same."""
        scores = store.study_scores(study.id, [study.metric])
        ranked = [row for row in rows if row.number in scores and row.state in RANKED]
        sign = 1.0 if spec.objective == "loss" else -1.0
        bests = (row.best_valid(spec.objective) for row in ranked)
        self._best_ranked = min((sign * value for value in bests if value is not None), default=math.inf)
        self.states: dict[str, int] = {}
        for row in rows:
            self._count(TrialState(row.state))
            self._memory.learn(row.settings, row.micro_batch_size, row.provenance)
        self._attempts = newest_first(self._folder)
        """Folders that earlier launches have left."""
        self._adopt()
        self.resumed = self._take_up(rows)

    def add_listener(self, listener: Listener) -> None:
        """Another one that hears the events of this launch from now on."""
        self._listeners.append(listener)

    @property
    def live(self) -> dict[int, Point | None]:
        """Running trials with their last point."""
        return {number: live.last for number, live in self._live.items() if not live.config.scores_only}

    @property
    def num_finished(self) -> int:
        """Trials that count against the budget: ended in any state but interrupted."""
        return sum(count for state, count in self.states.items() if state not in UNFINISHED)

    @property
    def budget(self) -> int:
        """Trials that this launch should have finished in the end, those of earlier launches included."""
        if self._repeats is None:
            return self.spec.budget.trials
        return self.num_finished + len(self._live) + len(self._queue) + len(self._repeats)

    @property
    def is_waiting(self) -> bool:
        """True when `next_trial` gives none for now, but may give one later."""
        return self._disk.is_full or self._failures.is_backing_off

    def share_of_a_device(self, config: TrialConfig) -> float:
        """The part of a GPU that the trial's memory asks for, by what the study's trials took; 1 until enough have."""
        return self._memory.share(settings_of(config))

    def request_stop(
        self, reason: str, code: int | None = None, *, grace_s: float = GRACE_S, score_s: float | None = None
    ) -> None:
        """Ask the running trials to write a checkpoint and leave, and the backend to end the launch then.

        The best checkpoints of the trials that have not ended are scored, as many as begin within `score_s` seconds (by
        default, within the grace). Without grace nobody is asked: their files are not ours any more. Safe to call from
        a signal handler or another thread.
        """
        if self.stop_reason is not None:
            return
        self.stop_code = code
        now = self._now()
        self._grace_until = now + grace_s
        self._score_until = now + (grace_s if score_s is None else score_s)
        self.stop_reason = reason
        for live in list(self._live.values()) if grace_s else ():
            ask_to_leave(live.config)

    def check_stop(self) -> None:
        """Raise StopRequestedError when the launch is to end and no trial is left, or its grace has run out.

        Raises the error of the outbox, too.
        """
        self.settle()
        if self._outbox.error is not None:
            raise self._outbox.error
        now = self._now()
        if self.stop_reason is None and self._clock is not None:
            if now > self._clock.deadline:
                self._end_in_time()
            elif not self._is_ending:
                self._look_at_the_clock(now)
        if self._disk.is_full and not self._live:
            self._look_for_room()
        if self.stop_reason is not None and self._is_over(now):
            raise StopRequestedError(self.stop_reason)

    def settle(self) -> None:
        """Count trials as failed whose ends the store did not take."""
        while self._refused:
            self.states[self._refused.popleft().value] -= 1
            self._count(TrialState.FAILED)

    def find_silent(self) -> list[TrialConfig]:
        """Trials whose workers do not even run, so that they cannot end themselves after `limits.stall_minutes`."""
        if self.spec.limits.stall_minutes is None:
            return []
        now = self._now()
        if now - self._looked < PULSE_EVERY_S:
            return []
        # A driver that was away itself has not watched anybody.
        was_away = now - self._looked > _STALL_MARGIN_S
        self._looked = now
        silent = []
        for live in self._live.values():
            pulse = pulse_of(live.config)
            if pulse is not None and (pulse != live.pulse or was_away):
                live.pulse, live.heard = pulse, now
            elif now - live.heard > 60 * self.spec.limits.stall_minutes + _STALL_MARGIN_S:
                live.heard = now
                silent.append(live.config)
        return silent

    def _is_over(self, now: float) -> bool:
        """Whether a launch that was asked to stop has nothing to wait for any more."""
        if any(not live.config.scores_only for live in self._live.values()):
            return now > self._grace_until
        if self._live:
            return now > max(self._score_until, self._grace_until)
        return not self._may_score(now) or not self._unscored()

    # The events

    def next_trial(self) -> TrialConfig | None:
        """The next trial to run: interrupted, promoted, new. None when there is none for now (see `is_waiting`).

        When nothing is left to run, the trials that were never promoted end.
        """
        if self.stop_reason is not None:
            return self._next_to_score()
        if not self._has_room() or (self._failures.suspicion and self._live) or self._failures.is_backing_off:
            return None
        if self._is_ending:
            return self._next_to_finish()
        if self._queue:
            waiting = self._queue.popleft()
            self.states[TrialState.INTERRUPTED.value] -= 1
            return self._start(self._search.ask_again(waiting.number), waiting)
        if self._repeats is not None:
            if not self._repeats:
                return None
            repeat = self._repeats.pop(0)
            suggestion = self._search.repeat(repeat.of, seed=repeat.seed)
            return self._start(suggestion, WaitingTrial(suggestion.number, seed=repeat.seed, repeat_of=repeat.of))
        if (promoted := self._search.promote()) is not None:
            return self._promote(promoted)
        begun = self.num_finished + len(self._live) + len(self._paused)
        if begun < self.spec.budget.trials and self._search.is_exhausted:
            self._tell_exhausted(begun)
        elif begun < self.spec.budget.trials:
            suggestion = self._search.ask()
            return self._start(suggestion, WaitingTrial(suggestion.number))
        if self._paused and not self._live:
            # Of a handful of trials none may be among the best third.
            has_winner = any(self.states.get(state.value) for state in RANKED)
            if (promoted := self._search.promote_leader(anyway=not has_winner)) is not None:
                return self._promote(promoted)
            for number in list(self._paused):
                self._give_up(number)
        return None

    def on_progress(self, number: int, progress: Progress) -> Decision:
        """Record a point; STOP, or PAUSE at a rung, when the other trials show this one to be unpromising."""
        live = self._live[number]
        if live.refused:
            live.last = progress.point
            return Decision.STOP
        self._failures.progressed()
        point, judgement = progress.point, progress.judgement
        self._put(live, lambda: self._store.add_point(live.row_id, point))
        if math.isfinite(point.valid_loss):
            live.best = min(live.best, point.valid_loss)
        if point.valid_score is not None:
            live.best_score = max(point.valid_score, -math.inf if live.best_score is None else live.best_score)
        stops = progress.stops
        if judgement.verdict != live.verdict or stops:
            live.verdict = judgement.verdict
            action = Decision.STOP if stops else Decision.CONTINUE
            self._decide(live, point, judgement.verdict, action, judgement.evidence.as_dict())
        unpromising = False
        value = point.valid_loss if self.spec.objective == "loss" else point.valid_score
        if value is not None:
            step = max(1, round(point.epoch * self.spec.evaluations_per_epoch))
            unpromising = self._search.report(number, step=step, value=value)
        live.last = point
        if self._clock is not None:
            self._clock.learn(number, settings_of(live.config), epochs=point.epoch, seconds=point.seconds)
        self._listen(
            PointReported(
                trial=number, point=point, verdict=judgement.verdict.value, epochs=live.config.training.num_epochs
            )
        )
        is_pausable = live.config.repeat_of is None and live.config.finish_in_s is None
        if progress.rung is not None and not stops and is_pausable:
            # Most trials come no further: how much of a GPU they take is learned here.
            self._memory.learn(settings_of(live.config), progress.micro_batch_size, progress.memory)
            return self._at_rung(live, point, progress.rung)
        if stops or not unpromising or point.epoch >= live.config.training.num_epochs:
            return Decision.CONTINUE
        evidence = {
            "rule": self.spec.prune.unpromising.rule,
            "epoch": point.epoch,
            "best_valid_loss": live.best,
            "valid_loss": point.valid_loss,
        }
        self._decide(live, point, "unpromising", Decision.STOP, evidence)
        return Decision.STOP

    def on_result(self, number: int, result: TrialResult) -> None:
        """A trial that ended by itself, or that left with a checkpoint because it was asked to or found no room."""
        if self._live[number].config.scores_only:
            self._end_scoring(number, result)
            return
        if result.lost_files:
            self._lose(number, result.reason, result)
            return
        if result.state is not TrialState.INTERRUPTED:
            self._end(number, result)
            return
        if result.needed_bytes is not None and not self._disk.is_full:
            self._disk.begin(result.needed_bytes)
            self._note(f"{result.reason}: no new trial starts until there is; make room, and the study resumes")
        asked = result.needed_bytes is None and self.stop_reason is not None
        self._requeue(number, self.stop_reason or "" if asked else result.reason)

    def on_paused(self, number: int) -> None:
        """A trial that left its device because `on_progress` answered PAUSE."""
        live = self._live.pop(number)
        assert live.last is not None
        place, reached = self._search.standing(number)
        reason = f"waits at epoch {live.last.epoch:.4g}: {place} of the {reached} trials that came so far"
        self._put(live, lambda: self._store.pause_trial(live.row_id, reason))
        self._paused[number] = until_next_attempt(live)
        self._search.pause(number)
        self._count(TrialState.PAUSED)
        self._failures.clear()
        self._tell_end(
            live.config, live.last, TrialResult(state=TrialState.PAUSED, reason=reason, **self._last_known(live))
        )
        if len(self._paused) > self.spec.limits.keep_paused:
            self._give_up(self._search.hindmost())

    def on_stopped(self, number: int) -> None:
        """A trial that ended because `on_progress` answered STOP."""
        live = self._live[number]
        assert live.last is not None
        rule = self.spec.prune.unpromising.rule
        reason = f"behind the other trials at epoch {live.last.epoch:g} (best {live.best:.3f}, rule {rule})"
        self._end(
            number,
            TrialResult(
                state=TrialState.UNPROMISING, reason=reason, **self._last_known(live), **best_loss_of(live.best)
            ),
        )

    def on_lost(self, number: int, error: str) -> None:
        """A trial whose worker died: it is tried again from its checkpoint, as often as `limits.retries` says."""
        live = self._live[number]
        if live.config.scores_only:
            self._live.pop(number)
            return
        last_words = last_words_of(live.config)
        error = "\n\n".join(part for part in (last_words, error.strip()) if part)
        reason = cause_in(last_words) or cause_in(error) or "its worker died without a word"
        if error.startswith(PREEMPTED):
            self._requeue(number, error.splitlines()[0])
            return
        self._lose(
            number, reason, TrialResult(state=TrialState.FAILED, reason=reason, error=error, **self._last_known(live))
        )

    def _lose(self, number: int, reason: str, failed: TrialResult) -> None:
        """Try a trial again whose worker, or whose files, were lost; let it fail when that has happened too often."""
        deaths = self._worker_deaths[number] = self._worker_deaths.get(number, 0) + 1
        if self.stop_reason is not None:
            self._requeue(number, self.stop_reason)
        elif deaths <= self.spec.limits.retries:
            wait_s = self._failures.lost()
            later = f" in {wait_s:.0f} s" if wait_s else ""
            self._note(f"trial {number}: {reason}; trying again from its checkpoint{later}")
            self._requeue(number, reason, lost=True)
        else:
            self._end(number, failed)

    def on_cluster_lost(self, reason: str) -> None:
        """The cluster under the trials is gone, and perhaps this process with it, soon: bring everything to safety."""
        self.request_stop(reason)
        self._outbox.hurry()
        self.interrupt_live()
        self._outbox.flush()
        self._on_cluster_lost()

    def interrupt_live(self) -> int:
        """Put what still runs back into the queue, for the next launch; returns how many."""
        for number in [number for number, live in self._live.items() if live.config.scores_only]:
            self._live.pop(number)
        numbers = list(self._live)
        for number in numbers:
            self._requeue(number, self.stop_reason or "the backend ended")
        return len(numbers)

    # As the time runs out

    def _end_in_time(self) -> None:
        minutes = self.spec.budget.minutes
        assert minutes is not None
        # Nobody is waiting at the door: the scores may take a little longer than the budget.
        score_s = max(SCORE_S, 60 * SCORE_PART * minutes)
        self.request_stop(f"the budget of {minutes:g} minutes is used up", score_s=score_s)

    def _look_at_the_clock(self, now: float) -> None:
        """Begin the end of the study when its leading trial needs what time is left: see `endgame`."""
        assert self._clock is not None
        leader = min(self._unfinished(), key=lambda trial: trial[0], default=None)
        if leader is None or not self._clock.is_short(now, leader[1], leader[2]):
            return
        self._is_ending = True
        self._note("the time that is left goes to the leading trials: they are brought to their ends, and none begins")
        for live in self._live.values():
            settings, epoch = settings_of(live.config), live.last.epoch if live.last else 0.0
            if (self._clock.needed(settings, epoch) or math.inf) > self._clock.left(now):
                ask_to_leave(live.config)  # the best of them resume at once, with a schedule that ends in time

    def _unfinished(self) -> list[tuple[float, dict[str, Any], float]]:
        """Best objective (lower is better), settings and epoch of each trial that has a curve and has not ended."""
        trials: list[tuple[LiveTrial | WaitingTrial, dict[str, Any] | None]] = [
            *((live, settings_of(live.config)) for live in self._live.values()),
            *((waiting, waiting.settings) for waiting in (*self._paused.values(), *self._queue)),
        ]
        return [
            (self._merit(trial), settings, trial.last.epoch)
            for trial, settings in trials
            if settings is not None and trial.last is not None
        ]

    def _merit(self, trial: LiveTrial | WaitingTrial) -> float:
        """The best objective of a trial so far; lower is better."""
        if self.spec.objective == "loss":
            return trial.best
        return math.inf if trial.best_score is None else -trial.best_score

    def _next_to_finish(self) -> TrialConfig | None:
        """The best of the trials that wait, with a schedule that ends in time."""
        assert self._clock is not None
        now = self._now()
        waiting = [trial for trial in (*self._paused.values(), *self._queue) if math.isfinite(self._merit(trial))]
        if not self._clock.is_worth_a_start(now) or not waiting:
            if not self._live:
                self._end_in_time()
                return self._next_to_score()
            return None
        left = self._clock.left(now)
        chosen = min(waiting, key=self._merit)
        if chosen.number in self._paused:
            self._search.resume(chosen.number)
            return self._promote(chosen.number, finish_in_s=left)
        self._queue.remove(chosen)
        self.states[TrialState.INTERRUPTED.value] -= 1
        return self._start(self._search.ask_again(chosen.number), chosen, finish_in_s=left)

    def _may_score(self, now: float) -> bool:
        return now < self._score_until and self._repeats is None and not self._disk.is_full

    def _unscored(self) -> deque[WaitingTrial]:
        """Trials that have not ended and could be ranked, best first. When somebody waits, those that could win."""
        if self._to_score is None:
            unfinished = [*self._paused.values(), *self._queue]
            found = sorted((one for one in unfinished if math.isfinite(self._merit(one))), key=self._merit)
            if self._score_until == self._grace_until:
                found = [one for one in found if self._merit(one) < self._best_ranked][:1]
            self._to_score = deque(found)
        return self._to_score

    def _next_to_score(self) -> TrialConfig | None:
        """A trial that has not ended, to be scored as it is, once none trains any more."""
        if any(not live.config.scores_only for live in self._live.values()):
            return None
        if not self._may_score(self._now()) or not self._unscored():
            return None
        waiting = self._unscored().popleft()
        suggestion = self._search.suggestion(waiting.number)
        config = self._config(suggestion, waiting).model_copy(update={"scores_only": True, "rungs": ()})
        row_id = waiting.row_id
        self._live[config.number] = LiveTrial(
            config=config, started=self._now(), last=waiting.last, best=waiting.best, best_score=waiting.best_score
        )
        self._outbox.put(lambda: self._store.begin_scoring(row_id(), config.attempt))
        self._row_ids[config.number] = row_id
        return config

    def _end_scoring(self, number: int, result: TrialResult) -> None:
        live = self._live.pop(number)
        if not result.scores:
            return
        self.scored.add(number)
        last, row_id = live.last, self._row_ids.pop(number)
        self._put(live, lambda: self._store.score_unfinished(row_id(), result, last_epoch=last.epoch if last else None))
        self._note(f"trial {number} {result.reason}")

    # Below the events

    def _adopt(self) -> None:
        """Take up trials that were begun while the store was away: it does not know of them, but their folders do."""
        while (config := self._begun(self._search.size)) is not None:
            self._search.adopt(config.params, config.attributes or {})

    def _begun(self, number: int) -> TrialConfig | None:
        """The newest attempt at a trial that a worker has begun, also one that is not on record."""
        config = begun(self._attempts.get(number, ()))
        return config if config is not None and config.origin == f"{self._study.uid}/{number}" else None

    def _since(self, waiting: WaitingTrial) -> WaitingTrial:
        """The trial, with what has become of it since the store last heard."""
        found = self._begun(waiting.number)
        if found is None or found.attempt <= waiting.attempt or found.params != self._search.params(waiting.number):
            return waiting
        return replace(waiting, attempt=found.attempt, settings=settings_of(found))

    def _take_up(self, rows: Sequence[TrialRow]) -> int:
        """Queue what an earlier launch did not end, and tell Optuna what it did not hear; returns how many wait."""
        by_number = {row.number: row for row in self._store.trials(self._study.id)}
        for number in self._search.unfinished:
            row = by_number.get(number)
            state = TrialState(row.state) if row else TrialState.INTERRUPTED
            if state is TrialState.PAUSED:
                self._search.pause(number)
                continue
            if state is TrialState.RUNNING:
                state = TrialState.INTERRUPTED
            value = self._objective(row.best_valid_loss, row.best_valid_score) if row else None
            self._search.tell(number, state, value=value, notes={"outcome": state.value})
            repeat = self._search.repeated(number)
            if row is None and (repeat is not None) == (self._repeats is not None):
                # The driver died between Optuna's row and ours.
                of, seed = repeat or (None, None)
                self._queue.append(self._since(WaitingTrial(number, repeat_of=of, seed=seed)))
                self._count(TrialState.INTERRUPTED)
        for row in by_number.values():
            if TrialState(row.state) is TrialState.RUNNING:
                self._outbox.put(partial(self._store.requeue_trial, row.id, "its driver died"))
        for row in rows:
            state = TrialState(row.state)
            if row.number not in self._search.unfinished or state not in UNFINISHED:
                continue
            if state is TrialState.RUNNING:
                self.states[state.value] -= 1
                self._count(_INTERRUPTED)
            self._worker_deaths[row.number] = row.worker_deaths
            points = self._store.points(row.id)
            losses = [point.valid_loss for point in points if point.valid_loss is not None]
            scores = [point.valid_score for point in points if point.valid_score is not None]
            waiting = WaitingTrial(
                row.number,
                row_id=partial(int, row.id),
                attempt=row.attempt,
                seed=row.seed,
                repeat_of=row.repeat_of,
                settings=row.settings,
                last=point_of(points[-1]) if points else None,
                best=min(losses, default=math.inf),
                best_score=max(scores, default=None),
            )
            waiting = self._since(waiting)
            if state is TrialState.PAUSED:
                self._paused[row.number] = waiting
            else:
                self._queue.append(waiting)
        if self._repeats is not None:
            taken = {(waiting.repeat_of, waiting.seed) for waiting in self._queue}
            self._repeats = [repeat for repeat in self._repeats if (repeat.of, repeat.seed) not in taken]
        self._queue = deque(sorted(self._queue, key=lambda waiting: waiting.number))
        return len(self._queue)

    def _config(self, suggestion: Suggestion, waiting: WaitingTrial) -> TrialConfig:
        if waiting.settings is None:
            model, training = self.spec.settings_for(suggestion.params)
        else:
            # Where a pretrained model lies is no part of the settings.
            model = ModelSettings(**{**waiting.settings["model"], "pretrained": self.spec.model.pretrained})
            training = RunSettings(**waiting.settings["training"])
        attempt = waiting.attempt + 1
        folder = attempt_folder(self._folder, suggestion.number, attempt)
        self._owner.remove(folder)
        return TrialConfig(
            study=self.spec.name,
            study_uid=self._study.uid,
            number=suggestion.number,
            task=self.spec.task,
            seed=self.spec.seed if waiting.seed is None else waiting.seed,
            params=suggestion.params,
            attributes=suggestion.attributes,
            repeat_of=waiting.repeat_of,
            objective=self.spec.objective,
            model=model,
            training=training,
            options=self.spec.options.model_dump(mode="json"),
            rule=self.spec.prune.overfit,
            data=str(self._data),
            folder=str(folder),
            attempt=attempt,
            earlier=tuple(str(place) for place in earlier_attempts(self._folder, suggestion.number, attempt)),
            recorded=waiting.last.evaluation if waiting.last else 0,
            rungs=self._rungs(training) if waiting.repeat_of is None else (),
            max_minutes=self.spec.limits.max_minutes,
            stall_minutes=self.spec.limits.stall_minutes,
            threads=self._threads,
        )

    def _rungs(self, training: RunSettings) -> tuple[float, ...]:
        """Parts of a run with these settings at which it may be paused."""
        rule = self.spec.prune.unpromising
        return rungs.places(rule.reduction_factor, training.warmup_fraction) if rule.rule == "promote" else ()

    def _start(self, suggestion: Suggestion, waiting: WaitingTrial, *, finish_in_s: float | None = None) -> TrialConfig:
        config = self._config(suggestion, waiting).model_copy(update={"finish_in_s": finish_in_s})
        live = LiveTrial(
            config=config,
            started=self._now(),
            last=waiting.last,
            best=waiting.best,
            best_score=waiting.best_score,
        )
        self._live[config.number] = live

        def write() -> None:
            live.row_id = self._store.start_trial(self._study.id, config)

        self._put(live, write)
        self._listen(
            TrialStarted(
                trial=config.number,
                params=config.params,
                epochs=config.training.num_epochs,
                repeat_of=config.repeat_of,
                attempt=config.attempt,
            )
        )
        if self.stop_reason is not None:
            ask_to_leave(config)  # a signal came while the trial was being made
        return config

    def _end(self, number: int, result: TrialResult) -> None:
        live = self._live.pop(number)
        if live.last is not None and result.seconds < live.last.seconds:
            result = replace(result, seconds=live.last.seconds)
        last_epoch = live.last.epoch if live.last else None
        self._put(live, lambda: self._store.finish_trial(live.row_id, result, last_epoch=last_epoch))
        self._outbox.put(lambda: self._fail_if_refused(live, result, last_epoch))
        value = self._objective(result.best_valid_loss, result.best_valid_score)
        repeat_of = live.config.repeat_of
        self._search.tell(number, result.state, value=value, notes=optuna_notes(result, repeat_of))
        # Once the end is on record, and not before: until then the files are all there is of it.
        self._outbox.put(
            lambda: self._keeper.trial_ended(
                live.row_id,
                number,
                as_failed(live, result) if live.refused else result,
                self._folder,
                is_repeat=repeat_of is not None,
            )
        )
        self._count(result.state)
        if result.state in RANKED and value is not None:
            self._best_ranked = min(self._best_ranked, value if self.spec.objective == "loss" else -value)
        self._memory.learn(settings_of(live.config), result.micro_batch_size, result.provenance)
        self._tell_end(live.config, live.last, result)
        running = [other.last is not None for other in self._live.values()]
        self._follow(self._failures.ended(result, has_reported=live.last is not None, running=running))

    def _put(self, live: LiveTrial, write: Callable[[], None]) -> None:
        """Write something of a trial. What the store can never take ends that trial, not the study."""

        def put() -> None:
            if live.refused:
                return
            try:
                write()
            except StoreRefusedError as error:
                live.refused = str(error)

        self._outbox.put(put)

    def _fail_if_refused(self, live: LiveTrial, result: TrialResult, last_epoch: float | None) -> None:
        """Give a trial an end that the store accepts, where it refused its result."""
        if not live.refused:
            return
        failed = as_failed(live, result)
        self._store.finish_trial(live.row_id, failed, last_epoch=last_epoch)
        self._search.refuse(live.config.number, failed.reason)
        self._refused.append(result.state)
        self._note(f"trial {live.config.number} failed: {failed.reason}")

    def _at_rung(self, live: LiveTrial, point: Point, rung: int) -> Decision:
        value = live.best if self.spec.objective == "loss" else live.best_score
        number = live.config.number
        if value is None or not math.isfinite(value) or self._search.at_rung(number, rung, value):
            return Decision.CONTINUE
        place, reached = self._search.standing(number)
        evidence = {
            "rule": self.spec.prune.unpromising.rule,
            "epoch": point.epoch,
            "best": value,
            "place": place,
            "reached": reached,
        }
        self._decide(live, point, TrialState.PAUSED.value, Decision.PAUSE, evidence)
        return Decision.PAUSE

    def _promote(self, number: int, *, finish_in_s: float | None = None) -> TrialConfig:
        waiting = self._paused.pop(number)
        self.states[TrialState.PAUSED.value] -= 1
        return self._start(self._search.ask_again(number), waiting, finish_in_s=finish_in_s)

    def _give_up(self, number: int) -> None:
        """End a paused trial for good."""
        waiting = self._paused.pop(number)
        self.states[TrialState.PAUSED.value] -= 1
        last = waiting.last
        assert last is not None
        assert waiting.settings is not None
        place, reached = self._search.standing(number)
        result = TrialResult(
            state=TrialState.UNPROMISING,
            reason=f"behind the other trials at epoch {last.epoch:.4g} and never promoted ({place} of {reached})",
            seconds=last.seconds,
            **best_loss_of(waiting.best),
        )
        self._outbox.put(lambda: self._store.finish_trial(waiting.row_id(), result, last_epoch=last.epoch))
        value = self._objective(result.best_valid_loss, waiting.best_score)
        self._search.tell(number, result.state, value=value, notes=optuna_notes(result, None))
        self._outbox.put(
            lambda: self._keeper.trial_ended(waiting.row_id(), number, result, self._folder, is_repeat=False)
        )
        self._count(result.state)
        self._listen(
            TrialEnded(
                trial=number,
                result=result,
                last_epoch=last.epoch,
                epochs=waiting.settings["training"]["num_epochs"],
                params=self._search.params(number),
            )
        )

    def _requeue(self, number: int, reason: str, *, lost: bool = False) -> None:
        live = self._live.pop(number)
        self._put(live, lambda: self._store.requeue_trial(live.row_id, reason, lost=lost))
        self._search.tell(number, TrialState.INTERRUPTED, value=None, notes={"outcome": "interrupted", "why": reason})
        self._queue.appendleft(until_next_attempt(live))
        self._count(TrialState.INTERRUPTED)
        result = TrialResult(state=TrialState.INTERRUPTED, reason=reason, **self._last_known(live))
        self._tell_end(live.config, live.last, result)

    def _tell_end(self, config: TrialConfig, last: Point | None, result: TrialResult) -> None:
        self._listen(
            TrialEnded(
                trial=config.number,
                result=result,
                last_epoch=last.epoch if last else None,
                epochs=config.training.num_epochs,
                params=config.params,
            )
        )

    def _decide(self, live: LiveTrial, point: Point, verdict: str, action: Decision, evidence: dict[str, Any]) -> None:
        self._put(
            live,
            lambda: self._store.add_decision(
                live.row_id, evaluation=point.evaluation, verdict=verdict, action=action, evidence=evidence
            ),
        )

    def _follow(self, consequence: Consequence) -> None:
        if consequence.stop is not None:
            self.request_stop(consequence.stop, EXIT_TOO_MANY_FAILED)
        if consequence.pause is not None:
            self._note(
                f"{consequence.pause}. No new trial starts for {MOST_BACK_OFF_S:.0f} s; "
                f"`hpsearch retry {self.spec.name}` puts failed trials back once the cause is gone"
            )

    def _tell_exhausted(self, begun: int) -> None:
        if not self._has_told_exhausted:
            self._has_told_exhausted = True
            self._note(
                f"every setting of the search space has been tried: the study ends after {begun} trials of its "
                f"{self.spec.budget.trials} (`hpsearch finals {self.spec.name}` trains the best again with new seeds)"
            )

    def _has_room(self) -> bool:
        if self._disk.is_full:
            self._look_for_room()
        return not self._disk.is_full

    def _look_for_room(self) -> None:
        if self._disk.probe():
            self._note("there is room on the disk again; the study resumes")
        elif self._disk.has_run_out:
            self.request_stop(f"the disk of {self._folder} was full for {DISK_PATIENCE_S / 60:.0f} minutes", EXIT_IO)

    def _listen(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    def _note(self, text: str) -> None:
        self._listen(Note(text=text))

    def _objective(self, best_loss: float | None, best_score: float | None) -> float | None:
        return best_loss if self.spec.objective == "loss" else best_score

    def _last_known(self, live: LiveTrial) -> dict[str, Any]:
        """Device-seconds of a trial whose worker cannot tell them any more."""
        return {"seconds": live.last.seconds if live.last else self._now() - live.started}

    def _count(self, state: TrialState) -> None:
        self.states[state.value] = self.states.get(state.value, 0) + 1


_INTERRUPTED = TrialState.INTERRUPTED
