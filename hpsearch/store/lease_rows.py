"""Leases in a store: taken, renewed, released."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from hpsearch.store.connection import Connection
from hpsearch.store.rows import LeaseRow
from hpsearch.store.schema.tables import LEASES, insert, now


class LeaseRows(Connection):
    def lease(self, study_id: int) -> LeaseRow | None:
        rows = self._records(sa.select(LEASES).where(LEASES.c.study_id == study_id), LeaseRow)
        return rows[0] if rows else None

    def take_lease(
        self, study_id: int, *, holder: str, process: dict[str, Any], dead: tuple[int, int] | None = None
    ) -> int | None:
        """Take a lease that is free, or still at the (token, beat) of a `dead` holder.

        Returns the fencing token; None when somebody else holds it.
        """
        with self._guarded(), self._engine.begin() as connection:
            values = {"holder": holder, "process": process, "acquired_at": now(), "heartbeat_at": now()}
            first = insert(connection, LEASES).values(study_id=study_id, token=0, beat=-1, **values)
            connection.execute(first.on_conflict_do_nothing())
            is_free = LEASES.c.beat < 0
            if dead is not None:
                is_free |= sa.and_(LEASES.c.token == dead[0], LEASES.c.beat == dead[1])
            taken = connection.execute(
                sa.update(LEASES)
                .where(LEASES.c.study_id == study_id, is_free)
                .values(token=LEASES.c.token + 1, beat=0, **values)
                .returning(LEASES.c.token)
            ).scalar()
            return None if taken is None else int(taken)

    def renew_lease(self, study_id: int, token: int) -> bool:
        """A beat of the heart; False when somebody else holds the lease by now."""
        return self._update_lease(study_id, token, beat=LEASES.c.beat + 1)

    def release_lease(self, study_id: int, token: int) -> bool:
        return self._update_lease(study_id, token, beat=-1)

    def _update_lease(self, study_id: int, token: int, *, beat: Any) -> bool:
        with self._guarded(), self._engine.begin() as connection:
            updated = connection.execute(
                sa.update(LEASES)
                .where(LEASES.c.study_id == study_id, LEASES.c.token == token)
                .values(beat=beat, heartbeat_at=now())
            )
            return updated.rowcount == 1
