"""One driver per study: takes the study's lease, keeps its heart beating, and knows a dead holder from a live one.

No clocks are compared. A holder is alive when its lease changes while we watch (every write of a driver is a beat), and
dead when it does not for TIMEOUT_S of our own monotonic clock, or when it was a process of this machine that is gone.
"""

from __future__ import annotations

import getpass
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hpsearch.errors import HpsearchError, StudyBusyError
from hpsearch.files.layout import run_name
from hpsearch.files.ownership import Owner
from hpsearch.files.scratch import is_gone, this_process
from hpsearch.store.rows import LeaseRow, StudyRow
from hpsearch.store.store import Store

TIMEOUT_S = 30.0
BEAT_S = 5.0
_RELEASE_S = 2.0
"""What a lease gets to be released; one that is not runs out."""


class Lease:
    """A lease that is held. `on_loss` is called, from another thread, when it turns out to be another's."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.on_loss: Callable[[], None] = lambda: None


@contextmanager
def hold(store: Store, study: StudyRow, note: Callable[[str], None]) -> Iterator[Lease]:
    """Hold a study's lease, with a heart that beats in a thread. Raises StudyBusyError."""
    lease = Lease(_take(store, study, note))
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            with suppress(HpsearchError):  # a store that is away for now may be there at the next beat
                if not store.renew_lease(study.id, lease.token):
                    lease.on_loss()
                    return
        with suppress(HpsearchError):
            store.release_lease(study.id, lease.token)

    heart = threading.Thread(target=beat, name="hpsearch-lease", daemon=True)
    heart.start()
    try:
        yield lease
    finally:
        done.set()
        heart.join(_RELEASE_S)


def is_held(lease: LeaseRow | None) -> bool:
    """Whether somebody holds the lease, dead or alive."""
    return lease is not None and lease.beat >= 0


def is_dead(store: Store, lease: LeaseRow, *, watch_s: float | None = None) -> bool:
    """Whether the holder of a lease is gone; one that we cannot see is watched for `watch_s` seconds (TIMEOUT_S)."""
    if is_gone(lease.process):
        return True
    seen = (lease.token, lease.beat)
    watch_s = TIMEOUT_S if watch_s is None else watch_s
    until = time.monotonic() + watch_s
    while time.monotonic() < until:
        time.sleep(min(1.0, watch_s))
        now = store.lease(lease.study_id)
        if now is None or (now.token, now.beat) != seen:
            return False
    return True


def _take(store: Store, study: StudyRow, note: Callable[[str], None]) -> int:
    holder = f"{_user()} at {socket.gethostname()}, process {os.getpid()}"
    token = store.take_lease(study.id, holder=holder, process=this_process())
    if token is not None:
        return token
    lease = store.lease(study.id)
    assert lease is not None
    since = f"{lease.holder} since {lease.acquired_at:%Y-%m-%d %H:%M:%S} UTC"
    if not is_gone(lease.process):
        note(f"'{study.name}' is held by {since}; waiting up to {TIMEOUT_S:.0f} s for a sign of life")
    if is_dead(store, lease):
        dead = (lease.token, lease.beat)
        token = store.take_lease(study.id, holder=holder, process=this_process(), dead=dead)
        if token is not None:
            note(f"took the study over from {lease.holder}, which is dead")
            return token
    raise StudyBusyError(f"study '{study.name}' is held by {since}, and it is alive; stop that launch first")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"user {os.getuid()}"


def owner_of(store: Store, study: StudyRow, token: int) -> Owner:
    """The holder of a study's lease as an owner of files."""
    return Owner(
        study=study.uid,
        run=run_name(study),
        store=store.identities(),
        place=store.shown_url,
        token=token,
    )
