"""What a trial's worker says: one JSON object a line, in one file for all attempts, which outlives the checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("hpsearch.trial")
"""For whatever is worth knowing about a trial that is no point of its curve. Numbers go in `extra={"facts": ...}`."""
LOGGER.setLevel(logging.INFO)


def log_file(run: Path, number: int) -> Path:
    """The log of a trial below the folder of its study."""
    return run / "logs" / f"trial-{number:05d}.jsonl"


def read_log(file: Path, *, start: int = 0) -> tuple[list[dict[str, Any]], int]:
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
def trial_log(file: Path, attempt: int, *, own_process: bool) -> Iterator[None]:
    """Keep what is logged meanwhile; warnings of libraries, too, in a process that is the trial's own."""
    handler = _Handler(file, attempt)
    logging.getLogger().addHandler(handler)
    if own_process:
        logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        if own_process:
            logging.captureWarnings(False)


class _Handler(logging.Handler):
    def __init__(self, file: Path, attempt: int) -> None:
        super().__init__(logging.INFO)
        self._file = file
        self._attempt = attempt
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)

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
        # A trial does not fail for its log: a full disk is noticed where it matters.
        with suppress(OSError), self._file.open("a") as stream:
            stream.write(json.dumps(line, default=str) + "\n")
