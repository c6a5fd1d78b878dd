"""A study in flight: every event of a trial becomes rows. The only writer of the store.

Backends call the six events (`next_trial`, `on_progress`, `on_result`, `on_paused`, `on_stopped`, `on_lost`; one that
can lose its cluster has a seventh, `on_cluster_lost`) and take no decision of their own; whatever order and process the
trials ran in, the same events leave the same rows. Decisions are taken in memory and written through the outbox, so
that no event waits for the database. A trial that does not end goes back into the queue under its own number, and its
next attempt resumes from its last checkpoint; so does a paused trial that is promoted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any

from hpsearch.backends import GRACE_S
from hpsearch.driver.run.configs import TrialConfigs
from hpsearch.driver.run.disk import DISK_PATIENCE_S, DiskWait
from hpsearch.driver.run.endgame import Clock
from hpsearch.driver.run.ending import Ending
from hpsearch.driver.run.failures import MOST_BACK_OFF_S, Consequence, Failures
from hpsearch.driver.run.liveness import Watch, ask_to_leave, cause_in, last_words_of
from hpsearch.driver.run.outbox import Outbox
from hpsearch.driver.run.recorder import Recorder
from hpsearch.driver.run.recovery import Recovery
from hpsearch.driver.run.trials import LiveTrial, Repeat, Trials, WaitingTrial, best_loss_of, settings_of
from hpsearch.errors import EXIT_IO, EXIT_TOO_MANY_FAILED, HpsearchError
from hpsearch.files.layout import newest_first, run_folder
from hpsearch.files.ownership import Owner
from hpsearch.files.storage import Folder
from hpsearch.records import (
    PREEMPTED,
    RANKED,
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
from hpsearch.spec.study import StudySpec
from hpsearch.store.rows import StudyRow, TrialRow
from hpsearch.store.store import Store
from hpsearch.training.memory import PeakMemory
from hpsearch.upkeep.retention import CheckpointKeeper

SCORE_S = 60.0
SCORE_PART = 0.05
"""A study whose time is used up begins no scoring after this part of it, or SCORE_S if that is longer."""


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
        self._store = store
        self._search = search
        self._outbox = outbox
        self._folder = run_folder(spec.folder, study)
        owner.claim(self._folder)
        self._listeners = [listen]
        self._trials = Trials()
        self._has_told_exhausted = False
        self._failures = Failures(now)
        self._disk = DiskWait(self._folder, data, now)
        self._watch = Watch(spec.limits.stall_minutes)
        self._on_cluster_lost = on_cluster_lost
        self._memory = PeakMemory()
        self.scored: set[int] = set()
        """Trials that have not ended, and can be ranked all the same."""
        self._configs = TrialConfigs(spec, uid=study.uid, run=self._folder, data=data, owner=owner, threads=threads)
        self._recorder = Recorder(
            study_id=study.id,
            objective=spec.objective,
            store=store,
            search=search,
            outbox=outbox,
            keeper=CheckpointKeeper(store, study, spec.limits.keep_checkpoints, self._folder, remove=owner.remove),
            run=self._folder,
            note=self._note,
        )
        rows = [row for row in store.trials(study.id) if (row.repeat_of is not None) == (repeats is not None)]
        for row in rows:
            self._trials.count(TrialState(row.state))
            self._memory.learn(row.settings, row.micro_batch_size, row.provenance)
        clock = Clock(60 * spec.budget.minutes, self._now()) if spec.budget.minutes else None
        best = _best_ranked(rows, spec.objective, store.study_scores(study.id, [study.metric]))
        self._ending = Ending(self._trials, spec.objective, clock, best_ranked=best)
        recovery = Recovery(
            study=study,
            store=store,
            search=search,
            outbox=outbox,
            recorder=self._recorder,
            attempts=newest_first(self._folder),
            repeats=repeats,
        )
        recovery.take(rows, self._trials)
        self._repeats = recovery.repeats
        self._worker_deaths = recovery.worker_deaths
        self.resumed = len(self._trials.queue)

    def add_listener(self, listener: Listener) -> None:
        """Another one that hears the events of this launch from now on."""
        self._listeners.append(listener)

    @property
    def stop_reason(self) -> str | None:
        """Why the launch ends before its budget is used, if it does."""
        return self._ending.reason

    @property
    def stop_code(self) -> int | None:
        """Exit code of a launch that ends by itself before its budget is used."""
        return self._ending.code

    @property
    def states(self) -> dict[str, int]:
        """How many trials are in each state."""
        return self._trials.states

    @property
    def live(self) -> dict[int, Point | None]:
        """Running trials with their last point."""
        live = self._trials.live.items()
        return {number: trial.last for number, trial in live if not trial.config.scores_only}

    @property
    def num_finished(self) -> int:
        """Trials that count against the budget: ended in any state but interrupted."""
        return self._trials.num_finished

    @property
    def budget(self) -> int:
        """Trials that this launch should have finished in the end, those of earlier launches included."""
        if self._repeats is None:
            return self.spec.budget.trials
        return self.num_finished + len(self._trials.live) + len(self._trials.queue) + len(self._repeats)

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
        self._ending.begin(reason, code, self._now(), grace_s=grace_s, score_s=score_s)
        for live in list(self._trials.live.values()) if grace_s else ():
            ask_to_leave(live.config)

    def check_stop(self) -> None:
        """Raise StopRequestedError when the launch is to end and no trial is left, or its grace has run out.

        Raises the error of the outbox, too.
        """
        self.settle()
        if self._outbox.error is not None:
            raise self._outbox.error
        now = self._now()
        if self.stop_reason is None and self._ending.clock is not None:
            if now > self._ending.clock.deadline:
                self._end_in_time()
            elif not self._ending.is_near:
                self._look_at_the_clock(now)
        if self._disk.is_full and not self._trials.live:
            self._look_for_room()
        if self.stop_reason is not None and self._ending.is_over(now, may_score=self._may_score):
            raise StopRequestedError(self.stop_reason)

    def settle(self) -> None:
        """Count trials as failed whose ends the store did not take."""
        for state in self._recorder.refused():
            self._trials.uncount(state)
            self._trials.count(TrialState.FAILED)

    def find_silent(self) -> list[TrialConfig]:
        """Trials whose workers do not even run, so that they cannot end themselves after `limits.stall_minutes`."""
        return self._watch.silent(self._trials.live.values(), self._now())

    # The events

    def next_trial(self) -> TrialConfig | None:
        """The next trial to run: interrupted, promoted, new. None when there is none for now (see `is_waiting`).

        When nothing is left to run, the trials that were never promoted end.
        """
        if self.stop_reason is not None:
            return self._next_to_score()
        trials = self._trials
        if not self._has_room() or (self._failures.suspicion and trials.live) or self._failures.is_backing_off:
            return None
        if self._ending.is_near:
            return self._next_to_finish()
        if trials.queue:
            waiting = trials.take_queued()
            return self._start(self._search.ask_again(waiting.number), waiting)
        if self._repeats is not None:
            if not self._repeats:
                return None
            repeat = self._repeats.pop(0)
            suggestion = self._search.repeat(repeat.of, seed=repeat.seed)
            return self._start(suggestion, WaitingTrial(suggestion.number, seed=repeat.seed, repeat_of=repeat.of))
        if (promoted := self._search.promote()) is not None:
            return self._promote(promoted)
        begun = self.num_finished + len(trials.live) + len(trials.paused)
        if begun < self.spec.budget.trials and self._search.is_exhausted:
            self._tell_exhausted(begun)
        elif begun < self.spec.budget.trials:
            suggestion = self._search.ask()
            return self._start(suggestion, WaitingTrial(suggestion.number))
        if trials.paused and not trials.live:
            # Of a handful of trials none may be among the best third.
            has_winner = any(self.states.get(state.value) for state in RANKED)
            if (promoted := self._search.promote_leader(anyway=not has_winner)) is not None:
                return self._promote(promoted)
            for number in list(trials.paused):
                self._give_up(number)
        return None

    def on_progress(self, number: int, progress: Progress) -> Decision:
        """Record a point; STOP, or PAUSE at a rung, when the other trials show this one to be unpromising."""
        live = self._trials.live[number]
        if live.refused:
            live.last = progress.point
            return Decision.STOP
        self._failures.progressed()
        point, judgement = progress.point, progress.judgement
        self._recorder.point(live, point)
        if math.isfinite(point.valid_loss):
            live.best = min(live.best, point.valid_loss)
        if point.valid_score is not None:
            live.best_score = max(point.valid_score, -math.inf if live.best_score is None else live.best_score)
        stops = progress.stops
        if judgement.verdict != live.verdict or stops:
            live.verdict = judgement.verdict
            action = Decision.STOP if stops else Decision.CONTINUE
            self._recorder.decided(live, point, judgement.verdict, action, judgement.evidence.as_dict())
        unpromising = False
        value = self._recorder.objective(point.valid_loss, point.valid_score)
        if value is not None:
            step = max(1, round(point.epoch * self.spec.evaluations_per_epoch))
            unpromising = self._search.report(number, step=step, value=value)
        live.last = point
        if self._ending.clock is not None:
            self._ending.clock.learn(number, settings_of(live.config), epochs=point.epoch, seconds=point.seconds)
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
        self._recorder.decided(live, point, "unpromising", Decision.STOP, evidence)
        return Decision.STOP

    def on_result(self, number: int, result: TrialResult) -> None:
        """A trial that ended by itself, or that left with a checkpoint because it was asked to or found no room."""
        if self._trials.live[number].config.scores_only:
            self._end_scoring(number, result)
            return
        if result.lost_files and self._disk.is_away:
            if not self._disk.is_full:
                self._disk.begin(0)
                self._note(f"the study's data is away ({result.reason}): no new trial starts until it is back")
            self._requeue(number, "its data was away")
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
        live = self._trials.pause(number)
        assert live.last is not None
        place, reached = self._search.standing(number)
        reason = f"waits at epoch {live.last.epoch:.4g}: {place} of the {reached} trials that came so far"
        self._recorder.paused(live, reason)
        self._failures.clear()
        result = TrialResult(state=TrialState.PAUSED, reason=reason, **self._last_known(live))
        self._tell_end(live.config, live.last, result)
        if len(self._trials.paused) > self.spec.limits.keep_paused:
            self._give_up(self._search.worst())

    def on_stopped(self, number: int) -> None:
        """A trial that ended because `on_progress` answered STOP."""
        live = self._trials.live[number]
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
        live = self._trials.live[number]
        if live.config.scores_only:
            self._trials.live.pop(number)
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
        live = self._trials.live
        for number in [number for number, trial in live.items() if trial.config.scores_only]:
            live.pop(number)
        numbers = list(live)
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
        late = self._ending.look_at_the_clock(now)
        if self._ending.is_near:
            self._note(
                "the time that is left goes to the leading trials: they are brought to their ends, and none begins"
            )
        for live in late:
            ask_to_leave(live.config)  # the best of them resume at once, with a schedule that ends in time

    def _next_to_finish(self) -> TrialConfig | None:
        """The best of the trials that wait, with a schedule that ends in time."""
        now = self._now()
        chosen = self._ending.next_to_finish(now)
        if chosen is None:
            if self._trials.live:
                return None
            self._end_in_time()
            return self._next_to_score()
        assert self._ending.clock is not None
        left = self._ending.clock.left(now)
        if chosen.number in self._trials.paused:
            self._search.resume(chosen.number)
            return self._promote(chosen.number, finish_in_s=left)
        self._trials.take_queued(chosen)
        return self._start(self._search.ask_again(chosen.number), chosen, finish_in_s=left)

    @property
    def _may_score(self) -> bool:
        return self._repeats is None and not self._disk.is_full

    def _next_to_score(self) -> TrialConfig | None:
        """A trial that has not ended, to be scored as it is, once none trains any more."""
        if any(not live.config.scores_only for live in self._trials.live.values()):
            return None
        if not self._may_score or not self._ending.is_time_to_score(self._now()):
            return None
        waiting = self._ending.next_to_score()
        if waiting is None:
            return None
        config = self._configs.make(self._search.suggestion(waiting.number), waiting)
        live = self._live_trial(config.model_copy(update={"scores_only": True, "rungs": ()}), waiting)
        self._recorder.scoring_begun(live, waiting.row_id)
        return live.config

    def _end_scoring(self, number: int, result: TrialResult) -> None:
        live = self._trials.live.pop(number)
        if not result.scores:
            return
        self.scored.add(number)
        self._recorder.scored(live, result)
        self._note(f"trial {number} {result.reason}")

    # Below the events

    def _start(self, suggestion: Suggestion, waiting: WaitingTrial, *, finish_in_s: float | None = None) -> TrialConfig:
        config = self._configs.make(suggestion, waiting).model_copy(update={"finish_in_s": finish_in_s})
        self._recorder.started(self._live_trial(config, waiting))
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

    def _live_trial(self, config: TrialConfig, waiting: WaitingTrial) -> LiveTrial:
        live = LiveTrial(
            config=config, started=self._now(), last=waiting.last, best=waiting.best, best_score=waiting.best_score
        )
        self._trials.live[config.number] = live
        return live

    def _end(self, number: int, result: TrialResult) -> None:
        live = self._trials.live.pop(number)
        if live.last is not None and result.seconds < live.last.seconds:
            result = replace(result, seconds=live.last.seconds)
        value = self._recorder.ended(live, result)
        self._trials.count(result.state)
        if result.state in RANKED and value is not None:
            merit = value if self.spec.objective == "loss" else -value
            self._ending.best_ranked = min(self._ending.best_ranked, merit)
        self._memory.learn(settings_of(live.config), result.micro_batch_size, result.provenance)
        self._tell_end(live.config, live.last, result)
        running = [other.last is not None for other in self._trials.live.values()]
        self._follow(self._failures.ended(result, has_reported=live.last is not None, running=running))

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
        self._recorder.decided(live, point, TrialState.PAUSED.value, Decision.PAUSE, evidence)
        return Decision.PAUSE

    def _promote(self, number: int, *, finish_in_s: float | None = None) -> TrialConfig:
        waiting = self._trials.take_paused(number)
        return self._start(self._search.ask_again(number), waiting, finish_in_s=finish_in_s)

    def _give_up(self, number: int) -> None:
        """End a paused trial for good."""
        waiting = self._trials.take_paused(number)
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
        self._recorder.never_promoted(waiting, result)
        self._trials.count(result.state)
        self._listen(
            TrialEnded(
                metric=self.spec.ranking_metric,
                trial=number,
                result=result,
                last_epoch=last.epoch,
                epochs=waiting.settings["training"]["num_epochs"],
                params=self._search.params(number),
            )
        )

    def _requeue(self, number: int, reason: str, *, lost: bool = False) -> None:
        live = self._trials.requeue(number)
        self._recorder.requeued(live, reason, lost=lost)
        result = TrialResult(state=TrialState.INTERRUPTED, reason=reason, **self._last_known(live))
        self._tell_end(live.config, live.last, result)

    def _tell_end(self, config: TrialConfig, last: Point | None, result: TrialResult) -> None:
        self._listen(
            TrialEnded(
                metric=self.spec.ranking_metric,
                trial=config.number,
                result=result,
                last_epoch=last.epoch if last else None,
                epochs=config.training.num_epochs,
                params=config.params,
            )
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
            self._note("there is room on the disk again, and the data is there; the study resumes")
        elif self._disk.has_run_out:
            what = f"the disk of {self._folder} was full"
            if self._disk.is_away:
                what = f"the data of the study ({self._disk.data}) was away"
            self.request_stop(f"{what} for {DISK_PATIENCE_S / 60:.0f} minutes", EXIT_IO)

    def _listen(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    def _note(self, text: str) -> None:
        self._listen(Note(text=text))

    def _last_known(self, live: LiveTrial) -> dict[str, Any]:
        """Device-seconds of a trial whose worker cannot tell them any more."""
        return {"seconds": live.last.seconds if live.last else self._now() - live.started}


def _best_ranked(rows: Sequence[TrialRow], objective: str, scored: Container[int]) -> float:
    """The best objective of the trials that have a test score; lower is better."""
    sign = 1.0 if objective == "loss" else -1.0
    bests = (row.best_valid(objective) for row in rows if row.number in scored and row.state in RANKED)
    return min((sign * value for value in bests if value is not None), default=math.inf)
