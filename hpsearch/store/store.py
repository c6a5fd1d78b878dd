"""The SQL study store: one method per event, and the reads behind every command.

Owns SQLAlchemy and our tables; Optuna's stand beside them in the same database. Only the driver of a study writes, and
`fence` holds it to that: no transaction of a driver that has lost its lease can change anything. Every write of a trial
may be repeated without harm, because a connection that breaks does not say whether its last commit was done.
SQLite runs in WAL mode with foreign keys and a busy timeout, so that readers and the Optuna dashboard never block it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpsearch.store.lease_rows import LeaseRows
from hpsearch.store.queries import Queries
from hpsearch.store.studies import Studies
from hpsearch.store.trials import TrialEvents


class Store(Studies, TrialEvents, Queries, LeaseRows):
    """One database with studies, for the driver that writes it and the commands that read it."""


@contextmanager
def opened_store(url: str, *, create: bool = False) -> Iterator[Store]:
    store = Store(url, create=create)
    try:
        yield store
    finally:
        store.close()
