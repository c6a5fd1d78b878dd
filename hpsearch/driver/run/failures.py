"""When failures say that the next trials would fail, too, and how long to wait after lost workers."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpsearch.records import TrialResult, TrialState

SAME_FAILURES = 3
"""A study ends when this many trials have ended and all of them failed the same way."""
BACK_OFF_S = 1.0
MOST_BACK_OFF_S = 60.0
"""The waits after the second lost worker in a row, and after many of them."""
EQUAL_FAILURE_PAUSES = 2
"""Pauses after SAME_FAILURES equal failures in a row, before the study ends."""


@dataclass(frozen=True, kw_only=True)
class Consequence:
    """What follows from the end of a trial, if anything; a reason in words each."""

    stop: str | None = None
    """The study should end: its next trials would fail, too."""
    pause: str | None = None
    """Nothing starts before `Failures.not_before`."""


class Failures:
    """The failures of one launch, as they come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.not_before = -math.inf
        """When trials may start again, by the clock."""
        self.suspicion: str | None = None
        """Why the study ends, unless a running trial gets further than those that have failed."""
        self._losses_in_a_row = 0
        self._in_a_row: list[str] = []
        """How the last trials failed, since the last one that did not."""
        self._first: list[str] = []
        """How the first trials of this launch failed, while all of them do; else empty texts."""

    @property
    def is_backing_off(self) -> bool:
        return self._clock() < self.not_before

    def progressed(self) -> None:
        """A trial has reported a point."""
        self._losses_in_a_row = 0
        if self.suspicion is not None:
            self.clear()

    def clear(self) -> None:
        """A trial has run as it should."""
        self._in_a_row = []
        self._first = [""] * SAME_FAILURES
        self.suspicion = None

    def lost(self) -> float:
        """A worker died: seconds in which nothing should start. The first in a row costs none, later ones more each."""
        self._losses_in_a_row += 1
        if self._losses_in_a_row == 1:
            return 0.0
        wait_s: float = min(MOST_BACK_OFF_S, BACK_OFF_S * 2.0 ** (self._losses_in_a_row - 2))
        self.not_before = max(self.not_before, self._clock() + wait_s)
        return wait_s

    def ended(self, result: TrialResult, *, has_reported: bool, running: Sequence[bool]) -> Consequence:
        """A trial has ended; `running` says of each trial that still runs whether it has reported a point.

        Of several trials at once, those that fail are the first to end: where they failed before their first report,
        the others are waited for.
        """
        if result.state not in (TrialState.FAILED, TrialState.INFEASIBLE):
            self.clear()
            return Consequence()
        kind = re.sub(r"\d+(\.\d+)?", "N", result.reason)
        if len(self._first) < SAME_FAILURES or self.suspicion is not None:
            self._first.append(kind)
        if "" in self._first:
            return self._after_a_good_start(kind, result)
        if len(self._first) < SAME_FAILURES:
            return Consequence()
        if len(set(self._first)) > 1 or (not has_reported and any(running)):
            self.clear()
            return Consequence()
        self.suspicion = f"the first {SAME_FAILURES} trials all ended the same way: {result.state}: {result.reason}"
        return Consequence(stop=self.suspicion if has_reported or not running else None)

    def _after_a_good_start(self, kind: str, result: TrialResult) -> Consequence:
        """Pause when the trials of a study that went well begin to fail in one way; end it when that does not help."""
        self._in_a_row.append(kind)
        last = self._in_a_row[-SAME_FAILURES:]
        if len(last) < SAME_FAILURES or len(set(last)) > 1:
            return Consequence()
        reason = f"the last {SAME_FAILURES} trials all ended the same way: {result.state}: {result.reason}"
        if len(self._in_a_row) >= SAME_FAILURES * (1 + EQUAL_FAILURE_PAUSES):
            return Consequence(stop=reason)
        if len(self._in_a_row) % SAME_FAILURES == 0:
            self.not_before = self._clock() + MOST_BACK_OFF_S
            return Consequence(pause=reason)
        return Consequence()
