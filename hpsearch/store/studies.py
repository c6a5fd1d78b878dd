"""Studies in a store: made, changed from launch to launch, extended, archived."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from hpsearch.errors import (
    UnknownStudyError,
)
from hpsearch.store.connection import Connection
from hpsearch.store.rows import LeaseRow, NewStudy, RankedTrial, SpecRow, StudyRow, StudySummary
from hpsearch.store.schema.tables import LEADERBOARD, LEASES, SPECS, STUDIES, TRIALS, insert, now


class Studies(Connection):
    def add_study(self, study: NewStudy) -> StudyRow:
        """The study of this name: this one, or the one that another launch has added at the same moment."""
        with self._guarded(), self._engine.begin() as connection:
            values = {**asdict(study), "created_at": now(), "uid": secrets.token_hex(8)}
            statement = insert(connection, STUDIES).values(values).on_conflict_do_nothing()
            study_id = connection.execute(statement.returning(STUDIES.c.id)).scalar_one_or_none()
            if study_id is not None:
                _record_spec(connection, study_id, study.spec, study.fingerprint, study.budget_trials)
        return self.study(study.name)

    def update_study(self, study_id: int, *, overrides: list[str], placement: dict[str, Any]) -> None:
        """What may change from launch to launch of one study."""
        with self._guarded(), self._engine.begin() as connection:
            values = {"overrides": overrides, "placement": placement}
            connection.execute(sa.update(STUDIES).where(STUDIES.c.id == study_id).values(values))

    def extend_study(self, study_id: int, *, spec: dict[str, Any], fingerprint: str, budget_trials: int) -> None:
        """Make a new version of the spec the study's own; the older ones stay on record."""
        with self._guarded(), self._engine.begin() as connection:
            values = {"spec": spec, "fingerprint": fingerprint, "budget_trials": budget_trials}
            connection.execute(sa.update(STUDIES).where(STUDIES.c.id == study_id).values(values))
            _record_spec(connection, study_id, spec, fingerprint, budget_trials)

    def spec_versions(self, study_id: int) -> list[SpecRow]:
        """Every spec that the study has had, oldest first."""
        query = sa.select(SPECS).where(SPECS.c.study_id == study_id).order_by(SPECS.c.version)
        return self._records(query, SpecRow)

    def archive_study(self, study: StudyRow) -> str:
        """Give a study, in our tables and Optuna's, a name that says when it was archived; returns the name."""
        name = f"{study.name[:40]}.{now():%Y%m%d-%H%M%S-%f}"
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(sa.update(STUDIES).where(STUDIES.c.id == study.id).values(name=name))
            rename = sa.text("UPDATE studies SET study_name = :new WHERE study_name = :old")
            connection.execute(rename, {"new": name, "old": study.name})
        return name

    def find_study(self, name: str) -> StudyRow | None:
        rows = self._records(sa.select(STUDIES).where(STUDIES.c.name == name), StudyRow)
        return rows[0] if rows else None

    def study(self, name: str) -> StudyRow:
        """The study of this name. Raises UnknownStudyError with the names that there are."""
        row = self.find_study(name)
        if row is None:
            names = [str(known["name"]) for known in self._rows(sa.select(STUDIES.c.name).order_by(STUDIES.c.name))]
            there = f"studies in this store: {', '.join(names)}" if names else "this store holds no studies"
            raise UnknownStudyError(f"no study named '{name}' in {self.shown_url}; {there}")
        return row

    def studies(self) -> list[StudySummary]:
        """Every study with its number of trials by state, its lease holder and its best test score."""
        counts: dict[int, dict[str, int]] = {}
        for row in self._rows(
            sa.select(TRIALS.c.study_id, TRIALS.c.state, sa.func.count().label("count")).group_by(
                TRIALS.c.study_id, TRIALS.c.state
            )
        ):
            counts.setdefault(row["study_id"], {})[row["state"]] = row["count"]
        first = sa.select(LEADERBOARD).where(LEADERBOARD.c.test_rank == 1)
        first = first.order_by(LEADERBOARD.c.valid_rank.desc(), LEADERBOARD.c.trial.desc())
        best = {row.study: row for row in self._records(first, RankedTrial)}
        holders = {row.study_id: row for row in self._records(sa.select(LEASES), LeaseRow)}
        return [
            StudySummary(
                **row, states=counts.get(row["id"], {}), best=best.get(row["name"]), lease=holders.get(row["id"])
            )
            for row in self._rows(sa.select(STUDIES).order_by(STUDIES.c.created_at))
        ]


def _record_spec(
    connection: sa.Connection, study_id: int, spec: dict[str, Any], fingerprint: str, budget_trials: int
) -> None:
    last = sa.select(sa.func.coalesce(sa.func.max(SPECS.c.version), 0) + 1).where(SPECS.c.study_id == study_id)
    values = {"spec": spec, "fingerprint": fingerprint, "budget_trials": budget_trials, "recorded_at": now()}
    version = connection.execute(last).scalar_one()
    connection.execute(sa.insert(SPECS).values(study_id=study_id, version=version, **values))
