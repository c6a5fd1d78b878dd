"""How a launch ends before its trials have: when it is over, and what is scored as it is."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from hpsearch.driver.run.endgame import Clock
from hpsearch.driver.run.trials import LiveTrial, Trials, WaitingTrial, settings_of


class Ending:
    """Why and when a launch ends. While there is no reason, it does not."""

    def __init__(self, trials: Trials, objective: str, clock: Clock | None, *, best_ranked: float) -> None:
        """`best_ranked` is the objective of the best trial that has a test score; lower is better."""
        self._trials = trials
        self._objective = objective
        self.clock = clock
        self.best_ranked = best_ranked
        self.reason: str | None = None
        self.code: int | None = None
        """Exit code of a launch that ended by itself before its budget was used."""
        self.is_near = False
        """Whether the time that is left goes to the leading trials alone."""
        self._grace_until = math.inf
        self._score_until = math.inf
        self._to_score: deque[WaitingTrial] | None = None
        """Trials that have not ended, whose best checkpoints are to be scored; known when none trains any more."""

    def begin(self, reason: str, code: int | None, now: float, *, grace_s: float, score_s: float | None) -> None:
        """Begin the end: running trials may take `grace_s` to leave, and scorings begin within `score_s`."""
        self.code = code
        self._grace_until = now + grace_s
        self._score_until = now + (grace_s if score_s is None else score_s)
        self.reason = reason

    def is_over(self, now: float, *, may_score: bool) -> bool:
        """Whether a launch that was asked to stop has nothing to wait for any more."""
        live = self._trials.live.values()
        if any(not trial.config.scores_only for trial in live):
            return now > self._grace_until
        if live:
            return now > max(self._score_until, self._grace_until)
        return not (may_score and self.is_time_to_score(now)) or not self._unscored()

    def is_time_to_score(self, now: float) -> bool:
        return now < self._score_until

    def next_to_score(self) -> WaitingTrial | None:
        """The best of the trials that have not ended and were not scored yet."""
        return self._unscored().popleft() if self._unscored() else None

    def _unscored(self) -> deque[WaitingTrial]:
        """Trials that have not ended and could be ranked, best first. When somebody waits, the one that could win."""
        if self._to_score is None:
            unfinished = [one for one in self._trials.waiting if math.isfinite(one.merit(self._objective))]
            found = sorted(unfinished, key=lambda one: one.merit(self._objective))
            if self._score_until == self._grace_until:
                found = [one for one in found if one.merit(self._objective) < self.best_ranked][:1]
            self._to_score = deque(found)
        return self._to_score

    # As the time runs out

    def look_at_the_clock(self, now: float) -> list[LiveTrial]:
        """Whether the leading trial needs what time is left, so that the end `is_near`: see `endgame`.

        Returns the running trials that would not come to their end by then.
        """
        leader = min(self._unfinished(), key=lambda trial: trial[0], default=None)
        clock = self.clock
        if clock is None or leader is None or not clock.is_short(now, leader[1], leader[2]):
            return []
        self.is_near = True
        late = []
        for live in self._trials.live.values():
            settings, epoch = settings_of(live.config), live.last.epoch if live.last else 0.0
            if (clock.needed(settings, epoch) or math.inf) > clock.left(now):
                late.append(live)
        return late

    def next_to_finish(self, now: float) -> WaitingTrial | None:
        """The best of the trials that wait, if there is time to bring one to its end."""
        waiting = [one for one in self._trials.waiting if math.isfinite(one.merit(self._objective))]
        if self.clock is None or not self.clock.is_worth_a_start(now) or not waiting:
            return None
        return min(waiting, key=lambda one: one.merit(self._objective))

    def _unfinished(self) -> list[tuple[float, dict[str, Any], float]]:
        """Best objective (lower is better), settings and epoch of each trial that has a curve and has not ended."""
        trials: list[tuple[LiveTrial | WaitingTrial, dict[str, Any] | None]] = [
            *((live, settings_of(live.config)) for live in self._trials.live.values()),
            *((waiting, waiting.settings) for waiting in self._trials.waiting),
        ]
        return [
            (trial.merit(self._objective), settings, trial.last.epoch)
            for trial, settings in trials
            if settings is not None and trial.last is not None
        ]
