"""Live copies of a study's curves in TensorBoard, MLflow and Weights & Biases: a run for each trial. Owns them.

The store stays the truth: a tracker is told what is in it already, by a thread of its own. One that fails loses its
copy and says so, and the study goes on. A trial that is resumed goes on in its run.
"""

from __future__ import annotations

import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from hpsearch.errors import RunFolderError, UsageError
from hpsearch.files.storage import Folder, is_remote
from hpsearch.records import UNFINISHED, Event, Listener, Point, TrialResult, TrialState
from hpsearch.store.schema.tables import Row

_ENDS_S = 60.0
"""What a tracker gets to send what is left when a launch ends."""
_MOST_WAITING = 100_000
"""Events that wait for a tracker; more would be a leak."""


class Tracker(Protocol):
    """One tool. All calls come from one thread."""

    def begin(self, trial: int, params: dict[str, Any]) -> None:
        """A trial runs, for the first time or again."""

    def log(self, trial: int, point: Point) -> None: ...

    def end(self, trial: int, result: TrialResult) -> None:
        """A trial has ended, for good or until it is resumed."""

    def close(self) -> None: ...


class _TensorBoard:
    """Event files below the study's run folder, as tensorboardX writes them."""

    def __init__(self, study: Row, folder: Folder) -> None:
        from tensorboardX import SummaryWriter

        assert isinstance(folder, Path)
        self._folder = folder / "tensorboard"
        self._make = SummaryWriter
        self._writers: dict[int, Any] = {}
        self._params: dict[int, dict[str, Any]] = {}

    def begin(self, trial: int, params: dict[str, Any]) -> None:
        self._params[trial] = params
        # Names of event files hold a second: an attempt that followed at once would write over the one before it.
        self._writers[trial] = self._make(
            str(self._folder / f"trial-{trial:05d}"), filename_suffix=f".{time.time_ns()}"
        )

    def log(self, trial: int, point: Point) -> None:
        for name, value in _metrics(point).items():
            self._writers[trial].add_scalar(name, value, point.step)

    def end(self, trial: int, result: TrialResult) -> None:
        from tensorboardX.summary import hparams

        writer = self._writers.pop(trial)
        if result.state not in UNFINISHED:
            writer.add_text("outcome", f"{result.state}: {result.reason}")
            settings = {
                name: it if isinstance(it, int | float) else str(it) for name, it in self._params[trial].items()
            }
            for summary in hparams(settings, _results(result)):
                writer.file_writer.add_summary(summary)
            for name, value in _results(result).items():
                writer.add_scalar(name, value, 0)
        writer.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _MLflow:
    """Runs of an experiment with the study's name, where MLFLOW_TRACKING_URI says."""

    def __init__(self, study: Row, folder: Folder) -> None:
        from mlflow import MlflowClient

        # A server that is away would hold a launch up for four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        self._client = MlflowClient()
        name = study["name"]
        there = self._client.get_experiment_by_name(name)
        self._experiment = there.experiment_id if there else self._client.create_experiment(name)
        self._birth = study["created_at"].isoformat()
        self._runs: dict[int, str] = {}

    def begin(self, trial: int, params: dict[str, Any]) -> None:
        wanted = f"tags.`hpsearch.trial` = '{trial}' AND tags.`hpsearch.study_created` = '{self._birth}'"
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        if found:
            self._runs[trial] = found[0].info.run_id
            self._client.update_run(self._runs[trial], status="RUNNING")
            return
        tags = {"hpsearch.trial": str(trial), "hpsearch.study_created": self._birth}
        run = self._client.create_run(self._experiment, tags=tags, run_name=f"trial {trial}")
        self._runs[trial] = run.info.run_id
        for name, value in params.items():
            self._client.log_param(self._runs[trial], _name(name), value)

    def log(self, trial: int, point: Point) -> None:
        for name, value in _metrics(point).items():
            self._client.log_metric(self._runs[trial], name, value, step=point.step)

    def end(self, trial: int, result: TrialResult) -> None:
        run = self._runs.pop(trial)
        for name, value in _results(result).items():
            self._client.log_metric(run, name, value)
        self._client.set_tag(run, "outcome", result.state.value)
        self._client.set_tag(run, "why", result.reason)
        status = {TrialState.FAILED: "FAILED", TrialState.INTERRUPTED: "KILLED", TrialState.PAUSED: "SCHEDULED"}.get(
            result.state, "FINISHED"
        )
        self._client.set_terminated(run, status)

    def close(self) -> None:
        for run in self._runs.values():
            self._client.set_terminated(run, "KILLED")


