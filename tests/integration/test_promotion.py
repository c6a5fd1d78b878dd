"""Trials that pause at rungs and are promoted, as a user would notice it."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

import hpsearch
from hpsearch.records import Event
from hpsearch.store.store import Store
from hpsearch.upkeep.doctor import examine

pytestmark = pytest.mark.slow

LONGER = [
    "search.num_epochs=9",
    "search.num_layers=1",
    "data.fraction=0.05",
    "prune={overfit: false, unpromising: promote}",
]
"""Rungs after epochs 1, 2 and 4 of 9."""


def rungs_seen(study: hpsearch.Study) -> dict[int, float]:
    return {row.number: study.trial(row.number).points[-1].epoch for row in study.trials()}


def test_most_trials_wait_at_a_rung_and_the_best_of_each_go_on(tiny: Path) -> None:
    events: list[Event] = []
    study = hpsearch.launch(tiny, trials=9, overrides=LONGER, listen=events.append)
    epochs = rungs_seen(study)
    assert set(epochs.values()) <= {1, 2, 4, 9}
    assert 1 <= sum(last == 9 for last in epochs.values()) < 9
    for row in study.trials():
        if row.state == "unpromising":
            assert "never promoted" in row.reason
            assert not list(Path(tiny.parent, "runs").rglob(f"trial-{row.number:05d}*/*")), "its checkpoint is not kept"
    first = {number: study.trial(number).points[0].valid_loss for number in epochs}
    best = min(first, key=lambda number: first[number])
    assert epochs[best] > min(epochs.values()), "the best of the lowest rung has gone on"
    paused = [event.trial for event in events if event.kind == "trial_ended" and event.result.state == "paused"]
    again = [event.trial for event in events if event.kind == "trial_started" and event.attempt > 1]
    assert paused
    assert again
    assert set(again) <= set(paused)
    assert not examine(Store(f"sqlite:///{tiny.parent}/studies.db"))


def test_a_promoted_trial_goes_on_to_the_bit(tiny: Path, tmp_path: Path) -> None:
    one = hpsearch.launch(tiny, trials=9, overrides=LONGER)
    promoted = next(row for row in one.trials() if row.attempt > 1 and row.last_epoch == 9)
    alone = hpsearch.launch(
        tiny,
        name="alone",
        trials=9,
        overrides=[*LONGER, "prune.unpromising=none"],
    )
    there = one.trial(promoted.number)
    # The first ten are drawn before anything is known: they do not depend on the rule.
    (same,) = [row for row in alone.trials() if row.params == promoted.params]
    losses = [point.valid_loss for point in there.points]
    assert losses == [point.valid_loss for point in alone.trial(same.number).points]


def test_a_study_that_stops_while_trials_wait_takes_them_up(tiny: Path) -> None:
    seen = 0

    def stop_when_some_wait(event: Event) -> None:
        nonlocal seen
        if event.kind == "trial_ended" and event.result.state == "paused":
            seen += 1
            if seen == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hpsearch.launch(tiny, trials=9, overrides=LONGER, listen=stop_when_some_wait)
    before = hpsearch.open_study("tiny", store=f"sqlite:///{tiny.parent}/studies.db")
    waiting = {row.number: row for row in before.trials() if row.state == "paused"}
    assert len(waiting) >= 3
    found = examine(Store(f"sqlite:///{tiny.parent}/studies.db"))
    assert not [finding for finding in found if finding.trial in waiting], "to wait is nothing wrong"
    study = hpsearch.launch(tiny, trials=9, overrides=LONGER)
    rows = {row.number: row for row in study.trials()}
    assert len(rows) == 9
    assert all(row.state in ("completed", "unpromising") for row in rows.values())
    assert any(rows[number].last_epoch > 1 for number in waiting), "one that waited was promoted"
    for number in rows:
        evaluations = [point.evaluation for point in study.trial(number).points]
        assert evaluations == list(range(1, len(evaluations) + 1)), "no epoch was trained twice"
    loaded = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tiny.parent}/studies.db")
    assert {trial.state.name for trial in loaded.trials} <= {"COMPLETE", "PRUNED"}


def test_a_handful_of_trials_has_a_winner(tiny: Path) -> None:
    study = hpsearch.launch(tiny, trials=2, overrides=LONGER)
    assert [row.state for row in study.trials()].count("completed") == 1
    assert study.best is not None


def test_few_checkpoints_of_waiting_trials_are_kept(tiny: Path) -> None:
    most = 0

    def look(event: Event) -> None:
        nonlocal most
        if event.kind == "trial_started":
            states = list(Path(tiny.parent, "runs").rglob("resume*"))
            most = max(most, len({file.parent.name[:11] for file in states}))

    study = hpsearch.launch(tiny, trials=9, overrides=[*LONGER, "limits.keep_paused=2"], listen=look)
    assert most <= 4, "two that wait, one that was just ended, one that runs"
    assert len(study.leaderboard()) >= 1


def test_scores_are_compared_at_the_ends_of_epochs(tiny: Path) -> None:
    study = hpsearch.launch(
        tiny,
        trials=6,
        overrides=[
            "task=classification",
            "data={corpus: python_areas, fraction: 0.1}",
            "model.architecture=bert",
            "objective=f1",
            "training.evaluations_per_epoch=2",
            *LONGER[:1],
            "prune={overfit: false, unpromising: promote}",
        ],
    )
    ended = {row.number: row.last_epoch for row in study.trials()}
    assert all(epoch == int(epoch) for epoch in ended.values())
    assert study.best is not None


def test_the_rule_before_this_one_is_still_there(tiny: Path) -> None:
    study = hpsearch.launch(tiny, trials=3, overrides=[*LONGER, "prune.unpromising=median"])
    assert {row.attempt for row in study.trials()} == {1}
