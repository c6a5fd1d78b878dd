"""A store's URL: parsed, and told from what cannot be one."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from hpsearch.errors import (
    StoreError,
    UsageError,
)
from hpsearch.spec.redaction import hide_secrets, remember_secrets

_DRIVERS = {"sqlite": ("sqlite", "sqlite+pysqlite"), "postgresql": ("postgresql", "postgresql+psycopg")}
"""What a store's URL may begin with."""


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


def sqlite_file(url: sa.URL) -> Path | None:
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None
