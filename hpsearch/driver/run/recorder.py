"""What is written of trials: to the store, by way of the outbox, and to Optuna."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from hpsearch.driver.run.outbox import Outbox
from hpsearch.driver.run.trials import LiveTrial, WaitingTrial, as_failed, optuna_notes
from hpsearch.errors import StoreRefusedError
from hpsearch.files.storage import Folder
from hpsearch.records import Decision, Point, TrialResult, TrialState
from hpsearch.search.study import Search
from hpsearch.store.store import Store
from hpsearch.upkeep.retention import CheckpointKeeper


class Recorder:
    """Writes every event of a trial, in order. What the store can never take ends that trial, not the study."""

    def __init__(
        self,
        *,
        study_id: int,
        objective: str,
        store: Store,
        search: Search,
        outbox: Outbox,
        keeper: CheckpointKeeper,
        run: Folder,
        note: Callable[[str], None],
    ) -> None:
        self._study_id = study_id
        self._objective = objective
        self._store = store
        self._search = search
        self._outbox = outbox
        self._keeper = keeper
        self._run = run
        self._note = note
        self._refused: deque[TrialState] = deque()
        """Ends that the store did not take."""
        self._scored: dict[int, Callable[[], int]] = {}
        """Row ids of trials that are being scored."""

    def objective(self, best_loss: float | None, best_score: float | None) -> float | None:
        """What the search is told of a trial with these bests."""
        return best_loss if self._objective == "loss" else best_score

    def refused(self) -> Iterator[TrialState]:
        """Ends that the store has not taken since this was last asked: these trials have failed."""
        while self._refused:
            yield self._refused.popleft()

    def started(self, live: LiveTrial) -> None:
        def write() -> None:
            live.row_id = self._store.start_trial(self._study_id, live.config)

        self._put(live, write)

    def point(self, live: LiveTrial, point: Point) -> None:
        self._put(live, lambda: self._store.add_point(live.row_id, point))

    def decided(self, live: LiveTrial, point: Point, verdict: str, action: Decision, evidence: dict[str, Any]) -> None:
        self._put(
            live,
            lambda: self._store.add_decision(
                live.row_id, evaluation=point.evaluation, verdict=verdict, action=action, evidence=evidence
            ),
        )

    def paused(self, live: LiveTrial, reason: str) -> None:
        self._put(live, lambda: self._store.pause_trial(live.row_id, reason))
        self._search.pause(live.config.number)

    def requeued(self, live: LiveTrial, reason: str, *, lost: bool) -> None:
        self._put(live, lambda: self._store.requeue_trial(live.row_id, reason, lost=lost))
        notes = {"outcome": "interrupted", "why": reason}
        self._search.tell(live.config.number, TrialState.INTERRUPTED, value=None, notes=notes)

    def ended(self, live: LiveTrial, result: TrialResult) -> float | None:
        """Returns what the search was told of it."""
        number, repeat_of = live.config.number, live.config.repeat_of
        last_epoch = live.last.epoch if live.last else None
        self._put(live, lambda: self._store.finish_trial(live.row_id, result, last_epoch=last_epoch))
        self._outbox.put(lambda: self._fail_if_refused(live, result, last_epoch))
        value = self.objective(result.best_valid_loss, result.best_valid_score)
        self._search.tell(number, result.state, value=value, notes=optuna_notes(result, repeat_of))
        # Once the end is on record, and not before: until then the files are all there is of it.
        self._outbox.put(
            lambda: self._keeper.trial_ended(
                live.row_id,
                number,
                as_failed(live, result) if live.refused else result,
                self._run,
                is_repeat=repeat_of is not None,
            )
        )
        return value

    def never_promoted(self, waiting: WaitingTrial, result: TrialResult) -> None:
        number, last = waiting.number, waiting.last
        last_epoch = last.epoch if last else None
        self._outbox.put(lambda: self._store.finish_trial(waiting.row_id(), result, last_epoch=last_epoch))
        value = self.objective(result.best_valid_loss, waiting.best_score)
        self._search.tell(number, result.state, value=value, notes=optuna_notes(result, None))
        self._outbox.put(lambda: self._keeper.trial_ended(waiting.row_id(), number, result, self._run, is_repeat=False))

    def scoring_begun(self, live: LiveTrial, row_id: Callable[[], int]) -> None:
        self._outbox.put(lambda: self._store.begin_scoring(row_id(), live.config.attempt))
        self._scored[live.config.number] = row_id

    def scored(self, live: LiveTrial, result: TrialResult) -> None:
        row_id, last_epoch = self._scored.pop(live.config.number), live.last.epoch if live.last else None
        self._put(live, lambda: self._store.score_unfinished(row_id(), result, last_epoch=last_epoch))

    def _put(self, live: LiveTrial, write: Callable[[], None]) -> None:
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
