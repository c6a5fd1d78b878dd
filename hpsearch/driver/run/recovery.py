"""What earlier launches left: trials in the store, in Optuna's tables and in folders, put back where they belong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from hpsearch.driver.run.outbox import Outbox
from hpsearch.driver.run.recorder import Recorder
from hpsearch.driver.run.trials import Repeat, Trials, WaitingTrial, point_of, settings_of
from hpsearch.files.storage import Folder
from hpsearch.records import UNFINISHED, TrialConfig, TrialState
from hpsearch.search.study import Search
from hpsearch.store.rows import StudyRow, TrialRow
from hpsearch.store.store import Store
from hpsearch.upkeep.retention import begun


class Recovery:
    """Recovers a study from its store and its folders alone. With `repeats` it is the finals that are recovered."""

    def __init__(
        self,
        *,
        study: StudyRow,
        store: Store,
        search: Search,
        outbox: Outbox,
        recorder: Recorder,
        attempts: Mapping[int, Sequence[Folder]],
        repeats: Sequence[Repeat] | None,
    ) -> None:
        """`attempts` are the folders of each trial, newest first."""
        self._study = study
        self._store = store
        self._search = search
        self._outbox = outbox
        self._recorder = recorder
        self._attempts = attempts
        self.repeats = None if repeats is None else list(repeats)
        """Those that are still to be begun, once `take` was called."""
        self.worker_deaths: dict[int, int] = {}
        """By trial, how often its worker died."""

    def take(self, rows: Sequence[TrialRow], trials: Trials) -> None:
        """Queue what an earlier launch did not end, and tell Optuna what it did not hear."""
        self._adopt()
        by_number = {row.number: row for row in self._store.trials(self._study.id)}
        for number in self._search.unfinished:
            self._tell(number, by_number.get(number), trials)
        for row in by_number.values():
            if TrialState(row.state) is TrialState.RUNNING:
                self._outbox.put(partial(self._store.requeue_trial, row.id, "its driver died"))
        for row in rows:
            state = TrialState(row.state)
            if row.number not in self._search.unfinished or state not in UNFINISHED:
                continue
            if state is TrialState.RUNNING:
                trials.uncount(state)
                trials.count(TrialState.INTERRUPTED)
            self.worker_deaths[row.number] = row.worker_deaths
            waiting = self._since(self._waiting(row))
            if state is TrialState.PAUSED:
                trials.paused[row.number] = waiting
            else:
                trials.queue.append(waiting)
        if self.repeats is not None:
            taken = {(waiting.repeat_of, waiting.seed) for waiting in trials.queue}
            self.repeats = [repeat for repeat in self.repeats if (repeat.of, repeat.seed) not in taken]
        trials.queue = deque(sorted(trials.queue, key=lambda waiting: waiting.number))

    def _adopt(self) -> None:
        """Find trials that were begun while the store was away: it does not know of them, but their folders do."""
        while (config := self._begun(self._search.size)) is not None:
            self._search.adopt(config.params, config.attributes or {})

    def _tell(self, number: int, row: TrialRow | None, trials: Trials) -> None:
        """Tell Optuna of a trial that it believes to be running or waiting."""
        state = TrialState(row.state) if row else TrialState.INTERRUPTED
        if state is TrialState.PAUSED:
            self._search.pause(number)
            return
        if state is TrialState.RUNNING:
            state = TrialState.INTERRUPTED
        value = self._recorder.objective(row.best_valid_loss, row.best_valid_score) if row else None
        self._search.tell(number, state, value=value, notes={"outcome": state.value})
        repeat = self._search.repeated(number)
        if row is None and (repeat is not None) == (self.repeats is not None):
            # The driver died between Optuna's row and ours.
            of, seed = repeat or (None, None)
            trials.queue.append(self._since(WaitingTrial(number, repeat_of=of, seed=seed)))
            trials.count(TrialState.INTERRUPTED)

    def _waiting(self, row: TrialRow) -> WaitingTrial:
        points = self._store.points(row.id)
        losses = [point.valid_loss for point in points if point.valid_loss is not None]
        scores = [point.valid_score for point in points if point.valid_score is not None]
        return WaitingTrial(
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
