"""Writes to the store, in order, behind the study's back: a database that is away for a while stops no trial.

A write is repeated until it is done, so it must be one that can be done twice; see `store`.
"""

from __future__ import annotations

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
        self._thread = threading.Thread(target=self._work, name="hpsearch-outbox", daemon=True)
        self._thread.start()

    def put(self, write: Callable[[], None]) -> None:
        """Do this after everything that was put before."""
        with self._changed:
            self._writes.append(write)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything is written. Raises the error that keeps it from being written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writes or self.error is not None)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Write what waits, as far as that goes, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._writes or self._closed)
                if not self._writes:
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
                self._changed.notify_all()

    def _do(self, write: Callable[[], None]) -> None:
        away_since: float | None = None
        noted = False
        pause = 0.1
        while True:
            try:
                write()
            except StoreAwayError as error:
                now = time.monotonic()
                away_since = now if away_since is None else away_since
                if now - away_since > self._patience_s:
                    raise
                if not noted and now - away_since > _SILENCE_S:
                    noted = True
                    self._note(f"{error}. Trials go on, and what they report waits; trying again")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                if noted and away_since is not None:
                    self._note(f"the store is back after {time.monotonic() - away_since:.0f} s")
                return
