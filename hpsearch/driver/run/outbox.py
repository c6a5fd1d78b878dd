"""Writes to the store, in order, behind the study's back: a database that is away for a while stops no trial.

A write is repeated until it is done, so it must be one that can be done twice; see `store`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from hpsearch.errors import StoreAwayError

PATIENCE_S = 600.0
"""How long a store may be away before the study ends."""
_SILENCE_S = 3.0
"""A store that is back sooner is not talked about."""
_LONGEST_PAUSE_S = 5.0
LEAVE_S = 20.0
"""What a store that is away gets when nobody is there any more to wait for it."""
_STEP_S = 3.0
"""A store that has done a write so lately does the next one, too."""
_LOOK_S = 0.2


class Outbox:
    """A queue of writes with one thread that does them."""

    def __init__(self, note: Callable[[str], None], *, patience_s: float = PATIENCE_S) -> None:
        self.error: Exception | None = None
        """Why nothing is written any more, if that is so."""
        self._note = note
        self._patience_s = patience_s
        self._writes: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._until = math.inf
        self._moved = -math.inf
        """When a write was last put or done."""
        self._trouble: StoreAwayError | None = None
        self._thread = threading.Thread(target=self._work, name="hpsearch-outbox", daemon=True)
        self._thread.start()

    def put(self, write: Callable[[], None]) -> None:
        """Do this after everything that was put before."""
        with self._changed:
            self._writes.append(write)
            self._move()

    def hurry(self, limit_s: float = LEAVE_S) -> None:
        """Somebody waits: an unreachable store gets only this many seconds more. Safe to call from a signal handler."""
        self._until = min(self._until, time.monotonic() + limit_s)

    def flush(self) -> None:
        """Wait until everything is written. Raises the error that keeps it from being written."""
        with self._changed:
            while self._writes and self.error is None and not self._is_late():
                self._changed.wait(_LOOK_S)  # a signal may have come
            if self._writes and self.error is None:
                self.error = self._trouble or StoreAwayError("the store does not answer")
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Write what waits, as far as that goes, and end. A write that hangs is left behind."""
        self.hurry()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        while self._thread.is_alive() and not self._is_late():
            self._thread.join(_LOOK_S)

    def _is_late(self) -> bool:
        return time.monotonic() > max(self._until, self._moved + _STEP_S)

    def _move(self) -> None:
        self._moved = time.monotonic()
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._writes or self._closed)
                if not self._writes or self.error is not None:
                    return
                write = self._writes[0]
            try:
                self._do(write)
            except Exception as error:
                with self._changed:
                    self.error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._writes.popleft()
                self._move()

    def _do(self, write: Callable[[], None]) -> None:
        began = time.monotonic()
        noted = False
        pause = 0.1
        while True:
            try:
                write()
            except StoreAwayError as error:
                away_s = time.monotonic() - began
                self._trouble = error
                if away_s > self._patience_s or self._is_late():
                    raise
                if not noted and away_s > _SILENCE_S:
                    noted = True
                    self._note(f"{error}. Trials continue, and what they report waits; trying again")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                if noted:
                    self._note(f"the store is back after {time.monotonic() - began:.0f} s")
                return
