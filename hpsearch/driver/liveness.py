"""The folder of an attempt as the driver uses it: ask its worker to leave, see that it lives, read why it died."""

from __future__ import annotations

from contextlib import suppress

from hpsearch.errors import RunFolderError
from hpsearch.files import storage
from hpsearch.files.layout import (
    LAST_WORDS,
    PULSE_FILE,
    STOP_FILE,
)
from hpsearch.files.storage import locate
from hpsearch.records import (
    TrialConfig,
)


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
    """The line of a report that says what happened: the watchdog's, or the last one of a traceback."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith(("Timeout (", "Fatal Python error"))), None)
    if said is not None and said.startswith("Timeout ("):
        return f"its worker made no step for {said.removeprefix('Timeout (').rstrip(')!')}"
    return said or (lines[-1] if lines else "")
