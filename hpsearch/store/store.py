"""The SQL study store: one method per event, and the reads behind every command.

Owns SQLAlchemy and our tables; Optuna's stand beside them in the same database. Only the driver of a study writes, and
`fence` holds it to that: no transaction of a driver that has lost its lease can change anything. Every write of a trial
may be repeated without harm, because a connection that breaks does not say whether its last commit was done.
SQLite runs in WAL mode with foreign keys and a busy timeout, so that readers and the Optuna dashboard never block it.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from hpsearch.errors import (
    LeaseLostError,
    StoreError,
    UnknownStudyError,
    UsageError,
)
from hpsearch.records import UNFINISHED, Point, TrialConfig, TrialResult, TrialState
from hpsearch.spec.redaction import hide_secrets, remember_secrets
from hpsearch.store import migrations
from hpsearch.store.engines import guarded, make_engine

_DRIVERS = {"sqlite": ("sqlite", "sqlite+pysqlite"), "postgresql": ("postgresql", "postgresql+psycopg")}
"""What a store's URL may begin with."""


class _Text(sa.types.TypeDecorator[str]):
    """Text that PostgreSQL and SQLite take, whatever it comes from: see `storable`."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return storable(value)  # type: ignore[no-any-return]


class _Json(sa.types.TypeDecorator[Any]):
    """JSON kept as text in SQLite and as JSONB in PostgreSQL, of what both take: see `storable`."""

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> Any:
        from sqlalchemy.dialects.postgresql import JSONB

        return dialect.type_descriptor(JSONB(none_as_null=True) if dialect.name == "postgresql" else sa.Text())

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        value = storable(value)
        return value if dialect.name == "postgresql" else json.dumps(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return json.loads(value) if isinstance(value, str) else value


class _Utc(sa.types.TypeDecorator[datetime]):
    """A time in UTC, also where the database keeps none of the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value.astimezone(UTC).replace(tzinfo=None) if value and dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


