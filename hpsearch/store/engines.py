"""How a database is reached, ours and Optuna's alike: connections that never wait forever, and what errors mean.

A link may hang without a word, so that the server's own limits help nobody: a statement is given up by this side, too.
The limits of the server are set in each transaction, not in the session, which a pooler (PgBouncer) would not keep; for
the same reason nothing is prepared.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, OperationalError, StatementError
from sqlalchemy.pool import NullPool

from hpsearch.errors import StoreAwayError, StoreError, StoreRefusedError
from hpsearch.spec.redaction import hide_secrets

BUSY_TIMEOUT_S = 30
"""What SQLite waits for a lock."""
CONNECT_S = 10
ANSWER_S = 15.0
"""A server that says nothing for so long, connected as it is, is away."""
LOCK_S = 6
"""How long the server waits for a lock. The second of two waiters for one row waits twice: for its turn, then for the
row. Both together are less than ANSWER_S, so that the server reports what is wrong."""
_STATEMENT_S = 60
"""What the server works for an answer that nobody may be waiting for any more."""
_GHOST_S = 30
"""What the server keeps the locks of a transaction whose driver is silent: its link may be gone."""
_CANCEL_S = 2.0
_AWAY = ("08", "53", "57", "58", "40", "25006", "25P03", "25P04", "55P03")
"""How the SQLSTATEs begin of what may pass: the link, a lack of resources, an operator, the system, a conflict; read
only (a failover), idle for too long, locked."""
_READ_ONLY = "25006"


def make_engine(url: sa.URL, *, may_write: bool = True) -> sa.Engine:
    engine = sa.create_engine(url, **engine_options(url, may_write=may_write))
    set_limits(engine)
    return engine


def engine_options(url: sa.URL, *, may_write: bool = True) -> dict[str, Any]:
    """What `create_engine` must be given, whoever calls it; its engine then needs `set_limits`."""
    kind: Any = url.get_dialect()
    arguments, options = kind(dbapi=kind.import_dbapi()).create_connect_args(url)
    if kind.name == "sqlite":
        if os.access(Path(url.database or "").absolute().parent, os.W_OK):
            return {"creator": partial(_open_sqlite, *arguments, may_write=may_write, **options)}
        # Whether somebody writes a file that this process cannot lock is looked up each time.
        return {"creator": partial(_read_sqlite, *arguments, **options), "poolclass": NullPool}
    if kind.driver != "psycopg":
        return {"pool_pre_ping": True}
    limits = {
        "connect_timeout": CONNECT_S,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": int(1000 * ANSWER_S),
        "prepare_threshold": None,
    }
    return {"creator": partial(_connection_kind().connect, *arguments, **{**limits, **options}), "pool_pre_ping": True}


def set_limits(engine: sa.Engine) -> None:
    """Let the server give up what waits too long, and leave a server that only reads."""
    if engine.dialect.name != "postgresql":
        return
    limits = {"lock": LOCK_S, "statement": _STATEMENT_S, "idle_in_transaction_session": _GHOST_S}
    statement = ";".join(f"SET LOCAL {name}_timeout = '{seconds}s'" for name, seconds in limits.items())

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(statement)

    @sa.event.listens_for(engine, "handle_error")
    def _leave(context: sa.ExceptionContext) -> None:
        # After a failover the same name leads to another server.
        if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
            context.is_disconnect = True


@contextmanager
def guarded(url: str, *wrappers: type[Exception]) -> Iterator[None]:
    """Raise what a database raises as StoreAwayError, StoreRefusedError or StoreError.

    `wrappers` are errors of others that have the database's as their cause.
    """
    try:
        yield
    except (StatementError, OverflowError, UnicodeError) as error:
        raise _kind_of(error)(_unusable(url, error)) from error
    except wrappers as error:
        raise _kind_of(error.__cause__)(_unusable(url, error.__cause__ or error)) from error


def _unusable(url: str, error: BaseException) -> str:
    said = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return f"the store {hide_secrets(url)} cannot be used: {hide_secrets(said.splitlines()[0])}"


def _kind_of(error: BaseException | None) -> type[StoreError]:
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    if state is not None and state.startswith(_AWAY):
        return StoreAwayError
    if isinstance(error, (DataError, IntegrityError, OverflowError, UnicodeError)):
        return StoreRefusedError
    if isinstance(error, DBAPIError):
        # A server that was not reached has no state to tell, and SQLite never has one.
        is_away = isinstance(error, (OperationalError, InterfaceError)) or error.connection_invalidated
        return StoreAwayError if state is None and is_away else StoreError
    return StoreRefusedError if isinstance(error, StatementError) else StoreAwayError


def _open_sqlite(*arguments: Any, may_write: bool, **options: Any) -> sqlite3.Connection:
    """A connection with the settings that a shared SQLite file needs."""
    connection: sqlite3.Connection = sqlite3.connect(*arguments, **options)
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
    connection.execute("PRAGMA foreign_keys = ON")
    if may_write:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _read_sqlite(file: str, **options: Any) -> sqlite3.Connection:
    """A connection to a file in a folder where SQLite's own files beside it cannot be made."""
    log = Path(f"{file}-wal")
    # Without a log nobody writes, and SQLite takes our word for it.
    mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
    connection: sqlite3.Connection = sqlite3.connect(
        f"{Path(file).resolve().as_uri()}?{mode}", **{**options, "uri": True}
    )
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        raise sqlite3.OperationalError(
            f"{error}; {log.parent} cannot be written, as it must be to read {log.name}: copy both files elsewhere"
            if log.exists()
            else str(error)
        ) from error
    return connection


@cache
def _connection_kind() -> Any:
    """psycopg's connection, with a limit to its patience. A function, so that a store on SQLite imports no psycopg."""
    import psycopg

    class Connection(psycopg.Connection[Any]):
        def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return super().wait(_heard_from(gen, self._give_up), *arguments, **options)
            except KeyboardInterrupt:
                self.close()
                raise

        def _give_up(self) -> None:
            with suppress(psycopg.Error):
                self.cancel_safe(timeout=_CANCEL_S)
            self.close()
            raise psycopg.OperationalError(f"no answer from the server for {ANSWER_S:.0f} s")

    return Connection


def _heard_from(gen: Generator[Any, Any, Any], give_up: Callable[[], None]) -> Generator[Any, Any, Any]:
    """What psycopg waits for, given up when there is no news for ANSWER_S: an answer may be long, but not silence."""
    heard = time.monotonic()
    ready = None
    while True:
        try:
            awaited = gen.send(ready)
        except StopIteration as end:
            return end.value
        ready = yield awaited
        now = time.monotonic()
        if ready:
            heard = now
        elif now - heard > ANSWER_S:
            give_up()