class _WandB:
    """Runs in a group with the study's name; project, mode and folder are WANDB_PROJECT, WANDB_MODE and WANDB_DIR."""

    def __init__(self, study: Row, folder: Folder) -> None:
        import wandb

        self._wandb = wandb
        self._study = study["name"]
        self._prefix = f"{_name(study['name'])[:60]}-{study['created_at']:%Y%m%d%H%M%S}"
        self._runs: dict[int, Any] = {}

    def begin(self, trial: int, params: dict[str, Any]) -> None:
        self._runs[trial] = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _name(self._study)[:128],
            group=self._study[:128],
            name=f"trial {trial}",
            id=f"{self._prefix}-{trial}",
            resume="allow",
            reinit="create_new",
            config=params,
            settings=self._wandb.Settings(
                console="off", silent=True, x_disable_stats=True, x_disable_machine_info=True
            ),
        )

    def log(self, trial: int, point: Point) -> None:
        self._runs[trial].log(_metrics(point), step=point.step)

    def end(self, trial: int, result: TrialResult) -> None:
        run = self._runs.pop(trial)
        run.summary.update({**_results(result), "outcome": result.state.value, "why": result.reason})
        run.finish(exit_code=1 if result.state is TrialState.FAILED else 0)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish(exit_code=1)


_TRACKERS: dict[str, tuple[str, Callable[[Row, Folder], Tracker]]] = {
    "tensorboard": ("tensorboardX", _TensorBoard),
    "mlflow": ("mlflow", _MLflow),
    "wandb": ("wandb", _WandB),
}
"""What to import, and what to make, by name."""


def check_trackers(names: Sequence[str], folder: Folder) -> None:
    """Raise UsageError when a tracker cannot be used."""
    for name in names:
        if name not in _TRACKERS:
            raise UsageError(f"there is no tracker {name!r}; there are {', '.join(_TRACKERS)}")
        if find_spec(_TRACKERS[name][0]) is None:
            raise UsageError(f"--track {name} is an extra: pip install 'hpsearch[{name}]'")
    if "tensorboard" in names and is_remote(folder):
        raise UsageError(
            f"--track tensorboard writes beside the checkpoints, and {folder} is an object store: "
            "give a --folder of this machine, or another tracker"
        )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False):
            raise UsageError("--track wandb finds no API key: `wandb login`, or WANDB_API_KEY, or WANDB_MODE=offline")


@contextmanager
def tracked(names: Sequence[str], study: Row, folder: Folder, note: Callable[[str], None]) -> Iterator[list[Listener]]:
    """Listeners that tell these trackers of a launch. Raises UsageError, RunFolderError."""
    told: list[_Told] = []
    try:
        for name in names:
            try:
                told.append(_Told(name, _TRACKERS[name][1](study, folder), note))
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
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._open: set[int] = set()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"hpsearch-{name}", daemon=True)
        self._thread.start()

    def hear(self, event: Event) -> None:
        if self._has_failed or event.kind not in ("trial_started", "point", "trial_ended"):
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

    def _tell(self, event: Event) -> None:
        assert event.trial is not None
        facts = event.facts
        if event.kind == "trial_started" or (event.kind == "trial_ended" and event.trial not in self._open):
            # A trial that paused was closed, and ends without having run again.
            self._tracker.begin(event.trial, facts["params"])
            self._open.add(event.trial)
        if event.kind == "trial_started":
            return
        if event.kind == "point":
            self._tracker.log(event.trial, facts["point"])
        else:
            self._tracker.end(event.trial, facts["result"])
            self._open.discard(event.trial)

    def _fail(self, why: str) -> None:
        self._has_failed = True
        self._note(f"{self._name}: {why}. Nothing more is logged there in this launch; the store has it all")


def _metrics(point: Point) -> dict[str, float]:
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


def _results(result: TrialResult) -> dict[str, float]:
    values = {
        "best_valid_loss": result.best_valid_loss,
        "best_valid_score": result.best_valid_score,
        "best_epoch": result.best_epoch,
        **{f"test_{score.metric}": score.value for score in result.scores},
    }
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def _name(text: str) -> str:
    """A name that all of them accept."""
    return re.sub(r"[^\w.-]", "_", text)
