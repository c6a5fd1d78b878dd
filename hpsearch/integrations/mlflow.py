"""A study's curves in MLflow: an experiment for the study, a run for each trial."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from hpsearch.files.storage import Folder
from hpsearch.integrations.trackers import metrics_of, results_of, run_name_of
from hpsearch.records import Point, TrialResult, TrialState
from hpsearch.store.rows import StudyRow


class MLflow:
    """Runs of an experiment with the study's name, where MLFLOW_TRACKING_URI says."""

    @classmethod
    def problem(cls, folder: Folder) -> str | None:
        return None if find_spec("mlflow") else "is an extra: pip install 'hpsearch[mlflow]'"

    def __init__(self, study: StudyRow, folder: Folder) -> None:
        from mlflow import MlflowClient

        # A server that is away would hold a launch up for four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        self._client = MlflowClient()
        name = study.name
        there = self._client.get_experiment_by_name(name)
        self._experiment = there.experiment_id if there else self._client.create_experiment(name)
        self._birth = study.created_at.isoformat()
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
            self._client.log_param(self._runs[trial], run_name_of(name), value)

    def log(self, trial: int, point: Point) -> None:
        for name, value in metrics_of(point).items():
            self._client.log_metric(self._runs[trial], name, value, step=point.step)

    def end(self, trial: int, result: TrialResult) -> None:
        run = self._runs.pop(trial)
        for name, value in results_of(result).items():
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
