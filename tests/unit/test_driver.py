"""The driver's state machine: sequences of events, and the rows that they must leave."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpsearch.driver.run.disk import DISK_PATIENCE_S
from hpsearch.driver.run.failures import MOST_BACK_OFF_S
from hpsearch.driver.run.trials import Repeat
from hpsearch.files import storage
from hpsearch.records import RANKED, Decision, TrialState
from hpsearch.store.store import Store
from tests.fake_backend import EPOCHS, FakeBackend

PROMOTE = "{budget: {trials: 9}, prune: {unpromising: promote}}"
DEADLINE = "{budget: {trials: 9, minutes: 10}}"
Make = Callable[..., FakeBackend]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path_factory.mktemp('driver')}/store.db", create=True)
    yield opened
    opened.close()


@pytest.fixture
def backend(store: Store, tmp_path: Path) -> Iterator[Make]:
    made: list[FakeBackend] = []

    def make(study: str = "", **options: Any) -> FakeBackend:
        made.append(FakeBackend(store, tmp_path, study, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("study", "events", "states"),
    [
        pytest.param(
            "{budget: {trials: 2}}", ["start 2", "point 0", "end 0", "point 1", "end 1", "idle"],
            {0: "completed", 1: "completed"}, id="two trials side by side",
        ),
        pytest.param(
            "{budget: {trials: 2}}", ["start 2", "idle", "point 0", "end 0", "idle"],
            {0: "completed", 1: "running"}, id="no more trials than the budget has",
        ),
        pytest.param(
            "{budget: {trials: 1}}", ["start", "point 0", "lose 0", "start", "point 0", "end 0", "idle"],
            {0: "completed"}, id="a lost worker is tried again under its number",
        ),
        pytest.param(
            "{budget: {trials: 1}, limits: {retries: 0}}", ["start", "point 0", "lose 0", "idle"],
            {0: "failed"}, id="without retries a lost worker fails its trial",
        ),
        pytest.param(
            "{budget: {trials: 1}, limits: {retries: 1}}", ["start", "lose 0", "start", "lose 0", "idle"],
            {0: "failed"}, id="a trial is retried as often as the limit says",
        ),
        pytest.param(
            "{budget: {trials: 1}, limits: {retries: 0}}",
            ["start", "lose 0 preempted: a node left", "start", "lose 0 preempted: a node left", "start", "end 0 failed"],
            {0: "failed"}, id="preemptions cost no retry",
        ),
        pytest.param(
            "{budget: {trials: 2}}", ["start 2", "point 1", "lose 1", "start", "point 0", "end 0", "point 1", "end 1", "idle"],
            {0: "completed", 1: "completed"}, id="a lost trial goes before a new one",
        ),
        pytest.param(
            "{budget: {trials: 3}}", ["start", "fail 0", "start", "point 1", "end 1", "start", "end 2 diverged", "idle"],
            {0: "failed", 1: "completed", 2: "diverged"}, id="a failed trial counts against the budget",
        ),
        pytest.param(
            "{budget: {trials: 2}}", ["start", "point 0", "ask", "idle", "leave 0", "finish"],
            {0: "interrupted"}, id="asked to stop, nothing new starts and what runs is put back",
        ),
        pytest.param(
            "{budget: {trials: 2}}", ["start", "point 0", "ask", "end 0", "finish"],
            {0: "completed"}, id="a trial that ends within the grace has ended",
        ),
        pytest.param(
            "{budget: {trials: 2}}", ["start 2", "finish"],
            {0: "interrupted", 1: "interrupted"}, id="a backend that ends leaves its trials to the next launch",
        ),
        pytest.param(
            "{budget: {trials: 1}}", ["start", "full 0", "idle"],
            {0: "interrupted"}, id="a full disk starts nothing",
        ),
    ],
)  # fmt: skip
def test_events_leave_these_rows(backend: Make, study: str, events: list[str], states: dict[int, str]) -> None:
    played = backend(study).play(*events)
    assert played.states() == states
    assert {state: count for state, count in played.run.states.items() if count} == {
        state: list(states.values()).count(state) for state in set(states.values()) - {"running"}
    }, "the driver counts what the store has"


@pytest.mark.parametrize("state", ["completed", "overfit", "plateau", "diverged", "infeasible", "failed"])
@pytest.mark.parametrize(
    "before", [[], ["point 0"], ["point 0", "lose 0", "start"], ["point 0", "lose 0", "start", "point 0"]]
)
def test_a_trial_ends_in_every_state_from_everywhere(backend: Make, state: str, before: list[str]) -> None:
    if state in RANKED and not before:
        before = ["point 0"]  # what is ranked has a best point
    played = backend("{budget: {trials: 1}}").play("start", *before, f"end 0 {state}", "idle")
    assert played.states() == {0: state}
    (row,) = played.rows()
    assert row.attempt == 1 + before.count("lose 0")
    assert row.worker_deaths == before.count("lose 0")


def test_a_retried_trial_resumes_its_curve_and_repeats_nothing(backend: Make) -> None:
    played = backend("{budget: {trials: 1}}").play("start", "point 0 5", "point 0 4", "lose 0", "start")
    assert played.live[0].recorded == 2
    assert played.live[0].attempt == 2
    assert len(played.live[0].earlier) <= 1
    played.play("point 0 3", "end 0")
    points = played.store.points(played.rows()[0].id)
    assert [(point.evaluation, point.valid_loss) for point in points] == [(1, 5.0), (2, 4.0), (3, 3.0)]


# Rungs


def test_trials_behind_at_a_rung_pause_and_free_their_device(backend: Make) -> None:
    played = backend(PROMOTE)
    for loss in (4.0, 5.0, 6.0, 7.0):
        played.train(played.start(), loss)
    assert Decision.PAUSE in played.answers
    paused = [row for row in played.rows() if row.state == "paused"]
    assert paused
    assert all("waits at epoch" in row.reason for row in paused)
    assert not played.live


def test_a_paused_trial_that_comes_to_lead_is_promoted_under_its_number(backend: Make) -> None:
    played = backend(PROMOTE)
    first = played.start()
    played.train(first, 4.0)
    assert played.states() == {first: "paused"}, "one trial alone is not known to be among the best third"
    started = []
    while first not in started and len(started) < 8:
        started.append(played.start())
        if started[-1] != first:
            played.train(started[-1], 8.0 + len(started))
    assert started[-1] == first, "promoted before more new trials start"
    assert played.live[first].attempt == 2
    assert played.live[first].recorded == len(played.curves[first])


def test_when_nothing_is_left_paused_trials_end_as_unpromising(backend: Make) -> None:
    played = backend(PROMOTE)
    while (config := played.run.next_trial()) is not None:
        played.live[config.number] = config
        played.train(config.number, 4.0 + config.number)
    states = played.states()
    assert set(states) == set(range(9))
    assert set(states.values()) == {"completed", "unpromising"}
    assert states[0] == "completed", "the best is never given up"


def test_no_more_trials_are_paused_than_the_limit_says(backend: Make) -> None:
    played = backend("{budget: {trials: 9}, prune: {unpromising: promote}, limits: {keep_paused: 2}}")
    most = 0
    while (config := played.run.next_trial()) is not None:
        played.live[config.number] = config
        played.train(config.number, 4.0 + config.number)
        most = max(most, list(played.states().values()).count("paused"))
    assert most == 2


# Stopping, and a winner at any moment


def test_the_best_unfinished_trial_is_scored_when_the_launch_is_stopped(backend: Make) -> None:
    played = backend().play("start 2", "point 0 4.0", "point 1 3.0", "ask", "leave 0", "leave 1")
    played.play("start")
    (config,) = played.live.values()
    assert (config.number, config.scores_only) == (1, True)
    played.play("leave 1", "idle", "look", "finish")
    assert played.ended == "stopped by SIGTERM"
    assert played.states() == {0: "interrupted", 1: "interrupted"}
    scores = played.store.study_scores(played.row.id)
    assert scores[1]["perplexity"].value == 3.0
    assert set(scores) == {1}


def test_a_stopped_launch_scores_nothing_that_cannot_win(backend: Make) -> None:
    played = backend().play("start", "point 0 2.0", "end 0", "start", "point 1 3.0", "ask", "leave 1", "idle", "look")
    assert played.ended == "stopped by SIGTERM"


def test_a_launch_whose_grace_is_over_ends_whatever_runs(backend: Make) -> None:
    played = backend().play("start", "point 0", "ask", "look")
    assert played.ended is None
    played.play("wait 1000")
    assert played.ended
    assert played.play("finish").states() == {0: "interrupted"}


def test_a_study_whose_time_is_up_scores_all_that_have_not_ended(backend: Make) -> None:
    played = backend(DEADLINE).play("start 2", "point 0 4.0", "point 1 3.0", "wait 601")
    assert played.run.stop_reason == "the budget of 10 minutes is used up"
    played.play("leave 0", "leave 1", "start", "leave 1", "start", "leave 0", "look", "finish")
    assert set(played.store.study_scores(played.row.id)) == {0, 1}


def test_as_time_runs_out_nothing_new_starts_and_the_leader_is_brought_to_its_end(backend: Make) -> None:
    played = backend(DEADLINE).play("start", *(f"point 0 {4 - 0.1 * epoch}" for epoch in range(3)))
    # An epoch takes 10 s; the six that the leader needs are what is left.
    played.play("wait 545")
    assert any("goes to the leading trials" in note for note in played.notes)
    played.play("leave 0", "start")
    assert played.live[0].finish_in_s is not None
    assert 0 < played.live[0].finish_in_s < 60
    played.play("idle", "point 0 3.0", "end 0", "wait 60", "finish")
    assert played.states() == {0: "completed"}


# Failures


def test_a_study_whose_first_trials_all_fail_alike_ends_with_the_reason(backend: Make) -> None:
    played = backend().play("start", "fail 0", "start", "fail 1", "start", "fail 2", "idle", "look")
    assert played.ended == "the first 3 trials all ended the same way: failed: ValueError: wrong"
    assert played.run.stop_code == 3


def test_lost_workers_in_a_row_are_waited_for(backend: Make) -> None:
    played = backend("{budget: {trials: 4}, limits: {retries: 9}}").play("start", "lose 0", "start", "lose 0", "idle")
    assert played.run.is_waiting
    played.play("wait 2", "start", "point 0", "lose 0", "start")
    assert not played.run.is_waiting, "a report in between starts the row again"


def test_equal_failures_later_on_pause_a_study_and_then_end_it(backend: Make) -> None:
    played = backend("{budget: {trials: 20}}").play("start", "point 0", "end 0")
    for number in range(1, 10):
        played.play("start", f"point {number}", f"fail {number}")
        if number % 3 == 0 and number < 9:
            assert played.run.is_waiting
            played.play("idle", f"wait {MOST_BACK_OFF_S}")
    assert "the last 3 trials all ended the same way" in (played.run.stop_reason or "")


def test_a_full_disk_is_waited_for_and_then_given_up(backend: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    room = False
    monkeypatch.setattr(storage, "has_room", lambda folder, needed: room)
    played = backend().play("start", "point 0", "full 0", "idle", "wait 10", "idle")
    room = True
    played.play("wait 10", "start", "point 0", "end 0")
    assert any("room on the disk again" in note for note in played.notes)
    room = False
    played.play("start", "full 1", f"wait {DISK_PATIENCE_S + 1}", "look")
    assert played.run.stop_code == 74


# Resuming, and finals


def test_a_later_launch_takes_what_is_interrupted_under_its_number(backend: Make) -> None:
    study = backend().name
    again = backend(name=study)
    again.play("start 2", "point 0 4.0", "point 1 5.0", "ask", "leave 0", "leave 1", "finish")
    assert again.states() == {0: "interrupted", 1: "interrupted"}
    again.close()
    third = backend(name=study)
    assert third.run.resumed == 2
    third.play("start 2")
    assert {number: config.attempt for number, config in third.live.items()} == {0: 2, 1: 2}
    assert {number: config.recorded for number, config in third.live.items()} == {0: 1, 1: 1}


def test_a_launch_that_was_killed_leaves_running_rows_which_the_next_takes(backend: Make) -> None:
    study = backend("{budget: {trials: 3}}").name
    killed = backend(name=study)
    killed.play("start 2", "point 0 4.0")
    killed.flush()
    assert killed.states() == {0: "running", 1: "running"}
    killed.close()
    after = backend(name=study)
    assert after.run.resumed == 2
    after.play("start 2", "point 0 3.0", "end 0", "point 1 3.0", "end 1", "start", "point 2", "end 2", "idle")
    assert after.states() == {0: "completed", 1: "completed", 2: "completed"}
    assert [row.worker_deaths for row in after.rows()] == [0, 0, 0], "a killed driver costs no retry"


def test_finals_repeat_settings_from_new_seeds_and_tell_the_sampler_nothing(backend: Make) -> None:
    study = backend("{budget: {trials: 1}}").name
    searched = backend(name=study)
    searched.play("start", "point 0 3.0", "end 0")
    searched.flush()
    searched.close()
    finals = backend(name=study, repeats=[Repeat(of=0, seed=1), Repeat(of=0, seed=2)])
    finals.play("start 2")
    assert [(config.repeat_of, config.seed) for config in finals.live.values()] == [(0, 1), (0, 2)]
    assert len({str(config.params) for config in finals.live.values()}) == 1
    finals.play("point 1 3.1", "end 1", "point 2 3.2", "end 2", "idle")
    assert [(row.number, row.repeat_of) for row in finals.rows()] == [(0, None), (1, 0), (2, 0)]


# Any order of events


def any_order(backend: FakeBackend, rng: random.Random, steps: int) -> None:
    """Events as they may come, from whatever is possible next."""
    for _ in range(steps):
        choices = ["try"]
        if backend.live and backend.run.stop_reason is None:
            number = rng.choice(sorted(backend.live))
            choices += [f"point {number} {rng.uniform(2, 6):.3f}"] * 6
            choices += [f"lose {number}", f"lose {number} preempted: gone", f"fail {number} E{rng.random()}"]
            if backend.curves.get(number):
                choices += [f"end {number}", f"end {number} overfit", f"end {number} diverged"]
        event = rng.choice(choices)
        if event == "try":
            if len(backend.live) < 3 and (config := backend.run.next_trial()) is not None:
                backend.live[config.number] = config
            backend.wait("5")
            continue
        if event.startswith("point") and len(backend.curves.get(int(event.split()[1]), [])) >= EPOCHS:
            event = f"end {event.split()[1]}"
        backend.play(event)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_the_order_of_events_the_rows_are_right(backend: Make, seed: int) -> None:
    rng = random.Random(seed)
    trials, retries = rng.randint(1, 6), rng.randint(0, 2)
    rule = rng.choice(["none", "median", "promote"])
    study = f"{{budget: {{trials: {trials}}}, limits: {{retries: {retries}}}, prune: {{unpromising: {rule}}}}}"
    played = backend(study)
    any_order(played, rng, rng.randint(5, 60))
    live = set(played.live)
    played.play("finish")
    rows = played.rows()
    assert [row.number for row in rows] == list(range(len(rows))), "numbers have no gaps and are given once"
    assert len(rows) <= trials
    assert not [row for row in rows if row.state == "running"]
    assert {row.number for row in rows if row.state == "interrupted"} >= live - {
        row.number for row in rows if row.state not in ("interrupted",)
    }
    counted = {state: count for state, count in played.run.states.items() if count}
    assert counted == {state: [row.state for row in rows].count(state) for state in {row.state for row in rows}}
    for row in rows:
        points = [point.evaluation for point in played.store.points(row.id)]
        assert points == list(range(1, len(played.curves.get(row.number, [])) + 1)), "each point once, in order"
        assert row.worker_deaths <= retries + 1
        if row.state == "failed" and "worker" in (row.reason or ""):
            assert row.worker_deaths == retries, "a retry is used up before the trial fails"
        is_ranked = TrialState(row.state) in (TrialState.COMPLETED, TrialState.OVERFIT)
        assert is_ranked == (row.number in played.store.study_scores(played.row.id))
        assert (row.ended_at is None) == (row.state in ("interrupted", "paused"))
