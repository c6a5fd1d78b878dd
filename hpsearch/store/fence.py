"""No transaction of a driver that has lost its lease changes anything."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from hpsearch.errors import (
    LeaseLostError,
)


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
