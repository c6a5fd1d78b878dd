"""The tables of a store, and the types of their columns on each database."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from hpsearch.records import UNFINISHED
from hpsearch.store.schema.views import VIEWS


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


def _key() -> sa.Column[int]:
    """A number that the database gives out; SQLite does so for INTEGER keys only."""
    kind = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    return sa.Column("id", kind, sa.Identity(), primary_key=True)


def _required(name: str, kind: Any, *more: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, *more, nullable=False, **options)


def _of_study(**options: Any) -> sa.Column[int]:
    return sa.Column("study_id", sa.BigInteger, sa.ForeignKey("hpsearch_studies.id"), nullable=False, **options)


def _of_trial(**options: Any) -> sa.Column[int]:
    return sa.Column("trial_id", sa.BigInteger, sa.ForeignKey("hpsearch_trials.id"), nullable=False, **options)


VERSION = sa.Table("hpsearch_version", metadata, sa.Column("version_num", sa.String(32), primary_key=True))
"""As Alembic keeps it."""
META = sa.Table(
    "hpsearch_meta", metadata, sa.Column("key", sa.String(32), primary_key=True), _required("value", sa.String(255))
)
STUDIES = sa.Table(
    "hpsearch_studies",
    metadata,
    _key(),
    _required("name", _Text(64), unique=True),
    _required("task", _Text(255)),
    _required("metric", _Text(32)),
    _required("higher_is_better", sa.Boolean),
    _required("spec", _Json),
    _required("fingerprint", _Text(16)),
    _required("overrides", _Json),
    _required("budget_trials", sa.Integer),
    _required("data", _Json),
    _required("created_at", _Utc),
    _required("objective", _Text(32)),
    _required("placement", _Json),
    _required("uid", _Text(32)),
)
TRIALS = sa.Table(
    "hpsearch_trials",
    metadata,
    _key(),
    _of_study(),
    _required("number", sa.Integer),
    _required("state", _Text(16)),
    _required("reason", _Text),
    _required("params", _Json),
    _required("settings", _Json),
    _required("seed", sa.BigInteger),
    _required("attempt", sa.Integer),
    _required("worker_deaths", sa.Integer),
    sa.Column("repeat_of", sa.Integer),
    _required("started_at", _Utc),
    sa.Column("ended_at", _Utc),
    sa.Column("device_seconds", sa.Double),
    sa.Column("host", _Text(255)),
    sa.Column("device", _Text(255)),
    sa.Column("last_epoch", sa.Double),
    sa.Column("best_evaluation", sa.Integer),
    sa.Column("best_epoch", sa.Double),
    sa.Column("best_valid_loss", sa.Double),
    sa.Column("best_valid_score", sa.Double),
    sa.Column("num_parameters", sa.BigInteger),
    sa.Column("micro_batch_size", sa.Integer),
    sa.Column("checkpoint", _Text),
    sa.Column("error", _Text),
    _required("provenance", _Json),
    sa.UniqueConstraint("study_id", "number"),
)
POINTS = sa.Table(
    "hpsearch_points",
    metadata,
    _of_trial(primary_key=True),
    sa.Column("evaluation", sa.Integer, primary_key=True),
    _required("epoch", sa.Double),
    _required("step", sa.Integer),
    sa.Column("train_loss", sa.Double),
    sa.Column("valid_loss", sa.Double),
    sa.Column("valid_score", sa.Double),
    _required("learning_rate", sa.Double),
    _required("tokens", sa.BigInteger),
    _required("seconds", sa.Double),
)
SCORES = sa.Table(
    "hpsearch_scores",
    metadata,
    _of_trial(primary_key=True),
    sa.Column("metric", _Text(32), primary_key=True),
    _required("value", sa.Double),
    _required("low", sa.Double),
    _required("high", sa.Double),
    _required("n", sa.Integer),
    _required("contract", _Json),
)
DECISIONS = sa.Table(
    "hpsearch_decisions",
    metadata,
    _key(),
    _of_trial(index=True),
    _required("evaluation", sa.Integer),
    _required("verdict", _Text(16)),
    _required("action", _Text(16)),
    _required("evidence", _Json),
    _required("decided_at", _Utc),
)
DETAILS = sa.Table(
    "hpsearch_details",
    metadata,
    _of_trial(primary_key=True),
    sa.Column("kind", _Text(32), primary_key=True),
    _required("content", _Json),
)
EXAMPLES = sa.Table("hpsearch_examples", metadata, _of_trial(primary_key=True), _required("content", sa.LargeBinary))
LEASES = sa.Table(
    "hpsearch_leases",
    metadata,
    _of_study(primary_key=True),
    _required("holder", _Text(255)),
    _required("token", sa.BigInteger),
    _required("beat", sa.BigInteger),
    _required("acquired_at", _Utc),
    _required("heartbeat_at", _Utc),
    sa.Column("process", _Json),
)
SPECS = sa.Table(
    "hpsearch_specs",
    metadata,
    _key(),
    _of_study(),
    _required("version", sa.Integer),
    _required("spec", _Json),
    _required("fingerprint", _Text(16)),
    _required("budget_trials", sa.Integer),
    _required("recorded_at", _Utc),
    sa.UniqueConstraint("study_id", "version"),
)
LEADERBOARD = (
    sa.text(VIEWS["hpsearch_leaderboard"])
    .columns(
        *(
            sa.column(name)
            for name in (
                "study",
                "task",
                "test_rank",
                "valid_rank",
                "trial",
                "state",
                "metric",
                "score",
                "score_low",
                "score_high",
                "score_n",
                "test_perplexity",
                "test_bits_per_byte",
                "test_bleu",
                "test_f1",
                "valid_loss",
                "valid_score",
                "best_epoch",
                "last_epoch",
                "num_parameters",
                "device_seconds",
                "reason",
                "checkpoint",
            )
        ),
        sa.column("params", _Json),
    )
    .subquery("leaderboard")
)

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
UNFINISHED_STATES = [state.value for state in UNFINISHED]


def insert(connection: sa.Connection, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT."""
    from sqlalchemy.dialects import postgresql, sqlite

    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


def storable(value: Any) -> Any:
    """The value as both databases take it: NaN and infinity become NULL, characters that are not Unicode U+FFFD.

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


def now() -> datetime:
    return datetime.now(UTC)
