"""The process of a command: its standard streams, how it ends, and the command that starts it again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from hpsearch.errors import (
    plain,
)
from hpsearch.spec.redaction import hide_secrets


def leave(code: Any) -> None:
    """End the process without taking Python apart: threads of pyarrow that still read would abort it (arrow#45214)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def take_debug_from_anywhere() -> None:
    """`--debug` works before a command and after it, and stays in force when the process begins anew."""
    if "--debug" in sys.argv[1:]:
        os.environ["HPSEARCH_DEBUG"] = "1"
        sys.argv = [sys.argv[0], *(argument for argument in sys.argv[1:] if argument != "--debug")]


def open_closed_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) silent ones: others would take their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


class LossyStream:
    """A stream whose writes may fail: the reader has gone, or the disk is full. From then on it is silent."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, self._stream.fileno())  # what is buffered goes there when the process ends
        os.close(silent)


@contextmanager
def output_may_fail() -> Iterator[None]:
    """Output that fails does not end a study."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = LossyStream(sys.stdout), LossyStream(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def shown(message: str) -> str:
    """A message as it may be printed, whatever names it quotes."""
    return "\n".join(plain(line) for line in hide_secrets(message).split("\n"))


def command_again() -> str:
    import shlex

    return hide_secrets(shlex.join(["hpsearch", *sys.argv[1:]]))
