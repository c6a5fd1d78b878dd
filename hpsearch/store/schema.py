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
STUDIES = sa.Table(
    "hpsearch_studies", metadata,
    sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("name", _Text(64)),
    sa.Column("task", _Text(32)), sa.Column("metric", _Text(32)), sa.Column("higher_is_better", sa.Boolean),
    sa.Column("spec", _Json), sa.Column("fingerprint", _Text(16)), sa.Column("overrides", _Json),
    sa.Column("budget_trials", sa.Integer), sa.Column("data", _Json), sa.Column("created_at", _Utc),
    sa.Column("objective", _Text(16)), sa.Column("placement", _Json), sa.Column("uid", _Text(32)),
)  # fmt: skip


TRIALS = sa.Table(
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


POINTS = sa.Table(
    "hpsearch_points", metadata,
    sa.Column("trial_id", sa.BigInteger, primary_key=True), sa.Column("evaluation", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.Double), sa.Column("step", sa.Integer), sa.Column("train_loss", sa.Double),
    sa.Column("valid_loss", sa.Double), sa.Column("learning_rate", sa.Double), sa.Column("tokens", sa.BigInteger),
    sa.Column("seconds", sa.Double), sa.Column("valid_score", sa.Double),
)  # fmt: skip


SCORES = sa.Table(
    "hpsearch_scores", metadata,
    sa.Column("trial_id", sa.BigInteger, primary_key=True), sa.Column("metric", _Text(32), primary_key=True),
    sa.Column("value", sa.Double), sa.Column("low", sa.Double), sa.Column("high", sa.Double),
    sa.Column("n", sa.Integer), sa.Column("contract", _Json),
)  # fmt: skip


DECISIONS = sa.Table(
    "hpsearch_decisions", metadata,
    sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("trial_id", sa.BigInteger),
    sa.Column("evaluation", sa.Integer), sa.Column("verdict", _Text(16)), sa.Column("action", _Text(16)),
    sa.Column("evidence", _Json), sa.Column("decided_at", _Utc),
)  # fmt: skip


DETAILS = sa.Table(
    "hpsearch_details", metadata,
    sa.Column("trial_id", sa.BigInteger, primary_key=True), sa.Column("kind", _Text(32), primary_key=True),
    sa.Column("content", _Json),
)  # fmt: skip


EXAMPLES = sa.Table(
    "hpsearch_examples", metadata,
    sa.Column("trial_id", sa.BigInteger, primary_key=True), sa.Column("content", sa.LargeBinary),
)  # fmt: skip


LEASES = sa.Table(
    "hpsearch_leases", metadata,
    sa.Column("study_id", sa.BigInteger, primary_key=True), sa.Column("holder", _Text(255)),
    sa.Column("token", sa.BigInteger), sa.Column("beat", sa.BigInteger), sa.Column("acquired_at", _Utc),
    sa.Column("heartbeat_at", _Utc), sa.Column("process", _Json),
)  # fmt: skip


SPECS = sa.Table(
    "hpsearch_specs", metadata,
    sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("study_id", sa.BigInteger),
    sa.Column("version", sa.Integer), sa.Column("spec", _Json), sa.Column("fingerprint", _Text(16)),
    sa.Column("budget_trials", sa.Integer), sa.Column("recorded_at", _Utc),
)  # fmt: skip


LEADERBOARD = sa.table(
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
UNFINISHED_STATES = [state.value for state in UNFINISHED]


def insert(connection: sa.Connection, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT."""
    from sqlalchemy.dialects import postgresql, sqlite

    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


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


def now() -> datetime:
    return datetime.now(UTC)