metadata = sa.MetaData()
_studies = sa.Table(
    "hpsearch_studies", metadata,
    sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("name", _Text(64)),
    sa.Column("task", _Text(32)), sa.Column("metric", _Text(32)), sa.Column("higher_is_better", sa.Boolean),
    sa.Column("spec", _Json), sa.Column("fingerprint", _Text(16)), sa.Column("overrides", _Json),
    sa.Column("budget_trials", sa.Integer), sa.Column("data", _Json), sa.Column("created_at", _Utc),
    sa.Column("objective", _Text(16)), sa.Column("placement", _Json), sa.Column("uid", _Text(32)),
)  # fmt: skip
_trials = sa.Table(
    "hpsearch_trials", metadata,
    sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("study_id", sa.BigInteger),
    sa.Column("number", sa.Integer), sa.Column("state", _Text(16)), sa.Column("reason", _Text),
    sa.Column("params", _Json), sa.Column("settings", _Json), sa.Column("seed", sa.BigInteger),
    sa.Column("attempt", sa.Integer), sa.Column("started_at", _Utc),
    sa.Column("ended_at", _Utc), sa.Column("device_seconds", sa.Double), sa.Column("host", _Text(255)),
    sa.Column("device", _Text(255)), sa.Column("last_epoch", sa.Double),
    sa.Column("best_evaluation", sa.Integer), sa.Column("best_epoch", sa.Double),
    sa.Column("best_valid_loss", sa.Double), sa.Column("num_parameters", sa.BigInteger),
    sa.Column("micro_batch_size", sa.Integer), sa.Column("checkpoint", _Text), sa.Column("error", _Text),
    sa.Column("provenance", _Json), sa.Column("repeat_of", sa.Integer), sa.Column("best_valid_score", sa.Double),
    sa.Column("losses", sa.Integer),
)  # fmt: skip
_points = sa.Table(
    "hpsearch_points", metadata,
    sa.Column("trial_id", sa.BigInteger, primary_key=True), sa.Column("evaluation", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.Double), sa.Column("step", sa.Integer), sa.Column("train_loss", sa.Double),
    sa.Column("valid_loss", sa.Double), sa.Column("learning_rate", sa.Double), sa.Column("tokens", sa.BigInteger),
    sa.Column("seconds", sa.Double), sa.Column("valid_score", sa.Double),
)  # fmt: skip
_scores = sa.Table(
    "hpsearch_scores", metadata,
    sa.Column("trial_id", sa.BigInteger, primary_key=True), sa.Column("metric", _Text(32), primary_key=True),
    sa.Column("value", sa.Double), sa.Column("low", sa.Double), sa.Column("high", sa.Double),
    sa.Column("n", sa.Integer), sa.Column("contract", _Json),
)  # fmt: skip
_decisions = sa.Table(
    "hpsearch_decisions", metadata,
    sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("trial_id", sa.BigInteger),
    sa.Column("evaluation", sa.Integer), sa.Column("verdict", _Text(16)), sa.Column("action", _Text(16)),
    sa.Column("evidence", _Json), sa.Column("decided_at", _Utc),
)  # fmt: skip
_details = sa.Table(
    "hpsearch_details", metadata,
    sa.Column("trial_id", sa.BigInteger, primary_key=True), sa.Column("kind", _Text(32), primary_key=True),
    sa.Column("content", _Json),
)  # fmt: skip
_examples = sa.Table(
    "hpsearch_examples", metadata,
    sa.Column("trial_id", sa.BigInteger, primary_key=True), sa.Column("content", sa.LargeBinary),
)  # fmt: skip
_leases = sa.Table(
    "hpsearch_leases", metadata,
    sa.Column("study_id", sa.BigInteger, primary_key=True), sa.Column("holder", _Text(255)),
    sa.Column("token", sa.BigInteger), sa.Column("beat", sa.BigInteger), sa.Column("acquired_at", _Utc),
    sa.Column("heartbeat_at", _Utc), sa.Column("process", _Json),
)  # fmt: skip
_specs = sa.Table(
    "hpsearch_specs", metadata,
    sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("study_id", sa.BigInteger),
    sa.Column("version", sa.Integer), sa.Column("spec", _Json), sa.Column("fingerprint", _Text(16)),
    sa.Column("budget_trials", sa.Integer), sa.Column("recorded_at", _Utc),
)  # fmt: skip
_leaderboard = sa.table(
    "hpsearch_leaderboard",
    *(sa.column(name) for name in (
        "study", "task", "test_rank", "valid_rank", "trial", "state", "metric", "score", "score_low", "score_high",
        "score_n", "test_perplexity", "test_bits_per_byte", "test_bleu", "test_f1", "valid_loss", "valid_score",
        "best_epoch", "last_epoch", "num_parameters", "device_seconds", "reason", "checkpoint",
    )),
    sa.column("params", _Json),
)  # fmt: skip

Row = dict[str, Any]
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_UNFINISHED = [state.value for state in UNFINISHED]


@dataclass(frozen=True, kw_only=True)
class NewStudy:
    """What is written when a study starts."""

    name: str
    task: str
    metric: str
    higher_is_better: bool
    spec: dict[str, Any]
    fingerprint: str
    overrides: list[str]
    budget_trials: int
    data: dict[str, Any]
    objective: str
    placement: dict[str, Any]
    """Where it runs (folder, resources, backend): no part of what it is."""


