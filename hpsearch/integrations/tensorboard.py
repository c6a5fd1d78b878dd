"""A study's curves in TensorBoard: event files below its run folder, as tensorboardX writes them."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hpsearch.files.storage import Folder, is_remote
from hpsearch.integrations.trackers import metrics_of, results_of
from hpsearch.records import UNFINISHED, Point, TrialResult
from hpsearch.store.rows import StudyRow


class TensorBoard:
    """Event files below the study's run folder, as tensorboardX writes them."""

    @classmethod
    def problem(cls, folder: Folder) -> str | None:
        if find_spec("tensorboardX") is None:
            return "is an extra: pip install 'hpsearch[tensorboard]'"
        if is_remote(folder):
            return (
                f"writes beside the checkpoints, and {folder} is an object store: give a --folder of this machine, or "
                "another tracker"
            )
        return None

    def __init__(self, study: StudyRow, folder: Folder) -> None:
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
        for name, value in metrics_of(point).items():
            self._writers[trial].add_scalar(name, value, point.step)

    def end(self, trial: int, result: TrialResult) -> None:
        from tensorboardX.summary import hparams

        writer = self._writers.pop(trial)
        if result.state not in UNFINISHED:
            writer.add_text("outcome", f"{result.state}: {result.reason}")
            settings = {
                name: it if isinstance(it, int | float) else str(it) for name, it in self._params[trial].items()
            }
            for summary in hparams(settings, results_of(result)):
                writer.file_writer.add_summary(summary)
            for name, value in results_of(result).items():
                writer.add_scalar(name, value, 0)
        writer.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
