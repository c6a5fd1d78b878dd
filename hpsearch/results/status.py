"""How far a study is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from hpsearch.errors import UsageError
from hpsearch.files.layout import run_folder
from hpsearch.files.trial_log import log_file, read_log
from hpsearch.records import UNFINISHED, TrialState
from hpsearch.results.leaderboard import count_states, leaderboard
from hpsearch.spec.redaction import hide_secrets
from hpsearch.store import leases
from hpsearch.store.store import Store, opened_store


def study_status(opened: Store, name: str, url: str) -> dict[str, Any]:
    row = opened.study(name)
    trials = [trial for trial in opened.trials(row["id"]) if trial["repeat_of"] is None]
    lease = opened.lease(row["id"])
    board = leaderboard(opened, name, top=1)
    ended = [trial for trial in trials if trial["state"] not in UNFINISHED]
    running = [trial for trial in trials if trial["state"] == TrialState.RUNNING]
    left = max(0, row["budget_trials"] - len(ended))
    mean_s = sum(trial["device_seconds"] or 0.0 for trial in ended) / len(ended) if ended else None
    is_held = leases.is_held(lease)
    return {
        "schema_version": 1,
        "study": name,
        "store": hide_secrets(url),
        "budget": row["budget_trials"],
        "states": count_states(trials),
        "best": board.best,
        "metric": row["metric"],
        "holder": lease["holder"] if lease is not None and is_held else None,
        "since": lease["acquired_at"] if lease is not None and is_held else None,
        "heartbeat_at": lease["heartbeat_at"] if lease is not None and is_held else None,
        "seconds_left": None if mean_s is None or not running else left * mean_s / len(running),
        "is_finished": left == 0,
    }


def watch_study(url: str, name: str, *, every_s: float) -> Iterator[dict[str, Any]]:
    """`study_status` with the trials, again and again until the study is finished."""
    with opened_store(url) as opened:
        while True:
            found = study_status(opened, name, url)
            study = opened.study(name)
            trials = [trial for trial in opened.trials(study["id"]) if trial["repeat_of"] is None]
            for trial in trials:
                trial["points"] = opened.points(trial["id"]) if trial["state"] == TrialState.RUNNING else []
            yield {**found, "trials": trials}
            if found["is_finished"]:
                return
            time.sleep(every_s)


def trial_log(url: str, name: str, trial: int, *, follow: bool) -> Iterator[dict[str, Any]]:
    """The lines of a trial's log. Raises UnknownStudyError, and UsageError when this machine has no such file."""
    with opened_store(url) as opened:
        study = opened.study(name)
        file = log_file(run_folder(study["placement"]["folder"], study), trial)
        position = 0
        while True:
            is_live = opened.trial(study, trial)["state"] in UNFINISHED
            lines, position = read_log(file, start=position)
            yield from lines
            if not (follow and is_live):
                break
            time.sleep(0.5)
    if not position:
        raise UsageError(f"trial {trial} has no log at {file}: it has not begun, or ran on other machines")