class Store:
    """A study store. Pickles as nothing: a process that needs one opens its own."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        """Open a store, making or upgrading its tables when `create`. Raises StoreError."""
        self.url = url
        self._engine = self._open_engine(url, create)
        with self._guarded():
            with self._engine.connect() as connection:
                found = migrations.version(connection)
            _refuse_newer(found, self.shown_url)
            if create and found < len(migrations.STEPS):
                with self._engine.begin() as connection:
                    migrations.migrate(connection)
            elif found == 0:
                raise StoreError(f"{self.shown_url} holds no studies: nothing has been launched into it yet")
            elif found < len(migrations.STEPS):
                raise StoreError(
                    f"the store {self.shown_url} has the older schema version {found}; "
                    "the next launch into it upgrades it"
                )

    @staticmethod
    def preflight(url: str) -> Literal["new", "old", "current"]:
        """What a launch would find, without writing: no tables yet, those of an older hpsearch, or ours.

        Raises StoreError when the store cannot be written, or was written by a newer hpsearch.
        """
        parsed = parse_url(url)
        file = _sqlite_file(parsed)
        if file is not None:
            if not file.parent.is_dir():
                raise StoreError(f"cannot write the store {url}: there is no folder {file.parent}")
            for place in (file, file.parent) if file.exists() else (file.parent,):
                if not os.access(place, os.W_OK) or file.is_dir():
                    raise StoreError(f"cannot write the store {url}: {place} is not a writable file or folder")
            if not file.exists():
                return "new"
        engine = make_engine(parsed, may_write=False)
        try:
            with guarded(url), engine.connect() as connection:
                found = migrations.version(connection)
        finally:
            engine.dispose()
        _refuse_newer(found, hide_secrets(url))
        if found == 0:
            return "new"
        return "current" if found == len(migrations.STEPS) else "old"

    @staticmethod
    def holds_other_study(url: str, name: str) -> bool:
        """Whether Optuna's tables in this database have a study of this name, which hpsearch has not made.

        Asked of a database in which our tables have none. Writes nothing. Raises StoreError.
        """
        parsed = parse_url(url)
        file = _sqlite_file(parsed)
        if file is not None and not file.exists():
            return False
        engine = make_engine(parsed, may_write=False)
        try:
            with guarded(url), engine.connect() as connection:
                if not sa.inspect(connection).has_table("studies"):
                    return False
                query = sa.text("SELECT 1 FROM studies WHERE study_name = :name")
                return connection.execute(query, {"name": name}).first() is not None
        finally:
            engine.dispose()

    @property
    def shown_url(self) -> str:
        """The URL with its secrets hidden: the only form that may be printed or logged."""
        return hide_secrets(self.url)

    def close(self) -> None:
        self._engine.dispose()

    def identities(self) -> list[str]:
        """What tells this database from every other, copies included; of two that share one, one is the other.

        An SQLite file keeps its number when it is moved, and its path when a backup is put in its place.
        """
        file = _sqlite_file(self._engine.url)
        if file is not None:
            status = file.stat()
            return [f"file {status.st_dev}:{status.st_ino}", f"path {file.resolve()}"]
        query = sa.text(
            "SELECT system_identifier, (SELECT oid FROM pg_database WHERE datname = current_database()) "
            "FROM pg_control_system()"
        )
        with self._guarded(), self._engine.connect() as connection:
            server, database = connection.execute(query).one()
        return [f"postgresql {server}/{database}"]

    # Studies

    def add_study(self, study: NewStudy) -> Row:
        """The study of this name: this one, or the one that another launch has added at the same moment."""
        with self._guarded(), self._engine.begin() as connection:
            values = {**asdict(study), "created_at": _now(), "uid": secrets.token_hex(8)}
            insert = _insert(connection, _studies).values(values).on_conflict_do_nothing()
            study_id = connection.execute(insert.returning(_studies.c.id)).scalar_one_or_none()
            if study_id is not None:
                _record_spec(connection, study_id, study.spec, study.fingerprint, study.budget_trials)
        return self.study(study.name)

    def update_study(self, study_id: int, *, overrides: list[str], placement: dict[str, Any]) -> None:
        """What may change from launch to launch of one study."""
        with self._guarded(), self._engine.begin() as connection:
            values = {"overrides": overrides, "placement": placement}
            connection.execute(sa.update(_studies).where(_studies.c.id == study_id).values(values))

    def extend_study(self, study_id: int, *, spec: dict[str, Any], fingerprint: str, budget_trials: int) -> None:
        """Make a new version of the spec the study's own; the older ones stay on record."""
        with self._guarded(), self._engine.begin() as connection:
            values = {"spec": spec, "fingerprint": fingerprint, "budget_trials": budget_trials}
            connection.execute(sa.update(_studies).where(_studies.c.id == study_id).values(values))
            _record_spec(connection, study_id, spec, fingerprint, budget_trials)

    def spec_versions(self, study_id: int) -> list[Row]:
        """Every spec that the study has had, oldest first."""
        return self._rows(sa.select(_specs).where(_specs.c.study_id == study_id).order_by(_specs.c.version))

    def archive_study(self, study: Row) -> str:
        """Give a study, in our tables and Optuna's, a name that says when it was put aside; returns the name."""
        name = f"{study['name'][:40]}.{_now():%Y%m%d-%H%M%S-%f}"
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(sa.update(_studies).where(_studies.c.id == study["id"]).values(name=name))
            rename = sa.text("UPDATE studies SET study_name = :new WHERE study_name = :old")
            connection.execute(rename, {"new": name, "old": study["name"]})
        return name

    def find_study(self, name: str) -> Row | None:
        rows = self._rows(sa.select(_studies).where(_studies.c.name == name))
        return rows[0] if rows else None

    def study(self, name: str) -> Row:
        """The study of this name. Raises UnknownStudyError with the names that there are."""
        row = self.find_study(name)
        if row is None:
            names = [str(known["name"]) for known in self._rows(sa.select(_studies.c.name).order_by(_studies.c.name))]
            there = f"studies in this store: {', '.join(names)}" if names else "this store holds no studies"
            raise UnknownStudyError(f"no study named '{name}' in {self.shown_url}; {there}")
        return row

    def studies(self) -> list[Row]:
        """Every study with its number of trials by state, its lease holder and its best test score."""
        counts: dict[int, dict[str, int]] = {}
        for row in self._rows(
            sa.select(_trials.c.study_id, _trials.c.state, sa.func.count().label("count")).group_by(
                _trials.c.study_id, _trials.c.state
            )
        ):
            counts.setdefault(row["study_id"], {})[row["state"]] = row["count"]
        first = sa.select(_leaderboard).where(_leaderboard.c.test_rank == 1)
        winners = self._rows(first.order_by(_leaderboard.c.valid_rank.desc(), _leaderboard.c.trial.desc()))
        best = {row["study"]: row for row in winners}
        holders = {row["study_id"]: row for row in self._rows(sa.select(_leases))}
        return [
            {
                **row,
                "states": counts.get(row["id"], {}),
                "best": best.get(row["name"]),
                "lease": holders.get(row["id"]),
            }
            for row in self._rows(sa.select(_studies).order_by(_studies.c.created_at))
        ]

    # Trials: the events of a study in flight

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
                "losses": 0,
                "repeat_of": config.repeat_of,
                "started_at": _now(),
                "provenance": {},
                **running,
            }
            insert = _insert(connection, _trials).values(values)
            upsert = insert.on_conflict_do_update(
                index_elements=["study_id", "number"], set_=running, where=_trials.c.state.in_(_UNFINISHED)
            )
            row_id = connection.execute(upsert.returning(_trials.c.id)).scalar()
            if row_id is None:
                raise StoreError(f"trial {config.number} has ended already, so it cannot run again")
            _forget_scores(connection, row_id)  # those of its last stop
            return int(row_id)

    def add_point(self, trial_id: int, point: Point) -> None:
        """Record a point of a curve; a run that was resumed from before it brings it again, and the new one stays."""
        with self._guarded(), self._engine.begin() as connection:
            values = {key: storable(value) for key, value in asdict(point).items()}
            insert = _insert(connection, _points).values(trial_id=trial_id, **values)
            connection.execute(insert.on_conflict_do_update(index_elements=["trial_id", "evaluation"], set_=values))

    def add_decision(
        self, trial_id: int, *, evaluation: int, verdict: str, action: str, evidence: dict[str, Any]
    ) -> None:
        with self._guarded(), self._engine.begin() as connection:
            again = sa.delete(_decisions).where(_decisions.c.trial_id == trial_id)
            connection.execute(again.where(_decisions.c.evaluation == evaluation, _decisions.c.verdict == verdict))
            connection.execute(
                sa.insert(_decisions).values(
                    trial_id=trial_id,
                    evaluation=evaluation,
                    verdict=verdict,
                    action=action,
                    evidence=evidence,
                    decided_at=_now(),
                )
            )

    def requeue_trial(self, trial_id: int, reason: str, *, lost: bool = False) -> None:
        """Put a trial that did not end back into the queue; `lost` counts against its retries."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(
                sa.update(_trials)
                .where(_trials.c.id == trial_id, _trials.c.state.in_(_UNFINISHED))
                .values(state=TrialState.INTERRUPTED.value, reason=reason, losses=_trials.c.losses + (1 if lost else 0))
            )

    def pause_trial(self, trial_id: int, reason: str) -> None:
        """Record that a trial waits at a rung, with its checkpoint."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(
                sa.update(_trials)
                .where(_trials.c.id == trial_id, _trials.c.state.in_(_UNFINISHED))
                .values(state=TrialState.PAUSED.value, reason=reason)
            )

    def reopen_trial(self, trial_id: int, reason: str) -> None:
        """Put a trial that failed back into the queue, with all its retries."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(
                sa.update(_trials)
                .where(_trials.c.id == trial_id, _trials.c.state == TrialState.FAILED.value)
                .values(state=TrialState.INTERRUPTED.value, reason=reason, losses=0, ended_at=None, error=None)
            )

    def finish_trial(self, trial_id: int, result: TrialResult, *, last_epoch: float | None) -> None:
        """Give a trial its end, with its scores. Raises StoreError when it has another one already."""
        with self._guarded(), self._engine.begin() as connection:
            updated = connection.execute(
                sa.update(_trials)
                .where(_trials.c.id == trial_id, _trials.c.state.in_(_UNFINISHED))
                .values(
                    state=result.state.value,
                    reason=result.reason,
                    ended_at=_now(),
                    checkpoint=result.checkpoint,
                    error=result.error,
                    **_measured(result, last_epoch),
                )
            )
            if updated.rowcount != 1:
                state = connection.execute(sa.select(_trials.c.state).where(_trials.c.id == trial_id)).scalar()
                if state == result.state.value:
                    return  # written by a commit whose answer was lost
                raise StoreError(f"trial row {trial_id} has ended already, so it cannot become {result.state}")
            _record_scores(connection, trial_id, result)

    def begin_scoring(self, trial_id: int, attempt: int) -> None:
        """Record that a folder of a trial that has not ended is in use: the one that its next scoring has."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(sa.update(_trials).where(_trials.c.id == trial_id).values(attempt=attempt))

    def score_unfinished(self, trial_id: int, result: TrialResult, *, last_epoch: float | None) -> None:
        """Give a trial that has not ended the scores of its best checkpoint; it stays paused or interrupted."""
        with self._guarded(), self._engine.begin() as connection:
            updated = connection.execute(
                sa.update(_trials)
                .where(_trials.c.id == trial_id, _trials.c.state.in_(_UNFINISHED))
                .values(**_measured(result, last_epoch))
            )
            if updated.rowcount == 1:
                _record_scores(connection, trial_id, result)

    def forget_checkpoint(self, trial_id: int) -> None:
        """Record that the checkpoint of a trial was collected."""
        with self._guarded(), self._engine.begin() as connection:
            connection.execute(sa.update(_trials).where(_trials.c.id == trial_id).values(checkpoint=None))

    # Reads

    def trials(self, study_id: int) -> list[Row]:
        return self._rows(sa.select(_trials).where(_trials.c.study_id == study_id).order_by(_trials.c.number))

    def counts(self, study_id: int) -> list[Row]:
        """How many `trials` there are in each `state`, those of finals (`is_repeat`) and others apart."""
        is_repeat = _trials.c.repeat_of.is_not(None)
        query = sa.select(_trials.c.state, is_repeat.label("is_repeat"), sa.func.count().label("trials"))
        query = query.where(_trials.c.study_id == study_id).group_by(_trials.c.state, is_repeat)
        return self._rows(query.order_by(sa.func.min(_trials.c.number)))

    def trial(self, study: Row, number: int) -> Row:
        rows = self._rows(sa.select(_trials).where(_trials.c.study_id == study["id"], _trials.c.number == number))
        if not rows:
            last = max((row["number"] for row in self.trials(study["id"])), default=None)
            there = "it has none yet" if last is None else f"it has trials 0 to {last}"
            raise UnknownStudyError(f"study '{study['name']}' has no trial {number}; {there}")
        return rows[0]

    def whole_trial(self, row: Row) -> Row:
        """The row of a trial with its curve (`points`), `scores`, `decisions` and `details`."""
        return {
            **row,
            "points": self.points(row["id"]),
            "scores": self.scores(row["id"]),
            "decisions": self.decisions(row["id"]),
            "details": self.details(row["id"]),
        }

    def points(self, trial_id: int) -> list[Row]:
        return self._rows(sa.select(_points).where(_points.c.trial_id == trial_id).order_by(_points.c.evaluation))

    def scores(self, trial_id: int) -> list[Row]:
        return self._rows(sa.select(_scores).where(_scores.c.trial_id == trial_id).order_by(_scores.c.metric.desc()))

    def details(self, trial_id: int) -> dict[str, Any]:
        """What a task kept beside the scores of a trial, by kind."""
        rows = self._rows(sa.select(_details).where(_details.c.trial_id == trial_id))
        return {row["kind"]: row["content"] for row in rows}

    def examples(self, trial_ids: Sequence[int]) -> dict[int, bytes]:
        """Per-example test statistics (see `statistics.unpack`) of those of the trials that have them."""
        rows = self._rows(sa.select(_examples).where(_examples.c.trial_id.in_(trial_ids)))
        return {row["trial_id"]: row["content"] for row in rows}

    def with_examples(self, trial_ids: Sequence[int]) -> set[int]:
        """Those of the trials whose per-example test statistics are kept."""
        query = sa.select(_examples.c.trial_id).where(_examples.c.trial_id.in_(trial_ids))
        return {row["trial_id"] for row in self._rows(query)}

    def study_points(self, study_id: int) -> dict[int, list[Row]]:
        """Curves of all trials of a study, by row id."""
        ours = sa.select(_trials.c.id).where(_trials.c.study_id == study_id)
        query = sa.select(_points).where(_points.c.trial_id.in_(ours))
        curves: dict[int, list[Row]] = {}
        for row in self._rows(query.order_by(_points.c.trial_id, _points.c.evaluation)):
            curves.setdefault(row["trial_id"], []).append(row)
        return curves

    def orphans(self, *, remove: bool = False) -> dict[str, int]:
        """Rows by table that belong to no trial or study, counted, and removed if so wanted."""
        found: dict[str, int] = {}
        no_study = _trials.c.study_id.not_in(sa.select(_studies.c.id))
        conditions = [(_trials, no_study)] + [
            (table, table.c.trial_id.not_in(sa.select(_trials.c.id)))
            for table in (_points, _scores, _decisions, _details, _examples)
        ]
        with self._guarded(), self._engine.begin() as connection:
            for table, condition in conditions:
                count = connection.execute(sa.select(sa.func.count()).select_from(table).where(condition)).scalar_one()
                if count:
                    found[table.name] = count
                    if remove:
                        connection.execute(sa.delete(table).where(condition))
        return found

    def unfinished_bests(self, study_id: int, column: Literal["valid_loss", "valid_score"]) -> list[Row]:
        """Trials that have not ended, repeats left out, with the point of the best validation value that each has."""
        best = sa.func.min(_points.c.valid_loss) if column == "valid_loss" else sa.func.max(_points.c.valid_score)
        ours = (
            sa.select(_points.c.trial_id, best.label("best"))
            .join(_trials, _trials.c.id == _points.c.trial_id)
            .where(_trials.c.study_id == study_id, _trials.c.state.in_(_UNFINISHED), _trials.c.repeat_of.is_(None))
            .group_by(_points.c.trial_id)
            .subquery()
        )
        query = (
            sa.select(_trials.c.number, _trials.c.state, _trials.c.params, sa.func.min(_points.c.epoch).label("epoch"))
            .add_columns(ours.c.best.label("value"))
            .join(ours, ours.c.trial_id == _trials.c.id)
            .join(_points, sa.and_(_points.c.trial_id == ours.c.trial_id, _points.c[column] == ours.c.best))
            .group_by(_trials.c.number, _trials.c.state, _trials.c.params, ours.c.best)
            .order_by(_trials.c.number)
        )
        return self._rows(query)

    def study_scores(self, study_id: int, metrics: Sequence[str] | None = None) -> dict[int, dict[str, Row]]:
        """Scores of all trials of a study, by trial number and metric; of these metrics, or all."""
        query = (
            sa.select(_trials.c.number, _scores)
            .join(_scores, _scores.c.trial_id == _trials.c.id)
            .where(_trials.c.study_id == study_id)
        )
        if metrics is not None:
            query = query.where(_scores.c.metric.in_(metrics))
        scores: dict[int, dict[str, Row]] = {}
        for row in self._rows(query):
            scores.setdefault(row["number"], {})[row["metric"]] = row
        return scores

    def decisions(self, trial_id: int) -> list[Row]:
        return self._rows(sa.select(_decisions).where(_decisions.c.trial_id == trial_id).order_by(_decisions.c.id))

    def leaderboard(self, study: str, *, top: int | None = None) -> list[Row]:
        query = sa.select(_leaderboard).where(_leaderboard.c.study == study)
        places = (_leaderboard.c.test_rank, _leaderboard.c.valid_rank, _leaderboard.c.trial)
        return self._rows(query.order_by(*places).limit(top))

    # Leases: one driver per study (see `leases`)

    def lease(self, study_id: int) -> Row | None:
        rows = self._rows(sa.select(_leases).where(_leases.c.study_id == study_id))
        return rows[0] if rows else None

    def leases(self) -> list[Row]:
        """Every lease that is held, with its study's name."""
        query = sa.select(_leases, _studies.c.name.label("study")).join(_studies, _studies.c.id == _leases.c.study_id)
        return self._rows(query.where(_leases.c.beat >= 0).order_by(_studies.c.name))

    def take_lease(
        self, study_id: int, *, holder: str, process: dict[str, Any], dead: tuple[int, int] | None = None
    ) -> int | None:
        """Take a lease that is free, or still at the (token, beat) of a `dead` holder.

        Returns the fencing token; None when somebody else holds it.
        """
        with self._guarded(), self._engine.begin() as connection:
            values = {"holder": holder, "process": process, "acquired_at": _now(), "heartbeat_at": _now()}
            first = _insert(connection, _leases).values(study_id=study_id, token=0, beat=-1, **values)
            connection.execute(first.on_conflict_do_nothing())
            is_free = _leases.c.beat < 0
            if dead is not None:
                is_free |= sa.and_(_leases.c.token == dead[0], _leases.c.beat == dead[1])
            taken = connection.execute(
                sa.update(_leases)
                .where(_leases.c.study_id == study_id, is_free)
                .values(token=_leases.c.token + 1, beat=0, **values)
                .returning(_leases.c.token)
            ).scalar()
            return None if taken is None else int(taken)

    def renew_lease(self, study_id: int, token: int) -> bool:
        """A beat of the heart; False when somebody else holds the lease by now."""
        return self._update_lease(study_id, token, beat=_leases.c.beat + 1)

    def release_lease(self, study_id: int, token: int) -> bool:
        return self._update_lease(study_id, token, beat=-1)

    def _update_lease(self, study_id: int, token: int, *, beat: Any) -> bool:
        with self._guarded(), self._engine.begin() as connection:
            updated = connection.execute(
                sa.update(_leases)
                .where(_leases.c.study_id == study_id, _leases.c.token == token)
                .values(beat=beat, heartbeat_at=_now())
            )
            return updated.rowcount == 1

    def fence(self, study_id: int, token: int) -> None:
        """From here on, change nothing through this store without the lease. Writes raise LeaseLostError."""
        fence(self._engine, study_id, token)

    # Plumbing

    def _rows(self, query: sa.Select[Any]) -> list[Row]:
        with self._guarded(), self._engine.connect() as connection:
            result = connection.execute(query)
            names = list(result.keys())
            return [dict(zip(names, row, strict=True)) for row in result]

    def _open_engine(self, url: str, create: bool) -> sa.Engine:
        parsed = parse_url(url)
        file = _sqlite_file(parsed)
        if file is not None and not file.exists() and not create:
            raise StoreError(
                f"there is no store at {hide_secrets(url)}; name the one that the study was launched with (--store or "
                "HPSEARCH_STORE)"
            )
        if file is not None and create:
            Store.preflight(url)
        return make_engine(parsed, may_write=create)

    def _guarded(self) -> AbstractContextManager[None]:
        return guarded(self.url)


