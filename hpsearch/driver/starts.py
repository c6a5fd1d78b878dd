"""Settings that a study tries first: given, from priors, or from earlier studies."""

from __future__ import annotations

from typing import Any

from hpsearch.errors import (
    UnknownStudyError,
    UsageError,
)
from hpsearch.results.leaderboard import finalists, leaderboard
from hpsearch.spec.study import StudySpec, recorded_space
from hpsearch.store.store import Store, opened_store

TRANSFERRED = 3
"""Settings that a study takes over from each that it starts from."""


def starts_of(spec: StudySpec) -> list[dict[str, Any]]:
    """Settings to try first: `enqueue`, the priors together, the best of earlier studies. Raises UsageError."""
    starts = [*(spec.space.overlap(start) for start in spec.enqueue), spec.space.priors]
    if spec.transfer_from:
        if Store.preflight(spec.store) == "new":
            raise UsageError(f"transfer_from: the store is new, and has no study '{spec.transfer_from[0]}'")
        with opened_store(spec.store) as store:
            starts += [start for name in spec.transfer_from for start in _transferred(store, name, spec)]
    return [start for index, start in enumerate(starts) if start and start not in starts[:index]]


def _transferred(store: Store, name: str, spec: StudySpec) -> list[dict[str, Any]]:
    """The best settings of an earlier study, as far as the space of this one holds them."""
    try:
        earlier = store.study(name)
    except UnknownStudyError as error:
        raise UsageError(f"transfer_from: {error}") from error
    if name == spec.name or earlier.task != spec.task:
        what = "this study itself" if name == spec.name else f"of another task, {earlier.task}"
        raise UsageError(f"transfer_from: '{name}' is {what}")
    rows = list(finalists(leaderboard(store, name), TRANSFERRED))
    # What it fixed, it has found good, too.
    fixed = recorded_space(earlier.spec).fixed
    found = [spec.space.overlap({**fixed, **row.params}) for row in rows]
    if not any(found):
        why = "has no ranked trial yet" if not rows else "has found no setting that lies in this search space"
        raise UsageError(f"transfer_from: '{name}' {why}")
    return found
