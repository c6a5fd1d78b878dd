"""The processes of a trial on several devices: those that follow, and what happens when one is lost."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Protocol

from hpsearch.records import (
    PREEMPTED,
    TrialConfig,
)
from hpsearch.training.ranks import Ranks, join, lead
from hpsearch.training.steps import SmallerMicroBatchError
from hpsearch.training.trainer import (
    Order,
    PreemptedError,
)
from hpsearch.worker.setup import build_trainer
from hpsearch.worker.watchdog import Watchdog

_NEWS_S = 5.0
"""A process that loses another hears of it from the network before the backend knows which one it was and why."""
_SILENCE = timedelta(minutes=30)
"""What the processes of a trial wait for each other at most, unless `limits.stall_minutes` says less."""


class Team(Protocol):
    """The other processes of a trial on several devices, as the backend knows them."""

    size: int
    """This process counted."""
    host: str
    """The address that they reach this process at."""

    def start(self, config: TrialConfig, address: str) -> None:
        """Make each of them `follow`."""

    def lost(self, wait_s: float = 0.0) -> str | None:
        """What is known of one that ended before its time; None while there is none."""

    def end(self, *, is_done: bool) -> None:
        """Wait for those that are done, or end those that are not."""


class ProcessLostError(Exception):
    """Another process of the trial died; the trial resumes from its checkpoint with new ones."""


def follow(config: TrialConfig, address: str, *, rank: int, size: int, host: str) -> str:
    """Be one of the other processes of a trial; returns why the trial must begin again, or nothing when it is over."""
    asked = Order.CONTINUE

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = Order.PREEMPT

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        with join(address, rank=rank, size=size, host=host, timeout=_patience(config)) as ranks:
            time_left = None if config.finish_in_s is None else (lambda: math.inf)  # the first process's counts
            trainer = build_trainer(config, ranks, lambda: asked, time_left)
            for _ in trainer.points():
                pass
            trainer.follow()
    except PreemptedError:
        return ""
    except SmallerMicroBatchError as error:
        return f"{PREEMPTED}: {error}"
    finally:
        signal.signal(signal.SIGTERM, before)
    return ""


@contextmanager
def together(config: TrialConfig, team: Team | None, watch: Watchdog) -> Iterator[Ranks]:
    """The processes of a trial, found and in the end dismissed."""
    if team is None:
        yield Ranks()
        return
    is_done = False
    guard = _Guard(team, watch)

    def call(address: str) -> None:
        team.start(config, address)
        if watch.own_process:
            guard.start()  # those that do not even come would be waited for

    try:
        with lead(team.host, team.size, call, timeout=_patience(config)) as ranks:
            try:
                yield ranks
                is_done = True
            except GeneratorExit:
                is_done = True
                raise
            except RuntimeError as error:  # what lost connections raise
                if lost := team.lost(_NEWS_S):
                    raise ProcessLostError(lost) from error
                raise
    finally:
        guard.stopped.set()
        team.end(is_done=is_done)


def _patience(config: TrialConfig) -> timedelta:
    return timedelta(minutes=config.stall_minutes) if config.stall_minutes is not None else _SILENCE


class _Guard(threading.Thread):
    """Ends this process when it waits in vain, deep in a library, for another one that died."""

    def __init__(self, team: Team, watch: Watchdog) -> None:
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self._team = team
        self._watch = watch

    def run(self) -> None:
        while not self.stopped.wait(1.0):
            lost = self._team.lost()
            # Often the network has told the main thread, which then says it better.
            if lost is not None and not self.stopped.wait(2 * _NEWS_S):
                self._watch.say(lost)
                os._exit(1)
