"""A study's curves in Weights & Biases: a group for the study, a run for each trial."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from hpsearch.files.storage import Folder
from hpsearch.integrations.trackers import metrics_of, results_of, run_name_of
from hpsearch.records import Point, TrialResult, TrialState
from hpsearch.store.rows import StudyRow


class WandB:
    """Runs in a group with the study's name; project, mode and folder are WANDB_PROJECT, WANDB_MODE and WANDB_DIR."""

    @classmethod
    def problem(cls, folder: Folder) -> str | None:
        if find_spec("wandb") is None:
            return "is an extra: pip install 'hpsearch[wandb]'"
        if os.environ.get("WANDB_MODE", "online") == "online":
            import wandb

            if not wandb.login(prompt=False):
                return "finds no API key: `wandb login`, or WANDB_API_KEY, or WANDB_MODE=offline"
        return None

    def __init__(self, study: StudyRow, folder: Folder) -> None:
        import wandb

        self._wandb = wandb
        self._study = study.name
        self._prefix = f"{run_name_of(study.name)[:60]}-{study.created_at:%Y%m%d%H%M%S}"
        self._runs: dict[int, Any] = {}

    def begin(self, trial: int, params: dict[str, Any]) -> None:
        self._runs[trial] = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run_name_of(self._study)[:128],
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
        self._runs[trial].log(metrics_of(point), step=point.step)

    def end(self, trial: int, result: TrialResult) -> None:
        run = self._runs.pop(trial)
        run.summary.update({**results_of(result), "outcome": result.state.value, "why": result.reason})
        run.finish(exit_code=1 if result.state is TrialState.FAILED else 0)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish(exit_code=1)