def fence(engine: sa.Engine, study_id: int, token: int) -> None:
    """Begin every transaction of an engine (ours, or Optuna's) that changes something by proving the lease.

    The proof is an update of the lease's row, so it also keeps others from taking the lease until the transaction ends;
    and it is a beat of the heart. Kleppmann, How to do distributed locking, 2016 (fencing tokens).
    """
    prove = f"UPDATE hpsearch_leases SET beat = beat + 1 WHERE study_id = {int(study_id)} AND token = {int(token)}"

    @sa.event.listens_for(engine, "before_cursor_execute")
    def _before(connection: sa.Connection, cursor: Any, statement: str, *_: Any) -> None:
        kind = statement.lstrip()[:6].upper()
        if (
            connection.info.get("proved")
            or kind not in ("INSERT", "UPDATE", "DELETE")
            or "hpsearch_leases" in statement
        ):
            return
        proof = connection.connection.cursor()
        try:
            proof.execute(prove)
            held = proof.rowcount == 1
        finally:
            proof.close()
        if not held:
            raise LeaseLostError("another driver took the study over while this one was away")
        connection.info["proved"] = True

    def _end(connection: sa.Connection) -> None:
        if not connection.invalidated:  # one that is broken takes what is known of it along
            connection.info.pop("proved", None)

    sa.event.listen(engine, "commit", _end)
    sa.event.listen(engine, "rollback", _end)


