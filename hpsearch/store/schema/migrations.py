"""Tables made, and upgraded from what an earlier hpsearch left, by Alembic with a version table of our own.

A new store is made as `schema` says. A change after a release is a revision in `alembic/versions` as well, and its name
stands at the end of REVISIONS. Optuna's tables are Optuna's own.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, insert, inspect, select, text, update

from hpsearch.store.schema import views
from hpsearch.store.schema.tables import META, VERSION, metadata

REVISIONS = ("0001",)
"""Every revision, oldest first; what reading commands know without Alembic."""
UNRELEASED = "unreleased"
"""The version of a store that was made before the first release."""
SCRIPTS = Path(__file__).with_name("alembic")
_ADVISORY_LOCK = 0x68707365617263
"""Any number of our own ("hpsearc"): PostgreSQL's lock against two processes migrating at once."""
_VIEWS = "views"
"""Key of the fingerprint of the views that there are."""


def version(connection: Connection) -> str | None:
    """The revision of a store; None for a database that is not one yet."""
    there = inspect(connection)
    if there.has_table(VERSION.name):
        found: str | None = connection.execute(select(VERSION.c.version_num)).scalar()
        return found
    return UNRELEASED if there.has_table("hpsearch_schema") else None


def is_current(connection: Connection) -> bool:
    """Whether tables and views are as this hpsearch makes them."""
    return version(connection) == REVISIONS[-1] and _views_of(connection) == views.FINGERPRINT


def migrate(connection: Connection) -> None:
    """Bring tables and views up to date, inside the caller's transaction."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    else:
        # Python's driver begins no transaction before a CREATE, and two first launches would both make the tables.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    found = version(connection)
    if found is None:
        metadata.create_all(connection)
        connection.execute(insert(VERSION).values(version_num=REVISIONS[-1]))
    elif found != REVISIONS[-1]:
        _upgrade(connection)
    before = _views_of(connection)
    if before != views.FINGERPRINT:
        views.refresh(connection)
        statement = insert(META) if before is None else update(META).where(META.c.key == _VIEWS)
        connection.execute(statement.values(key=_VIEWS, value=views.FINGERPRINT))


def _views_of(connection: Connection) -> str | None:
    found: str | None = connection.execute(select(META.c.value).where(META.c.key == _VIEWS)).scalar()
    return found


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
