"""Who goes on past a rung, and who waits."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from hpsearch.pruning import rungs
from hpsearch.pruning.rungs import Rungs


def climbed(values: dict[int, list[float]], reduction_factor: int = 3) -> Rungs:
    """Trials with their values at rung 0, 1, ..."""
    found = Rungs(reduction_factor)
    for number, at in values.items():
        for rung, value in enumerate(at):
            found.reach(number, rung, value)
    return found


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_rungs_lie_after_the_warm_up_in_order(warmup: float) -> None:
    parts = rungs.places(3, warmup)
    assert list(parts) == sorted(parts)
    assert warmup < parts[0]
    assert all(later == earlier or later >= 1.5 * earlier for earlier, later in pairwise(parts)), (
        "no two nearly at once"
    )
    assert rungs.places(3, 0.0) == pytest.approx((1 / 81, 1 / 27, 1 / 9, 1 / 3))


def test_one_of_three_goes_on_and_the_others_may_later() -> None:
    found = climbed({0: [1.0], 1: [2.0]})
    assert found.next([0, 1]) is None, "a third of two is nobody"
    found.reach(2, 0, 3.0)
    assert found.is_promoted(0)
    assert not found.is_promoted(1)
    assert found.next([0, 1, 2]) == 0
    for number in range(3, 6):
        found.reach(number, 0, 4.0)
    assert found.next([1, 2]) == 1, "of six the second is among the best"
    assert found.standing(1) == (2, 6)


def test_the_highest_rung_comes_first_and_on_it_the_best() -> None:
    found = climbed({0: [1.0, 0.9], 1: [1.1, 0.8], 2: [1.2, 0.7], 3: [0.1], 4: [0.2], 5: [3], 6: [3], 7: [3], 8: [3]})
    assert found.next(range(9)) == 2
    assert found.next([0, 1, 3, 4]) == 3
    assert found.leading([0, 1, 3, 4]) == 1
    assert found.worst([0, 3, 4, 8]) in (0, 8)


def test_where_early_ranks_lie_more_go_on() -> None:
    agreeing = climbed({number: [float(number), float(number)] for number in range(12)})
    lying = climbed({number: [float(number), float(-number)] for number in range(12)})
    for found in (agreeing, lying):
        for number in range(12, 24):
            found.reach(number, 0, 20.0 + number)
    assert not agreeing.is_promoted(20)
    assert lying.is_promoted(20)
    going = [sum(found.is_promoted(number) for number in range(12, 24)) for found in (agreeing, lying)]
    assert going == [0, 12]


def test_a_run_that_came_to_nothing_speaks_against_its_rung() -> None:
    believed = climbed({number: [float(number)] for number in range(30)})
    doubted = climbed({number: [float(number)] for number in range(30)})
    for number in range(8):
        believed.end(number, float(number))
        doubted.end(number, math.inf if number < 4 else 0.0)
    assert not believed.is_promoted(12)
    assert doubted.is_promoted(12)


def test_what_waits_is_expected_to_gain_what_others_gained() -> None:
    found = climbed({0: [5.0, 4.0, 3.5], 1: [6.0, 5.2, 4.6], 2: [5.5]})
    found.end(0, 3.0)
    found.end(1, 4.2)
    assert found.expected(2) == pytest.approx(5.5 - 0.9 - 0.55 - 0.45)
    assert found.expected(0) == pytest.approx(3.5 - 0.45)
    assert found.expected(3) is None
    found.end(4, math.inf)
    assert math.isfinite(found.expected(2) or math.nan)


def test_one_in_ten_is_let_past_while_there_is_doubt_and_nobody_after() -> None:
    doubting, sure = Rungs(3, seed=1), Rungs(3, seed=1)
    for number in range(300):
        for found in (doubting, sure):
            found.reach(number, 0, float(number))
    for number in range(90):
        sure.reach(number, 1, float(number))
        doubting.reach(number, 1, float(-number if number % 2 else number))
    later = range(250, 300)
    assert not any(sure.is_promoted(number) for number in later)
    past = Rungs(3, seed=1)
    for number in range(300):
        past.reach(number, 0, float(number))
    assert 1 <= sum(past.is_promoted(number) for number in range(100, 300)) <= 40
    assert sum(doubting.is_promoted(number) for number in later) >= 1


def test_who_is_among_the_best_of_the_first_goes_on() -> None:
    found = Rungs(3)
    for number in range(10):
        found.reach(number, 0, 10.0 + number)
    for number in range(10, 40):
        found.reach(number, 0, 1.0 + 0.01 * number)
    found.reach(40, 0, 2.0)
    assert found.standing(40)[0] > 40 / 3, "behind most of the chosen ones"
    assert found.is_promoted(40), "and ahead of all that were drawn blindly"
    found.reach(41, 0, 13.5)
    assert not found.is_promoted(41)


def test_a_value_that_comes_again_after_a_crash_changes_nothing() -> None:
    found = climbed({0: [1.0], 1: [2.0], 2: [3.0]})
    found.reach(0, 0, 1.0)
    assert found.standing(2) == (3, 3)


def test_good_trials_are_found_at_a_part_of_the_cost() -> None:
    """Forty runs whose order at a rung is nearly that of their ends: one of the very best runs to its end."""
    for seed in range(20):
        draw = random.Random(seed)
        ends = {number: draw.uniform(1, 5) for number in range(40)}
        found, cost = Rungs(3), 0.0
        waiting: set[int | None] = set()
        parts = [*rungs.places(3, 0.0), 1.0]
        at: dict[int, int] = {}
        started = iter(ends)
        while True:
            number = found.next(waiting)
            number = next(started, None) if number is None else number
            leading = [one for one in waiting if found.standing(one)[0] == 1]
            number = found.leading(leading) if number is None and leading else number
            waiting.discard(number)
            if number is None:
                break
            while True:
                level = at[number] = at.get(number, -1) + 1
                cost += parts[level] - (parts[level - 1] if level else 0)
                if level == rungs.LEVELS:
                    found.end(number, ends[number])
                    break
                found.reach(number, level, ends[number] + 0.3 * (rungs.LEVELS - level) + draw.gauss(0, 0.02))
                if not found.is_promoted(number):
                    waiting.add(number)
                    break
        found_best = min(ends[number] for number, level in at.items() if level == rungs.LEVELS)
        assert found_best < min(ends.values()) + 0.1
        assert cost < 14, "of forty full runs"
