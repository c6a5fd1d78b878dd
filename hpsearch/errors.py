"""The error tree: every failure that a person can fix, and the exit code that it ends in.

HpsearchError
├── UsageError          2   a command, study file or data that cannot be used as given
│   ├── SpecError           mistakes in a study file, all of them, with line and column
│   ├── DataError           data that is missing, empty or lacks the named column
│   └── UnknownStudyError   no study or trial of that name in the store
├── StudyBusyError      4   another driver holds the study
│   └── LeaseLostError      another driver took the study over while this one was away
├── StoreError         69   the study store cannot be reached, read or written
│   ├── StoreAwayError      perhaps only for a while
│   └── StoreRefusedError   what was to be written is nothing that it takes
├── RunFolderError     74   files of the run (data, checkpoints) cannot be written
│   └── DiskFullError       there is no room for them, or their object store stays away
└── ClusterError       75   Ray could not be started or was lost; launch again to resume

Whatever is not in this tree is a bug of ours and ends in 70.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_FINISHED = 0
EXIT_FOUND = 1
EXIT_USAGE = 2
EXIT_TOO_MANY_FAILED = 3
EXIT_BUSY = 4
EXIT_STORE = 69
EXIT_BUG = 70
EXIT_IO = 74
EXIT_CLUSTER = 75
EXIT_SIGHUP = 129
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class HpsearchError(Exception):
    """Base of all errors that are shown to a person as one message, without a traceback."""

    exit_code = EXIT_BUG


class UsageError(HpsearchError):
    exit_code = EXIT_USAGE


class DataError(UsageError):
    pass


class UnknownStudyError(UsageError):
    pass


class StudyBusyError(HpsearchError):
    exit_code = EXIT_BUSY


class LeaseLostError(StudyBusyError):
    pass


class StoreError(HpsearchError):
    exit_code = EXIT_STORE


class StoreAwayError(StoreError):
    pass


class StoreRefusedError(StoreError):
    pass


class RunFolderError(HpsearchError):
    exit_code = EXIT_IO


class DiskFullError(RunFolderError):
    def __init__(self, folder: object, needed: int, why: str | None = None) -> None:
        super().__init__(why or f"no room for {needed / 1e6:,.1f} MB in {folder}")
        self.needed = needed
        """Bytes that did not fit."""


class ClusterError(HpsearchError):
    exit_code = EXIT_CLUSTER


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One mistake in a study file: the path of keys that leads to it, and what was expected there."""

    path: tuple[str | int, ...]
    message: str
    at_key: bool = False
    """Point at the key rather than at its value (an unknown key, say)."""


class SpecError(UsageError):
    """Mistakes in a study file; `str()` lists them one a line, as `file:line:column: key: message`."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def plain(value: object) -> str:
    """The value as one line of printable text: a terminal is told nothing by it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))
