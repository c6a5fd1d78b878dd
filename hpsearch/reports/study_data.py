"""One study as rows, read once for all its figures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from hpsearch.records import UNFINISHED
from hpsearch.results.leaderboard import Leaderboard, leaderboard, param_names
from hpsearch.spec.space import Range, Space
from hpsearch.spec.study import recorded_space
from hpsearch.store.rows import PointRow, StudyRow, TrialRow
from hpsearch.store.store import Store


@dataclass(frozen=True)
class StudyData:
    """One study as rows, read once for all its figures."""

    study: StudyRow
    trials: list[TrialRow]
    points: dict[int, list[PointRow]]
    """Curves by trial number."""
    board: Leaderboard
    details: dict[str, Any]
    """What the task kept of the best trial."""
    importances: dict[str, float] | None
    """Of the sampled settings, if there are trials enough to compute any."""

    @property
    def name(self) -> str:
        return str(self.study.name)

    @property
    def objective(self) -> str:
        return "best validation loss" if self.study.objective == "loss" else f"validation {self.study.objective}"

    @property
    def minimises(self) -> bool:
        return bool(self.study.objective == "loss")

    def value(self, trial: TrialRow) -> float | None:
        """What the search sees of a trial."""
        return trial.best_valid(self.study.objective)

    @cached_property
    def ended(self) -> list[TrialRow]:
        """Trials that have ended, in the order of their ends."""
        ended = [(row.ended_at, row.number, row) for row in self.trials if row.ended_at and row.state not in UNFINISHED]
        return [row for _, _, row in sorted(ended, key=lambda entry: entry[:2])]

    @cached_property
    def settings(self) -> pd.DataFrame:
        """Sampled settings and value of the trials that have one, a row each."""
        rows = [
            {**row.params, "trial": row.number, "state": row.state, "value": self.value(row)}
            for row in self.trials
            if self.value(row) is not None
        ]
        return pd.DataFrame(rows)

    @property
    def params(self) -> list[str]:
        return param_names(self.trials)

    def is_log(self, setting: str) -> bool:
        """Whether the study searched a setting by its logarithm."""
        dimension = self.space.dimensions.get(setting)
        return isinstance(dimension, Range) and dimension.log

    @cached_property
    def space(self) -> Space:
        return recorded_space(self.study.spec)


def read_study(store: Store, name: str, importances: dict[str, float] | None = None) -> StudyData:
    """Everything that the figures of a study are drawn from. Raises UnknownStudyError."""
    study = store.study(name)
    trials = [row for row in store.trials(study.id) if row.repeat_of is None]
    curves = store.study_points(study.id)
    board = leaderboard(store, name)
    best = next((row for row in trials if board.best and row.number == board.best.trial), None)
    return StudyData(
        study=study,
        trials=trials,
        points={row.number: curves.get(row.id, []) for row in trials},
        board=board,
        details=store.details(best.id) if best else {},
        importances=importances,
    )
