"""When a study's time runs short, and for whom."""

from __future__ import annotations

from typing import Any

import pytest

from hpsearch.driver.run.endgame import Clock


def settings(layers: int = 2, width: int = 64, epochs: int = 10) -> dict[str, Any]:
    return {"model": {"num_layers": layers, "hidden_size": width}, "training": {"num_epochs": epochs}}


def test_what_a_trial_needs_follows_from_the_pace_of_others_and_from_its_size() -> None:
    clock = Clock(600.0, now=0.0)
    assert clock.needed(settings(), 0.0) is None
    clock.learn(0, settings(), epochs=2.0, seconds=10.0)
    assert clock.needed(settings(), 0.0) == pytest.approx(50.0)
    assert clock.needed(settings(), 8.0) == pytest.approx(10.0)
    deeper = clock.needed(settings(layers=8), 0.0)
    assert deeper is not None
    assert 100.0 < deeper < 200.0
    for trial in (1, 2):
        clock.learn(trial, settings(), epochs=1.0, seconds=10.0)
    assert clock.needed(settings(), 0.0) == pytest.approx(100.0)  # the median of what was seen


@pytest.mark.parametrize(
    ("now", "epoch", "expected"),
    [
        (0.0, 0.0, False),
        (540.0, 0.0, False),
        (560.0, 0.0, True),
        (560.0, 8.0, False),
        (594.0, 8.0, True),
        (597.0, 8.0, False),
    ],
)
def test_time_is_short_when_the_leader_needs_what_is_left(now: float, epoch: float, expected: bool) -> None:
    clock = Clock(600.0, now=0.0)
    clock.learn(0, settings(), epochs=2.0, seconds=10.0)
    assert clock.is_short(now, settings(), epoch) is expected


def test_a_leader_that_would_never_end_gets_a_third_of_the_time() -> None:
    clock = Clock(600.0, now=0.0)
    clock.learn(0, settings(epochs=1000), epochs=1.0, seconds=10.0)
    assert not clock.is_short(380.0, settings(epochs=1000), 1.0)
    assert clock.is_short(391.0, settings(epochs=1000), 1.0)
    assert not clock.is_short(599.0, None, 0.0)


def test_a_budget_of_seconds_is_short_while_a_trial_is_still_worth_starting() -> None:
    clock = Clock(13.0, now=0.0)
    clock.learn(0, settings(), epochs=2.0, seconds=4.0)
    assert not clock.is_short(4.0, settings(), 2.0)
    assert clock.is_short(6.0, settings(), 2.0), "7 s are left, and the leader needs 16"
    assert clock.is_worth_a_start(6.0)
    assert not clock.is_short(9.0, settings(), 2.0), "who is told to leave now would not come back"


def test_part_of_what_is_left_is_kept_for_scores() -> None:
    clock = Clock(1000.0, now=0.0)
    assert clock.left(900.0) == pytest.approx(90.0)
    assert clock.left(0.0) == pytest.approx(970.0)
