"""What is done to a study that is not running: archive it, put failed trials back, remove needless checkpoints.

Each holds the study's lease while it writes, as a launch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing

from hpsearch.errors import UsageError
from hpsearch.files.layout import run_folder
from hpsearch.records import TrialState
from hpsearch.spec.sections import LimitSpec
from hpsearch.spec.study import recorded_study
from hpsearch.store import leases
from hpsearch.store.leases import owner_of
from hpsearch.store.store import Store, opened_store
from hpsearch.upkeep.retention import Garbage, collect, find_garbage


def archive_study(url: str, name: str) -> str | None:
    """The new name of the study, or None when there is none. Raises StudyBusyError."""
    if Store.preflight(url) == "new":
        return None
    with opened_store(url, create=True) as opened:
        row = opened.find_study(name)
        if row is None:
            return None
        with leases.hold(opened, row, lambda text: None):
            return opened.archive_study(row)


def retry_trials(url: str, name: str, trials: Sequence[int]) -> list[int]:
    """The numbers of the trials that are in the queue again. Raises StudyBusyError, UsageError."""
    from hpsearch.search.study import Search

    with opened_store(url, create=True) as opened:
        row = opened.study(name)
        chosen = [opened.trial(row, number) for number in dict.fromkeys(trials)]
        if wrong := [trial for trial in chosen if trial.state != TrialState.FAILED]:
            raise UsageError(f"trial {wrong[0].number} of '{name}' has not failed: it is {wrong[0].state}")
        failed = chosen or [trial for trial in opened.trials(row.id) if trial.state == TrialState.FAILED]
        if not failed:
            return []
        with leases.hold(opened, row, lambda text: None) as lease:
            opened.fence(row.id, lease.token)
            spec = recorded_study(row.spec, row.placement, url, trials=row.budget_trials)
            with closing(Search(spec, url, lease=(row.id, lease.token))) as search:
                for trial in failed:
                    opened.reopen_trial(trial.id, "failed, and was put back by `hpsearch retry`")
                    search.reopen(trial.number)
    return [trial.number for trial in failed]


def collect_garbage(url: str, name: str, *, keep: int | None, dry_run: bool) -> list[Garbage]:
    """What was removed of a study's files, or would be. Raises StudyBusyError."""
    with opened_store(url, create=not dry_run) as opened, ExitStack() as stack:
        row = opened.study(name)
        if row.placement is None:
            raise UsageError(f"'{name}' was last launched by an older hpsearch; launch it once more before gc")
        if not dry_run:
            lease = stack.enter_context(leases.hold(opened, row, lambda text: None))
            opened.fence(row.id, lease.token)
        limits = LimitSpec.model_validate(row.placement.get("limits", {}))
        garbage = find_garbage(opened, row, keep=keep or limits.keep_checkpoints)
        if not dry_run:
            owner = owner_of(opened, row, lease.token)
            owner.claim(run_folder(row.placement["folder"], row))
            collect(opened, garbage, remove=owner.remove)
        return garbage
