"""The events of trials as writes, each of which may be repeated."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from hpsearch.errors import (
    StoreError,
)
from hpsearch.records import Point, TrialConfig, TrialResult, TrialState
from hpsearch.store.connection import Connection
from hpsearch.store.schema.tables import (
    DECISIONS,
    DETAILS,
    EXAMPLES,
    POINTS,
    SCORES,
    TRIALS,
    UNFINISHED_STATES,
    insert,
    now,
    storable,
)


class TrialEvents(Connection):
    def start_trial(self, study_id: int, config: TrialConfig) -> int:
        """Put a trial on record as running, for the first time or again; returns the row's id."""
        with self._guarded(), self._engine.begin() as connection:
            running = {"state": TrialState.RUNNING.value, "reason": "", "attempt": config.attempt}
            values = {
                "study_id": study_id,
                "number": config.number,
                "params": config.params,
                "settings": {"model": config.model.model_dump(), "training": config.training.model_dump()},
                "seed": config.seed,
                "worker_deaths": 0,
                "repeat_of": config.repeat_of,
                "started_at": now(),
                "provenance": {},
                **running,
            }
            statement = insert(connection, TRIALS).values(values)
            upsert = statement.on_conflict_do_update(
                index_elements=["study_id", "number"], set_=running, where=TRIALS.c.state.in_(UNFINISHED_STATES)
            )
            row_id = connection.execute(upsert.returning(TRIALS.c.id)).scalar()
            if row_id is None:
                raise StoreError(f"trial {config.number} has ended already, so it cannot run again")
            _forget_scores(connection, row_id)  # those of its last stop
            return int(row_id)

    def add_point(self, trial_id: int, point: Point) -> None:
        """Record a point of a curve; a run that was resumed from before it brings it again, and the new one stays."""
        with self._guarded(), self._engine.begin() as connection:
            values = {key: storable(value) for key, value in asdict(point).items()}
            statement = insert(connection, POINTS).values(trial_id=trial_id, **values)
            connection.execute(statement.on_conflict_do_update(index_elements=["trial_id", "evaluation"], set_=values))

    def add_decision(
        self, trial_id: int, *, evaluation: int, verdict: str, action: str, evidence: dict[str, Any]
    ) -> None:
        with self._guarded(), self._engine.begin() as connection:
            again = sa.delete(DECISIONS).where(DECISIONS.c.trial_id == trial_id)
            connection.execute(again.where(DECISIONS.c.evaluation == evaluation, DECISIONS.c.verdict == verdict))
            connection.execute(
                sa.insert(DECISIONS).values(
                    trial_id=trial_id,
                    evaluation=evaluation,
                    verdict=verdict,
                    action=action,
                    evidence=evidence,
                    decided_at=now(),
                )
            )

    def requeue_trial(self, trial_id: int, reason: str, *, lost: bool = False) -> None:
        """Put a trial that did not end back into the queue; `lost` counts against its retries."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(
                sa.update(TRIALS)
                .where(TRIALS.c.id == trial_id, TRIALS.c.state.in_(UNFINISHED_STATES))
                .values(
                    state=TrialState.INTERRUPTED.value,
                    reason=reason,
                    worker_deaths=TRIALS.c.worker_deaths + (1 if lost else 0),
                )
            )

    def pause_trial(self, trial_id: int, reason: str) -> None:
        """Record that a trial is paused at a rung, with its checkpoint."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(
                sa.update(TRIALS)
                .where(TRIALS.c.id == trial_id, TRIALS.c.state.in_(UNFINISHED_STATES))
                .values(state=TrialState.PAUSED.value, reason=reason)
            )

    def reopen_trial(self, trial_id: int, reason: str) -> None:
        """Put a trial that failed back into the queue, with all its retries."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(
                sa.update(TRIALS)
                .where(TRIALS.c.id == trial_id, TRIALS.c.state == TrialState.FAILED.value)
                .values(state=TrialState.INTERRUPTED.value, reason=reason, worker_deaths=0, ended_at=None, error=None)
            )

    def finish_trial(self, trial_id: int, result: TrialResult, *, last_epoch: float | None) -> None:
        """Give a trial its end, with its scores. Raises StoreError when it has another one already."""
        with self._guarded(), self._engine.begin() as connection:
            updated = connection.execute(
                sa.update(TRIALS)
                .where(TRIALS.c.id == trial_id, TRIALS.c.state.in_(UNFINISHED_STATES))
                .values(
                    state=result.state.value,
                    reason=result.reason,
                    ended_at=now(),
                    checkpoint=result.checkpoint,
                    error=result.error,
                    **_measured(result, last_epoch),
                )
            )
            if updated.rowcount != 1:
                state = connection.execute(sa.select(TRIALS.c.state).where(TRIALS.c.id == trial_id)).scalar()
                if state == result.state.value:
                    return  # written by a commit whose answer was lost
                raise StoreError(f"trial row {trial_id} has ended already, so it cannot become {result.state}")
            _record_scores(connection, trial_id, result)

    def begin_scoring(self, trial_id: int, attempt: int) -> None:
        """Record that a folder of a trial that has not ended is in use: the one that its next scoring has."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(sa.update(TRIALS).where(TRIALS.c.id == trial_id).values(attempt=attempt))

    def score_unfinished(self, trial_id: int, result: TrialResult, *, last_epoch: float | None) -> None:
        """Give a trial that has not ended the scores of its best checkpoint; it stays paused or interrupted."""
        with self._guarded(), self._engine.begin() as connection:
            updated = connection.execute(
                sa.update(TRIALS)
                .where(TRIALS.c.id == trial_id, TRIALS.c.state.in_(UNFINISHED_STATES))
                .values(**_measured(result, last_epoch))
            )
            if updated.rowcount == 1:
                _record_scores(connection, trial_id, result)

    def forget_checkpoint(self, trial_id: int) -> None:
        """Record that the checkpoint of a trial was collected."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(sa.update(TRIALS).where(TRIALS.c.id == trial_id).values(checkpoint=None))


def _measured(result: TrialResult, last_epoch: float | None) -> dict[str, Any]:
    """What a worker has measured of a trial, by column."""
    names = (
        "host",
        "device",
        "best_evaluation",
        "best_epoch",
        "best_valid_loss",
        "best_valid_score",
        "num_parameters",
        "micro_batch_size",
        "provenance",
    )
    values = {name: getattr(result, name) for name in names}
    return {"device_seconds": result.seconds, "last_epoch": last_epoch, **values}


def _forget_scores(connection: sa.Connection, trial_id: int) -> None:
    for table in (SCORES, DETAILS, EXAMPLES):
        connection.execute(sa.delete(table).where(table.c.trial_id == trial_id))


def _record_scores(connection: sa.Connection, trial_id: int, result: TrialResult) -> None:
    """The scores of a trial, and what was kept beside them, in place of those that it had when it was stopped."""
    _forget_scores(connection, trial_id)
    for score in result.scores:
        connection.execute(sa.insert(SCORES).values(trial_id=trial_id, **asdict(score)))
    for kind, content in result.details.items():
        connection.execute(sa.insert(DETAILS).values(trial_id=trial_id, kind=kind, content=content))
    if result.examples is not None:
        connection.execute(sa.insert(EXAMPLES).values(trial_id=trial_id, content=result.examples))
