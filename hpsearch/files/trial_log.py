"""What a trial's worker says: one JSON object a line, in one file for all attempts, which outlives the checkpoints."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpsearch.errors import RunFolderError
from hpsearch.files import storage
from hpsearch.files.storage import Folder

LOGGER = logging.getLogger("hpsearch.trial")
"""For whatever is worth knowing about a trial that is no point of its curve. Numbers go in `extra={"facts": ...}`."""
LOGGER.setLevel(logging.INFO)
_WRITE_EVERY_S = 10.0
"""Between two writes of a log in an object store."""


def log_file(run: Folder, number: int) -> Folder:
    """The log of a trial below the folder of its study."""
    return run / "logs" / f"trial-{number:05d}.jsonl"


def read_log(file: Folder, *, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Lines from a position in the file on, and the position after them; a line still being written is left."""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            content = stream.read()
    except FileNotFoundError:
        return [], start
    whole = content[: content.rfind(b"\n") + 1]
    lines = []
    for line in whole.decode(errors="replace").splitlines():
        with suppress(ValueError):  # cut short by a crash
            lines.append(json.loads(line))
    return lines, start + len(whole)


@contextmanager
def trial_log(file: Folder, attempt: int, *, own_process: bool) -> Iterator[None]:
    """Keep what is logged meanwhile; warnings of libraries, too, in a process that is the trial's own."""
    handler = _Handler(file, attempt) if isinstance(file, Path) else _RemoteHandler(file, attempt)
    logging.getLogger().addHandler(handler)
    if own_process:
        logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        if own_process:
            logging.captureWarnings(False)


class _Handler(logging.Handler):
    def __init__(self, file: Folder, attempt: int) -> None:
        super().__init__(logging.INFO)
        self._file = file
        self._attempt = attempt
        with suppress(OSError):
            storage.make(file.parent)

    def emit(self, record: logging.LogRecord) -> None:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "attempt": self._attempt,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **({"logger": record.name} if record.name != LOGGER.name else {}),
            **({"facts": record.facts} if hasattr(record, "facts") else {}),
            **({"traceback": logging.Formatter().formatException(record.exc_info)} if record.exc_info else {}),
        }
        self._append(json.dumps(line, default=str) + "\n")

    def _append(self, line: str) -> None:
        # A trial does not fail for its log: a full disk is noticed where it matters.
        with suppress(OSError), self._file.open("a") as stream:
            stream.write(line)


class _RemoteHandler(_Handler):
    """Nothing can be appended in an object store: the log is written anew, now and then."""

    def __init__(self, file: Folder, attempt: int) -> None:
        super().__init__(file, attempt)
        self._content = ""
        with suppress(RunFolderError):
            self._content = (storage.read(file) or b"").decode(errors="replace")
        self._next_write = 0.0

    def _append(self, line: str) -> None:
        self._content += line
        if time.monotonic() >= self._next_write:
            self._write()

    def close(self) -> None:
        self._write()
        super().close()

    def _write(self) -> None:
        with suppress(Exception):
            self._file.write_text(self._content)
        self._next_write = time.monotonic() + _WRITE_EVERY_S
