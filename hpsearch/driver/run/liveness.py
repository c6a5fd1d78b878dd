"""The folder of an attempt as the driver uses it: ask its worker to leave, see that it lives, read why it died."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import suppress

from hpsearch.driver.run.trials import LiveTrial
from hpsearch.errors import RunFolderError
from hpsearch.files import storage
from hpsearch.files.layout import LAST_WORDS, PULSE_EVERY_S, PULSE_FILE, STOP_FILE
from hpsearch.files.storage import locate
from hpsearch.records import TrialConfig

_LOW_ON_MEMORY = re.compile(r"killed due to the node running low on memory\..*? was (\S+) used / (\S+) limit", re.S)
_STALL_MARGIN_S = 3 * PULSE_EVERY_S
"""What a worker that makes no step gets to end itself, with last words, before it is ended from outside."""


class Watch:
    """Looks at the pulses of workers."""

    def __init__(self, stall_minutes: float | None) -> None:
        """`stall_minutes` is what a worker may be silent for; None: forever."""
        self._stall_minutes = stall_minutes
        self._looked = -math.inf

    def silent(self, live: Iterable[LiveTrial], now: float) -> list[TrialConfig]:
        """Trials whose workers have been silent for too long; each is named once."""
        if self._stall_minutes is None or now - self._looked < PULSE_EVERY_S:
            return []
        # A driver that was away itself has not watched anybody.
        was_away = now - self._looked > _STALL_MARGIN_S
        self._looked = now
        silent = []
        for trial in live:
            pulse = pulse_of(trial.config)
            if pulse is not None and (pulse != trial.pulse or was_away):
                trial.pulse, trial.heard = pulse, now
            elif now - trial.heard > 60 * self._stall_minutes + _STALL_MARGIN_S:
                trial.heard = now
                silent.append(trial.config)
        return silent


def ask_to_leave(config: TrialConfig) -> None:
    folder = locate(config.folder)
    storage.make(folder)
    # A worker that cannot be asked is ended when its grace is over, and its trial resumes from the last checkpoint.
    with suppress(RunFolderError):
        storage.write(folder / STOP_FILE, b"")


def pulse_of(config: TrialConfig) -> float | None:
    """When the worker of a trial last said that it is alive; None before it has begun."""
    try:
        return (locate(config.folder) / PULSE_FILE).stat().st_mtime
    except Exception:  # of as many kinds as there are object stores
        return None


def last_words_of(config: TrialConfig) -> str:
    return (storage.read(locate(config.folder) / LAST_WORDS) or b"").decode(errors="replace").strip()


def cause_in(error: str) -> str:
    """What a report says has happened: its watchdog, Ray's memory monitor, or the last line of a traceback."""
    if found := _LOW_ON_MEMORY.search(error):
        return (
            f"Ray ended its worker: the node ran low on memory ({found[1]} of {found[2]} used); "
            "resources.memory_gb_per_trial, or a smaller resources.parallel, leaves more to each trial"
        )
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith(("Timeout (", "Fatal Python error"))), None)
    if said is not None and said.startswith("Timeout ("):
        return f"its worker made no step for {said.removeprefix('Timeout (').rstrip(')!')}"
    return said or (lines[-1] if lines else "")
