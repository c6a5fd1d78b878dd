"""Runs the trials one by one in this process: for a debugger, for a first look, for tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hpsearch.backends import Placement
from hpsearch.records import Decision
from hpsearch.spec.study import StudySpec

if TYPE_CHECKING:
    from hpsearch.driver.run.study_run import StudyRun


@contextmanager
def open_backend(spec: StudySpec, note: Callable[[str], None]) -> Iterator[Inline]:
    # Read by OpenMP when torch is first imported; waiting threads that spin slow every other process down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(spec.resources.cpus_per_trial))
    yield Inline(spec)


class Inline:
    def __init__(self, spec: StudySpec) -> None:
        wanted = spec.resources.gpus_per_trial
        gpus = 0.0 if isinstance(wanted, str) else wanted
        self.placement = Placement(
            parallel=1,
            cpus_per_process=spec.resources.cpus_per_trial,
            gpus_per_trial=gpus,
            where="in this process, one trial at a time",
        )
        self._device = "cpu" if wanted == 0 else "auto"

    def run(self, run: StudyRun) -> None:
        from hpsearch.worker.run import run_trial

        while True:
            config = run.next_trial()
            if config is None:
                run.check_stop()
                if not run.is_waiting:
                    return
                time.sleep(1)
                continue
            trial = run_trial(config.model_copy(update={"device": self._device}))
            try:
                while True:
                    run.check_stop()
                    decision = run.on_progress(config.number, next(trial))
                    if decision is not Decision.CONTINUE:
                        trial.close()
                        (run.on_stopped if decision is Decision.STOP else run.on_paused)(config.number)
                        break
            except StopIteration as end:
                run.on_result(config.number, end.value)
            finally:
                trial.close()
            run.check_stop()
