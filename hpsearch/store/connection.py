"""An open store: its engine, its tables, and the guard around everything that is asked of it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import sqlalchemy as sa

from hpsearch.errors import (
    StoreError,
)
from hpsearch.spec.redaction import hide_secrets
from hpsearch.store.addresses import parse_url, sqlite_file
from hpsearch.store.engines import guarded, make_engine
from hpsearch.store.fence import fence
from hpsearch.store.schema import migrations

Record = TypeVar("Record")


class Connection:
    """Pickles as nothing: a process that needs a store opens its own."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        """Open a store, making or upgrading its tables when `create`. Raises StoreError."""
        self.url = url
        self._engine = self._open_engine(url, create)
        with self._guarded():
            with self._engine.connect() as connection:
                found = migrations.version(connection)
                _refuse_other(found, self.shown_url)
                is_current = found is not None and migrations.is_current(connection)
            if create and not is_current:
                with self._engine.begin() as connection:
                    migrations.migrate(connection)
            elif found is None:
                raise StoreError(f"{self.shown_url} holds no studies: nothing has been launched into it yet")
            elif found != migrations.REVISIONS[-1]:
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
        file = sqlite_file(parsed)
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
        _refuse_other(found, hide_secrets(url))
        if found is None:
            return "new"
        return "current" if found == migrations.REVISIONS[-1] else "old"

    @staticmethod
    def holds_other_study(url: str, name: str) -> bool:
        """Whether Optuna's tables in this database have a study of this name, which hpsearch has not made.

        Asked of a database in which our tables have none. Writes nothing. Raises StoreError.
        """
        parsed = parse_url(url)
        file = sqlite_file(parsed)
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
        file = sqlite_file(self._engine.url)
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

    def fence(self, study_id: int, token: int) -> None:
        """From here on, change nothing through this store without the lease. Writes raise LeaseLostError."""
        fence(self._engine, study_id, token)

    def _records(self, query: sa.Select[Any], kind: type[Record]) -> list[Record]:
        return [kind(**row) for row in self._rows(query)]

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        with self._guarded(), self._engine.connect() as connection:
            result = connection.execute(query)
            names = list(result.keys())
            return [dict(zip(names, row, strict=True)) for row in result]

    def _open_engine(self, url: str, create: bool) -> sa.Engine:
        parsed = parse_url(url)
        file = sqlite_file(parsed)
        if file is not None and not file.exists() and not create:
            raise StoreError(
                f"there is no store at {hide_secrets(url)}; name the one that the study was launched with (--store or "
                "HPSEARCH_STORE)"
            )
        if file is not None and create:
            Connection.preflight(url)
        return make_engine(parsed, may_write=create)

    def _guarded(self) -> AbstractContextManager[None]:
        return guarded(self.url)


def _refuse_other(version: str | None, shown_url: str) -> None:
    """Raise StoreError for a store of a version that this hpsearch does not know."""
    if version == migrations.UNRELEASED:
        raise StoreError(
            f"the store {shown_url} was made by a development version from before 0.1.0, which this one does not read. "
            "It stays as it is; name another store with --store, or read it with the version that made it"
        )
    if version is not None and version not in migrations.REVISIONS:
        raise StoreError(
            f"the store {shown_url} has schema version {version}, written by a newer hpsearch; this one knows version "
            f"{migrations.REVISIONS[-1]}. Upgrade hpsearch, or name another store with --store"
        )
