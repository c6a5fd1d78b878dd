"""How far a study is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpsearch.errors import UsageError
from hpsearch.files.layout import run_folder
from hpsearch.files.trial_log import log_file, read_log
from hpsearch.records import UNFINISHED, TrialState
from hpsearch.results.leaderboard import count_states, leaderboard
from hpsearch.spec.redaction import hide_secrets
from hpsearch.store.rows import RankedTrial, TrialWithCurve
from hpsearch.store.store import Store, opened_store


@dataclass(frozen=True, kw_only=True)
class StudyStatus:
    """How far a study is."""

    study: str
    store: str
    """Its URL without secrets."""
    budget: int
    states: dict[str, int]
    best: RankedTrial | None
    metric: str
    holder: str | None
    """The driver, while there is one; the two that follow are its, too."""
    since: datetime | None
    heartbeat_at: datetime | None
    seconds_left: float | None
    is_finished: bool


@dataclass(frozen=True, kw_only=True)
class WatchedStudy(StudyStatus):
    """How far a study is, with its trials; those that run have their curves."""

    trials: list[TrialWithCurve]


def study_status(opened: Store, name: str, url: str) -> StudyStatus:
    row = opened.study(name)
    trials = [trial for trial in opened.trials(row.id) if trial.repeat_of is None]
    lease = opened.lease(row.id)
    held = lease if lease is not None and lease.is_held else None
    board = leaderboard(opened, name, top=1)
    ended = [trial for trial in trials if trial.state not in UNFINISHED]
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    left = max(0, row.budget_trials - len(ended))
    mean_s = sum(trial.device_seconds or 0.0 for trial in ended) / len(ended) if ended else None
    return StudyStatus(
        study=name,
        store=hide_secrets(url),
        budget=row.budget_trials,
        states=count_states(trials),
        best=board.best,
        metric=row.metric,
        holder=held.holder if held else None,
        since=held.acquired_at if held else None,
        heartbeat_at=held.heartbeat_at if held else None,
        seconds_left=None if mean_s is None or not running else left * mean_s / len(running),
        is_finished=left == 0,
    )


def watch_study(url: str, name: str, *, every_s: float) -> Iterator[WatchedStudy]:
    """`study_status` with the trials, again and again until the study is finished."""
    with opened_store(url) as opened:
        while True:
            found = study_status(opened, name, url)
            trials = [
                TrialWithCurve(
                    **vars(trial), points=opened.points(trial.id) if trial.state == TrialState.RUNNING else []
                )
                for trial in opened.trials(opened.study(name).id)
                if trial.repeat_of is None
            ]
            yield WatchedStudy(**vars(found), trials=trials)
            if found.is_finished:
                return
            time.sleep(every_s)


def trial_log(url: str, name: str, trial: int, *, follow: bool) -> Iterator[dict[str, Any]]:
    """The lines of a trial's log. Raises UnknownStudyError, and UsageError when this machine has no such file."""
    with opened_store(url) as opened:
        study = opened.study(name)
        file = log_file(run_folder(study.placement["folder"], study), trial)
        position = 0
        while True:
            is_live = opened.trial(study, trial).state in UNFINISHED
            lines, position = read_log(file, start=position)
            yield from lines
            if not (follow and is_live):
                break
            time.sleep(0.5)
    if not position:
        raise UsageError(f"trial {trial} has no log at {file}: it has not begun, or ran on other machines")
