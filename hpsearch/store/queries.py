"""What commands read of trials: rows, curves, scores, the leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import sqlalchemy as sa

from hpsearch.errors import (
    UnknownStudyError,
)
from hpsearch.store.connection import Connection
from hpsearch.store.rows import (
    DecisionRow,
    LeadingTrial,
    PointRow,
    RankedTrial,
    ScoreRow,
    StateCount,
    StudyRow,
    TrialRow,
    WholeTrial,
)
from hpsearch.store.schema.tables import (
    DECISIONS,
    DETAILS,
    EXAMPLES,
    LEADERBOARD,
    POINTS,
    SCORES,
    STUDIES,
    TRIALS,
    UNFINISHED_STATES,
)


class Queries(Connection):
    def trials(self, study_id: int) -> list[TrialRow]:
        query = sa.select(TRIALS).where(TRIALS.c.study_id == study_id).order_by(TRIALS.c.number)
        return self._records(query, TrialRow)

    def counts(self, study_id: int) -> list[StateCount]:
        is_repeat = TRIALS.c.repeat_of.is_not(None)
        query = sa.select(TRIALS.c.state, is_repeat.label("is_repeat"), sa.func.count().label("trials"))
        query = query.where(TRIALS.c.study_id == study_id).group_by(TRIALS.c.state, is_repeat)
        return self._records(query.order_by(sa.func.min(TRIALS.c.number)), StateCount)

    def trial(self, study: StudyRow, number: int) -> TrialRow:
        """The trial of this number. Raises UnknownStudyError with the numbers that there are."""
        query = sa.select(TRIALS).where(TRIALS.c.study_id == study.id, TRIALS.c.number == number)
        rows = self._records(query, TrialRow)
        if not rows:
            last = max((row.number for row in self.trials(study.id)), default=None)
            there = "it has none yet" if last is None else f"it has trials 0 to {last}"
            raise UnknownStudyError(f"study '{study.name}' has no trial {number}; {there}")
        return rows[0]

    def whole_trial(self, row: TrialRow) -> WholeTrial:
        return WholeTrial(
            **vars(row),
            points=self.points(row.id),
            scores=self.scores(row.id),
            decisions=self.decisions(row.id),
            details=self.details(row.id),
        )

    def points(self, trial_id: int) -> list[PointRow]:
        query = sa.select(POINTS).where(POINTS.c.trial_id == trial_id).order_by(POINTS.c.evaluation)
        return self._records(query, PointRow)

    def scores(self, trial_id: int) -> list[ScoreRow]:
        query = sa.select(SCORES).where(SCORES.c.trial_id == trial_id).order_by(SCORES.c.metric.desc())
        return self._records(query, ScoreRow)

    def details(self, trial_id: int) -> dict[str, Any]:
        """What a task kept beside the scores of a trial, by kind."""
        rows = self._rows(sa.select(DETAILS).where(DETAILS.c.trial_id == trial_id))
        return {row["kind"]: row["content"] for row in rows}

    def examples(self, trial_ids: Sequence[int]) -> dict[int, bytes]:
        """Per-example test statistics (see `statistics.unpack`) of those of the trials that have them."""
        rows = self._rows(sa.select(EXAMPLES).where(EXAMPLES.c.trial_id.in_(trial_ids)))
        return {row["trial_id"]: row["content"] for row in rows}

    def with_examples(self, trial_ids: Sequence[int]) -> set[int]:
        """Those of the trials whose per-example test statistics are kept."""
        query = sa.select(EXAMPLES.c.trial_id).where(EXAMPLES.c.trial_id.in_(trial_ids))
        return {row["trial_id"] for row in self._rows(query)}

    def study_points(self, study_id: int) -> dict[int, list[PointRow]]:
        """Curves of all trials of a study, by row id."""
        ours = sa.select(TRIALS.c.id).where(TRIALS.c.study_id == study_id)
        query = sa.select(POINTS).where(POINTS.c.trial_id.in_(ours))
        curves: dict[int, list[PointRow]] = {}
        for row in self._records(query.order_by(POINTS.c.trial_id, POINTS.c.evaluation), PointRow):
            curves.setdefault(row.trial_id, []).append(row)
        return curves

    def orphans(self, *, remove: bool = False) -> dict[str, int]:
        """Rows by table that belong to no trial or study, counted, and removed if so wanted."""
        found: dict[str, int] = {}
        no_study = TRIALS.c.study_id.not_in(sa.select(STUDIES.c.id))
        conditions = [(TRIALS, no_study)] + [
            (table, table.c.trial_id.not_in(sa.select(TRIALS.c.id)))
            for table in (POINTS, SCORES, DECISIONS, DETAILS, EXAMPLES)
        ]
        with self._guarded(), self._engine.begin() as connection:
            for table, condition in conditions:
                count = connection.execute(sa.select(sa.func.count()).select_from(table).where(condition)).scalar_one()
                if count:
                    found[table.name] = count
                    if remove:
                        connection.execute(sa.delete(table).where(condition))
        return found

    def unfinished_bests(self, study_id: int, column: Literal["valid_loss", "valid_score"]) -> list[LeadingTrial]:
        """Trials that have not ended, repeats left out, with the point of the best validation value that each has."""
        best = sa.func.min(POINTS.c.valid_loss) if column == "valid_loss" else sa.func.max(POINTS.c.valid_score)
        ours = (
            sa.select(POINTS.c.trial_id, best.label("best"))
            .join(TRIALS, TRIALS.c.id == POINTS.c.trial_id)
            .where(TRIALS.c.study_id == study_id, TRIALS.c.state.in_(UNFINISHED_STATES), TRIALS.c.repeat_of.is_(None))
            .group_by(POINTS.c.trial_id)
            .subquery()
        )
        query = (
            sa.select(TRIALS.c.number.label("trial"), TRIALS.c.state, TRIALS.c.params)
            .add_columns(sa.func.min(POINTS.c.epoch).label("epoch"), ours.c.best.label("value"))
            .join(ours, ours.c.trial_id == TRIALS.c.id)
            .join(POINTS, sa.and_(POINTS.c.trial_id == ours.c.trial_id, POINTS.c[column] == ours.c.best))
            .group_by(TRIALS.c.number, TRIALS.c.state, TRIALS.c.params, ours.c.best)
            .order_by(TRIALS.c.number)
        )
        return self._records(query, LeadingTrial)

    def study_scores(self, study_id: int, metrics: Sequence[str] | None = None) -> dict[int, dict[str, ScoreRow]]:
        """Scores of all trials of a study, by trial number and metric; of these metrics, or all."""
        query = (
            sa.select(TRIALS.c.number, SCORES)
            .join(SCORES, SCORES.c.trial_id == TRIALS.c.id)
            .where(TRIALS.c.study_id == study_id)
        )
        if metrics is not None:
            query = query.where(SCORES.c.metric.in_(metrics))
        scores: dict[int, dict[str, ScoreRow]] = {}
        for row in self._rows(query):
            number = row.pop("number")
            scores.setdefault(number, {})[row["metric"]] = ScoreRow(**row)
        return scores

    def decisions(self, trial_id: int) -> list[DecisionRow]:
        query = sa.select(DECISIONS).where(DECISIONS.c.trial_id == trial_id).order_by(DECISIONS.c.id)
        return self._records(query, DecisionRow)

    def leaderboard(self, study: str, *, top: int | None = None) -> list[RankedTrial]:
        query = sa.select(LEADERBOARD).where(LEADERBOARD.c.study == study)
        places = (LEADERBOARD.c.test_rank, LEADERBOARD.c.valid_rank, LEADERBOARD.c.trial)
        return self._records(query.order_by(*places).limit(top), RankedTrial)
