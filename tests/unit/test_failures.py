"""When failures end or pause a study: sequences of ends and what follows from each."""

from __future__ import annotations

import pytest

from hpsearch.driver.run.failures import (
    BACK_OFF_S,
    EQUAL_FAILURE_PAUSES,
    MOST_BACK_OFF_S,
    SAME_FAILURES,
    Consequence,
    Failures,
)
from hpsearch.records import TrialResult, TrialState

NOTHING = Consequence()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def failed(reason: str = "ValueError: no such layer 3") -> TrialResult:
    return TrialResult(state=TrialState.FAILED, reason=reason)


def ended(state: TrialState = TrialState.COMPLETED) -> TrialResult:
    return TrialResult(state=state, reason="ran its 3 epochs")


def test_a_study_whose_first_trials_all_fail_the_same_way_ends() -> None:
    failures = Failures()
    found = [failures.ended(failed(f"no layer {number}"), has_reported=False, running=[]) for number in range(3)]
    assert found[:2] == [NOTHING, NOTHING]
    assert found[2].stop == "the first 3 trials all ended the same way: failed: no layer 2"
    assert failures.suspicion


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param([failed("a"), failed("b"), failed("a")], id="in different ways"),
        pytest.param([failed(), ended(), failed(), failed()], id="one ended well"),
        pytest.param([failed(), ended(TrialState.OVERFIT), failed(), failed()], id="one overfit"),
        pytest.param([ended(TrialState.DIVERGED), failed(), failed()], id="one diverged: it has trained"),
    ],
)
def test_failures_that_are_no_pattern_end_nothing(ends: list[TrialResult]) -> None:
    failures = Failures()
    assert [failures.ended(end, has_reported=False, running=[]) for end in ends] == [NOTHING] * len(ends)
    assert failures.suspicion is None


def test_trials_that_have_reported_clear_those_that_failed_before_their_first_report() -> None:
    failures = Failures()
    for _ in range(SAME_FAILURES):
        assert failures.ended(failed(), has_reported=False, running=[True, False]) == NOTHING
    assert failures.suspicion is None


def test_running_trials_without_a_report_are_waited_for() -> None:
    failures = Failures()
    for _ in range(SAME_FAILURES):
        assert failures.ended(failed(), has_reported=False, running=[False]) == NOTHING
    assert failures.suspicion, "nothing new starts meanwhile"
    failures.progressed()
    assert failures.suspicion is None, "the one that was waited for trains"
    again = Failures()
    for _ in range(SAME_FAILURES):
        again.ended(failed(), has_reported=False, running=[False])
    assert again.ended(failed(), has_reported=False, running=[]).stop, "it failed, too"


def test_trials_that_fail_after_their_first_report_are_not_cleared_by_others() -> None:
    failures = Failures()
    found = [failures.ended(failed(), has_reported=True, running=[True]) for _ in range(SAME_FAILURES)]
    assert found[-1].stop


def test_equal_failures_after_a_good_start_pause_and_then_end_the_study() -> None:
    clock = Clock()
    failures = Failures(clock)
    failures.ended(ended(), has_reported=True, running=[])
    kinds = []
    for _ in range(SAME_FAILURES * (1 + EQUAL_FAILURE_PAUSES)):
        found = failures.ended(failed(), has_reported=True, running=[])
        kinds.append("stop" if found.stop else "pause" if found.pause else "")
        if found.pause:
            assert failures.is_backing_off
            clock.now += MOST_BACK_OFF_S
            assert not failures.is_backing_off
    assert kinds == ["", "", "pause", "", "", "pause", "", "", "stop"]


def test_a_good_end_between_equal_failures_starts_the_count_again() -> None:
    failures = Failures(Clock())
    failures.ended(ended(), has_reported=True, running=[])
    for _ in range(4):
        for _ in range(SAME_FAILURES - 1):
            assert failures.ended(failed(), has_reported=True, running=[]) == NOTHING
        assert failures.ended(ended(), has_reported=True, running=[]) == NOTHING


def test_lost_workers_in_a_row_are_waited_for_longer_each_time_up_to_a_limit() -> None:
    clock = Clock()
    failures = Failures(clock)
    waits = [failures.lost() for _ in range(10)]
    assert waits[:4] == [0.0, BACK_OFF_S, 2 * BACK_OFF_S, 4 * BACK_OFF_S]
    assert waits[-1] == MOST_BACK_OFF_S
    assert failures.is_backing_off
    clock.now += MOST_BACK_OFF_S
    assert not failures.is_backing_off
    failures.progressed()
    assert failures.lost() == 0.0, "a report in between starts the row again"
