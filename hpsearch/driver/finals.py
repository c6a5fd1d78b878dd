"""The best settings of a study again with new seeds, to see what was luck."""

from __future__ import annotations

from hpsearch.driver.launch import launch_spec
from hpsearch.driver.run.trials import Repeat
from hpsearch.errors import UsageError
from hpsearch.records import UNFINISHED, Listener, TrialState
from hpsearch.results.leaderboard import finalists, leaderboard
from hpsearch.results.study import Study
from hpsearch.spec.study import recorded_study
from hpsearch.store.store import opened_store

_RUN_AGAIN = UNFINISHED | {TrialState.FAILED}
"""States of a repeat that the next finals put in its place again."""


def run_finals(url: str, name: str, *, top: int, seeds: int, listen: Listener | None) -> Study:
    """Launch the repeats that are not done yet; see `hpsearch.finals`."""
    with opened_store(url) as opened:
        row = opened.study(name)
        spec = recorded_study(row.spec, row.placement, url, trials=row.budget_trials)
        rows = list(finalists(leaderboard(opened, name), top))
        if not rows:
            raise UsageError(f"no trial of '{name}' can be ranked yet, so there are no finals")
        done = {
            (trial.repeat_of, trial.seed)
            for trial in opened.trials(row.id)
            if trial.repeat_of is not None and trial.state not in _RUN_AGAIN
        }
    wanted = [
        Repeat(of=finalist.trial, seed=(spec.seed + number) % 2**32)
        for number in range(1, seeds + 1)
        for finalist in rows
    ]
    repeats = [repeat for repeat in wanted if (repeat.of, repeat.seed) not in done]
    if not repeats:
        return Study(name=name, store=url)
    return launch_spec(spec, row.overrides, listen, repeats)
