"""What lies where below a run folder, and what the files there are called."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol

from hpsearch.files import storage
from hpsearch.files.storage import Folder, locate

_FOLDER = re.compile(r"trial-(\d{5,})(?:-attempt-(\d+))?")


class LaunchedStudy(Protocol):
    """What names the folder of a study."""

    @property
    def spec(self) -> dict[str, Any]: ...

    @property
    def uid(self) -> str: ...


def run_folder(folder: str, study: LaunchedStudy) -> Folder:
    """The folder of a study, below one that other studies may share."""
    return locate(folder) / run_name(study)


def run_name(study: LaunchedStudy) -> str:
    """Name of a study's folder: no other study has it, whatever its store."""
    # The name in the spec stays when a study is archived under another one.
    return f"{study.spec['name']}-{study.uid}"


def attempt_folder(run: Folder, number: int, attempt: int) -> Folder:
    """The folder of one attempt at a trial. Each has its own: a worker that was given up may still write."""
    return run / (f"trial-{number:05d}" if attempt == 1 else f"trial-{number:05d}-attempt-{attempt}")


def earlier_attempts(run: Folder, number: int, attempt: int) -> list[Folder]:
    """Folders of the attempts before this one that there are, newest first."""
    found = [(there, folder) for there, folder in trial_folders(run, number) if there < attempt]
    return [folder for _, folder in sorted(found, reverse=True)]


def trial_folders(run: Folder, number: int | None = None) -> Iterator[tuple[int, Folder]]:
    """Attempt and folder of every attempt at a trial, or at any."""
    for name in storage.names(run):
        match = _FOLDER.fullmatch(name)
        if match and (number is None or int(match[1]) == number):
            yield int(match[2] or 1), run / name


def newest_first(run: Folder) -> dict[int, list[Folder]]:
    """Folders of the attempts at every trial."""
    found: dict[int, list[Folder]] = {}
    for _, folder in sorted(trial_folders(run), key=lambda there: there[0], reverse=True):
        found.setdefault(trial_of(folder) or 0, []).append(folder)
    return found


def trial_of(folder: Folder) -> int | None:
    """The trial that a folder belongs to."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


STOP_FILE = "stop"
"""File in the folder of an attempt that asks its worker to write a checkpoint and leave."""
LAST_WORDS = "last-words.txt"
"""File in the folder of an attempt where a worker that hangs or crashes says where it was."""
PULSE_FILE = "pulse.json"
"""File in the folder of an attempt that says which process runs it, and is touched while that one makes steps."""
PULSE_EVERY_S = 5.0
RESULT = "result.json"
"""File in the folder of an attempt: how it ended, for a driver that did not live to hear it."""
TRIAL = "trial.json"
"""File in the folder of an attempt: its TrialConfig, for a driver whose store does not know of it."""
