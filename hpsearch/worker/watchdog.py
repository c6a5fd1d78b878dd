"""Tells a run when to stop, shows that it is alive, and ends the process of one that hangs."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hpsearch.files import storage
from hpsearch.files.layout import LAST_WORDS, PULSE_EVERY_S, PULSE_FILE, STOP_FILE
from hpsearch.files.storage import Folder
from hpsearch.records import PREEMPTED, TrialConfig
from hpsearch.training.trainer import (
    Order,
    Trainer,
)

_LOOK_EVERY_S = 0.25
"""Seconds between two looks for a request to stop."""
_LOOK_AFAR_EVERY_S = 5.0
"""The same where each look is a request to an object store."""


def whereabouts() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


class Watchdog:
    """Tells a run when to stop, and ends the process of one that hangs."""

    def __init__(self, config: TrialConfig, folder: Folder, own_process: bool, processes: int) -> None:
        self.trainer: Trainer | None = None
        self._processes = processes
        self._config = config
        self._stop_file = folder / STOP_FILE
        self._last_words_file = folder / LAST_WORDS
        self._pulse_file = folder / PULSE_FILE
        self._touched = -math.inf
        self.own_process = own_process
        self._is_remote = storage.is_remote(folder)
        storage.make(folder)
        # A process that crashes cannot write to an object store: there, its stack is in Ray's log on its node.
        own = self._last_words_file if isinstance(self._last_words_file, Path) else None
        self._last_words = own.open("w") if own else os.fdopen(os.dup(2), "w")
        self._began = self._looked = time.monotonic()
        self._asked = Order.CONTINUE
        self._had_sigterm = False

    @property
    def time_left(self) -> Callable[[], float] | None:
        """Tells the seconds of wall time that the run has, if it must have come to its end by a certain time."""
        finish_in_s = self._config.finish_in_s
        return None if finish_in_s is None else lambda: self._began + finish_in_s - time.monotonic()

    @property
    def seconds(self) -> float:
        """Device-seconds of the whole trial, as far as they are known."""
        return self.trainer.seconds if self.trainer else self._processes * (time.monotonic() - self._began)

    def __enter__(self) -> Watchdog:
        if self.own_process:
            # A crash in native code says where it was.
            faulthandler.enable(self._last_words)
        if threading.current_thread() is threading.main_thread() and self.own_process:
            self._before: Any = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._arm()
        if self.own_process or self._is_remote:
            self._beat()
        return self

    def __exit__(self, *_: object) -> None:
        if self.own_process or self._is_remote:
            with suppress(Exception):
                self._pulse_file.unlink(missing_ok=True)
        if self.own_process:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self._before)
        self._last_words.close()

    def leave(self) -> str:
        """Say why the run left before its end."""
        if not self._had_sigterm and self._asked is Order.PREEMPT:
            return "asked to stop"
        reason = f"{PREEMPTED} by SIGTERM" if self._had_sigterm else f"{PREEMPTED} with one of its processes"
        self.say(reason)
        return reason

    def say(self, words: str) -> None:
        """Leave word of why this process will not be there any more."""
        if self._is_remote:
            storage.write(self._last_words_file, words.encode())
        self._last_words.write(words)
        self._last_words.flush()

    def pulse(self) -> Order:
        """Called while the run is alive; answers what is asked of it."""
        now = time.monotonic()
        if now - self._looked < (_LOOK_AFAR_EVERY_S if self._is_remote else _LOOK_EVERY_S):
            return self._asked
        self._looked = now
        self._arm()
        if self.own_process and now - self._touched > PULSE_EVERY_S:
            self._touched = now
            if isinstance(self._pulse_file, Path):
                with suppress(OSError):
                    os.utime(self._pulse_file)
            else:
                self._beat()
        if self._asked is Order.CONTINUE and self._is_asked_to_stop():
            self._asked = Order.PREEMPT
        limit = self._config.max_minutes
        if self._asked is Order.CONTINUE and limit is not None and self.seconds > 60 * limit * self._processes:
            self._asked = Order.TIME_UP
        if self._asked is Order.CONTINUE and self.time_left is not None and self.time_left() <= 0:
            self._asked = Order.TIME_UP
        return self._asked

    def _beat(self) -> None:
        # A full disk, or an object store that is away, is noticed where it matters.
        with suppress(Exception):
            self._pulse_file.write_text(json.dumps(whereabouts()))

    def _is_asked_to_stop(self) -> bool:
        with suppress(Exception):
            return self._stop_file.exists()
        return False

    def _arm(self) -> None:
        if self.own_process and self._config.stall_minutes is not None:
            faulthandler.dump_traceback_later(60 * self._config.stall_minutes, exit=True, file=self._last_words)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._asked = Order.PREEMPT
        self._had_sigterm = True
