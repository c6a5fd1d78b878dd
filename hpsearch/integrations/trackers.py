"""Live copies of a study's curves in TensorBoard, MLflow and Weights & Biases: a run for each trial. Owns them.

The store stays the truth: a tracker is told what is in it already, by a thread of its own. One that fails loses its
copy and says so, and the study continues. A trial that is resumed continues its run.
"""

from __future__ import annotations

import math
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from hpsearch.errors import RunFolderError, UsageError
from hpsearch.files.storage import Folder
from hpsearch.records import Event, Listener, Point, PointReported, TrialEnded, TrialResult, TrialStarted
from hpsearch.registry import TRACKERS
from hpsearch.store.rows import StudyRow

_ENDS_S = 60.0
"""What a tracker gets to send what is left when a launch ends."""
_MOST_WAITING = 100_000
"""Events that wait for a tracker; more would be a leak."""


_OfTrial = TrialStarted | PointReported | TrialEnded


class Tracker(Protocol):
    """One tool, made for a launch from the study's row and its run folder. All calls come from one thread."""

    @classmethod
    def problem(cls, folder: Folder) -> str | None:
        """Why it cannot be used here, as the rest of a sentence that begins with its name; None when it can."""

    def begin(self, trial: int, params: dict[str, Any]) -> None:
        """A trial runs, for the first time or again."""

    def log(self, trial: int, point: Point) -> None: ...

    def end(self, trial: int, result: TrialResult) -> None:
        """A trial has ended, for good or until it is resumed."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str], folder: Folder) -> None:
    """Raise UsageError when a tracker cannot be used."""
    for name in names:
        if (problem := TRACKERS.load(name).problem(folder)) is not None:
            raise UsageError(f"--track {name} {problem}")


@contextmanager
def tracked(
    names: Sequence[str], study: StudyRow, folder: Folder, note: Callable[[str], None]
) -> Iterator[list[Listener]]:
    """Listeners that tell these trackers of a launch. Raises UsageError, RunFolderError."""
    told: list[_Told] = []
    try:
        for name in names:
            try:
                told.append(_Told(name, TRACKERS.load(name)(study, folder), note))
            except UsageError:
                raise
            except OSError as error:
                raise RunFolderError(f"--track {name}: {error}") from error
            except Exception as error:  # each tool has errors of its own
                raise UsageError(f"--track {name}: {error}") from error
        yield [one.hear for one in told]
    finally:
        for one in told:
            one.close()


class _Told:
    """A tracker, and the thread that tells it what happens."""

    def __init__(self, name: str, tracker: Tracker, note: Callable[[str], None]) -> None:
        self._name = name
        self._tracker = tracker
        self._note = note
        self._events: queue.Queue[_OfTrial | None] = queue.Queue()
        self._open: set[int] = set()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"hpsearch-{name}", daemon=True)
        self._thread.start()

    def hear(self, event: Event) -> None:
        if self._has_failed or not isinstance(event, TrialStarted | PointReported | TrialEnded):
            return
        if self._events.qsize() >= _MOST_WAITING:
            self._fail(f"it is {_MOST_WAITING:,} events behind")
            return
        self._events.put(event)

    def close(self) -> None:
        self._events.put(None)
        self._thread.join(_ENDS_S)
        if self._thread.is_alive():
            self._fail(f"it did not take what was left within {_ENDS_S:.0f} s")

    def _work(self) -> None:
        while (event := self._events.get()) is not None:
            if self._has_failed:
                continue
            try:
                self._tell(event)
            except Exception as error:  # each tool has errors of its own
                self._fail(str(error) or type(error).__name__)
        with suppress(Exception):
            self._tracker.close()

    def _tell(self, event: _OfTrial) -> None:
        match event:
            case TrialStarted():
                self._begin(event)
            case PointReported():
                self._tracker.log(event.trial, event.point)
            case TrialEnded():
                if event.trial not in self._open:
                    self._begin(event)  # one that paused was closed, and ends without having run again
                self._tracker.end(event.trial, event.result)
                self._open.discard(event.trial)

    def _begin(self, event: TrialStarted | TrialEnded) -> None:
        self._tracker.begin(event.trial, event.params)
        self._open.add(event.trial)

    def _fail(self, why: str) -> None:
        self._has_failed = True
        self._note(f"{self._name}: {why}. Nothing more is logged there in this launch; the store has it all")


def metrics_of(point: Point) -> dict[str, float]:
    """The numbers of a point under the names of the store; what is no finite number is left out."""
    values = {
        "train_loss": point.train_loss,
        "valid_loss": point.valid_loss,
        "valid_score": point.valid_score,
        "learning_rate": point.learning_rate,
        "epoch": point.epoch,
        "tokens": point.tokens,
        "device_seconds": point.seconds,
    }
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def results_of(result: TrialResult) -> dict[str, float]:
    values = {
        "best_valid_loss": result.best_valid_loss,
        "best_valid_score": result.best_valid_score,
        "best_epoch": result.best_epoch,
        **{f"test_{score.metric}": score.value for score in result.scores},
    }
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def run_name_of(text: str) -> str:
    """A name that all of them accept."""
    return re.sub(r"[^\w.-]", "_", text)
