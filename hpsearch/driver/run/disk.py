"""A study waits while the disk of its run folder is full or its data is away, and ends when that stays so."""

from __future__ import annotations

import time
from collections.abc import Callable

from hpsearch.files import storage
from hpsearch.files.storage import Folder

DISK_PATIENCE_S = 600.0
"""How long a study waits for room on a full disk."""
_PROBE_EVERY_S = 5.0


class DiskWait:
    """Whether trials have room for their checkpoints."""

    def __init__(self, run: Folder, data: Folder, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self.data = data
        self._clock = clock
        self._since = 0.0
        self._needed: int | None = None
        """Bytes that a trial found no room for; None while there is room."""
        self._next_probe = 0.0

    @property
    def is_full(self) -> bool:
        return self._needed is not None

    @property
    def is_away(self) -> bool:
        """Whether the study's data is not where it was, as when a network file system is not mounted."""
        return not storage.names(self.data)

    def begin(self, needed: int) -> None:
        """Note that a trial needed this many bytes and they did not fit."""
        self._since, self._needed = self._clock(), needed

    def probe(self) -> bool:
        """Look for room, now and then; true when there is some again."""
        if self._needed is None or (now := self._clock()) < self._next_probe:
            return False
        self._next_probe = now + _PROBE_EVERY_S
        # Twice: the state that is written, and the one that it replaces. Data that is away is no room either.
        if not storage.has_room(self._run, 2 * self._needed) or self.is_away:
            return False
        self._needed = None
        return True

    @property
    def has_run_out(self) -> bool:
        """Whether the disk has been full for too long."""
        return self._needed is not None and self._clock() - self._since > DISK_PATIENCE_S