def parse_url(url: str) -> sa.URL:
    """The URL of a store, its secrets remembered as such. Raises UsageError, StoreError."""
    remember_secrets(url)
    try:
        parsed = sa.make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise UsageError(
            f"cannot read the store URL '{hide_secrets(url)}'; expected sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from None
    except ImportError as error:
        raise StoreError(f"the store {hide_secrets(url)} needs a driver that is not installed: {error}") from None
    if parsed.get_backend_name() not in _DRIVERS:
        raise UsageError(f"a store is SQLite or PostgreSQL, not {parsed.get_backend_name()}")
    if parsed.drivername not in _DRIVERS[parsed.get_backend_name()]:
        backend = parsed.get_backend_name()
        raise UsageError(
            f"the store {hide_secrets(url)} names a driver that hpsearch does not use, {parsed.get_driver_name()}; "
            f"write {backend}://..."
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError("a store must outlive the launch, and SQLite's memory does not; write sqlite:///FILE")
    return parsed


def _sqlite_file(url: sa.URL) -> Path | None:
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _refuse_newer(version: int, shown_url: str) -> None:
    if version > len(migrations.STEPS):
        raise StoreError(
            f"the store {shown_url} has schema version {version}, written by a newer hpsearch; this one knows version "
            f"{len(migrations.STEPS)}. Upgrade hpsearch, or name another store with --store"
        )


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT."""
    from sqlalchemy.dialects import postgresql, sqlite

    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


def _record_spec(
    connection: sa.Connection, study_id: int, spec: dict[str, Any], fingerprint: str, budget_trials: int
) -> None:
    last = sa.select(sa.func.coalesce(sa.func.max(_specs.c.version), 0) + 1).where(_specs.c.study_id == study_id)
    values = {"spec": spec, "fingerprint": fingerprint, "budget_trials": budget_trials, "recorded_at": _now()}
    version = connection.execute(last).scalar_one()
    connection.execute(sa.insert(_specs).values(study_id=study_id, version=version, **values))


def _measured(result: TrialResult, last_epoch: float | None) -> dict[str, Any]:
    """What a worker has measured of a trial, by column."""
    names = (
        "host", "device", "best_evaluation", "best_epoch", "best_valid_loss", "best_valid_score", "num_parameters",
        "micro_batch_size", "provenance",
    )  # fmt: skip
    values = {name: getattr(result, name) for name in names}
    return {"device_seconds": result.seconds, "last_epoch": last_epoch, **values}


def _forget_scores(connection: sa.Connection, trial_id: int) -> None:
    for table in (_scores, _details, _examples):
        connection.execute(sa.delete(table).where(table.c.trial_id == trial_id))


def _record_scores(connection: sa.Connection, trial_id: int, result: TrialResult) -> None:
    """The scores of a trial, and what was kept beside them, in place of those that it had when it was stopped."""
    _forget_scores(connection, trial_id)
    for score in result.scores:
        connection.execute(sa.insert(_scores).values(trial_id=trial_id, **asdict(score)))
    for kind, content in result.details.items():
        connection.execute(sa.insert(_details).values(trial_id=trial_id, kind=kind, content=content))
    if result.examples is not None:
        connection.execute(sa.insert(_examples).values(trial_id=trial_id, content=result.examples))


def storable(value: Any) -> Any:
    """The value as both databases take it: numbers that are none become null, characters that are none U+FFFD.

    PostgreSQL has no NUL in its text, and half a surrogate pair is no UTF-8.
    """
    if isinstance(value, str):
        return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {storable(key): storable(child) for key, child in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [storable(child) for child in value]
    return value


def _now() -> datetime:
    return datetime.now(UTC)


@contextmanager
def opened_store(url: str, *, create: bool = False) -> Iterator[Store]:
    store = Store(url, create=create)
    try:
        yield store
    finally:
        store.close()
