"""Which trials go on past a rung, and what one that waits there may come to. Pure; knows nothing of Optuna, Ray or SQL.

Successive halving of the promoting kind (ASHA: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys
2020): a trial pauses at each rung, with its checkpoint, unless it is among the best of all that have reached it; it
goes on when it has become one of them. Two things are not ASHA's. Ranks at a rung are trusted only as far as the
study's own trials bear them out: the share that goes on is 1/eta where the order at the rung is the order later, and
larger the less it is. So that this is known of more than the best, one trial in ten goes on past the lower rungs
whatever its rank. And a paused trial is no blank to the sampler: it counts at what it has, less what others gained from
there on.

Rungs lie at equal parts of each run after its warm-up, so that two runs are compared at the same place of their
schedules, whatever their numbers of epochs.
"""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_left, insort
from collections.abc import Iterable

LEVELS = 3
"""Rungs of a run: at 1/eta^3, 1/eta^2 and 1/eta of it."""
PAIRS_BELIEVED = 8
"""Pairs of trials that are taken to keep their order before any has been seen to."""
LET_PAST = 0.1
"""Part of the trials that a rung but the highest lets past whatever their rank."""
SURE_AFTER = 10
SURE_BELOW = 1.5
LATEST_SEEN = 100
"""Trials from which the agreement at a rung is taken: the latest that went on from it."""


def places(reduction_factor: int, warmup_fraction: float) -> tuple[float, ...]:
    """Where the rungs lie, as parts of a run, in order."""
    parts = (reduction_factor ** -(LEVELS - level) for level in range(LEVELS))
    return tuple(warmup_fraction + (1 - warmup_fraction) * part for part in parts)


class Rungs:
    """The values of a study's trials at its rungs; lower is better."""

    def __init__(self, reduction_factor: int, seed: int | None = None) -> None:
        """The seed decides who is let past; without one nobody is."""
        self._least = 1 / reduction_factor
        self._seed = seed
        self._at: list[dict[int, float]] = [{} for _ in range(LEVELS)]
        self._ordered: list[list[tuple[float, int]]] = [[] for _ in range(LEVELS)]
        self._later: list[dict[int, float]] = [{} for _ in range(LEVELS)]
        """Of trials that went on from a rung: the value at the next one, or at the end."""
        self._shares: list[float | None] = [None] * LEVELS
        self._gains: list[float | None] = [None] * LEVELS

    def reach(self, number: int, rung: int, value: float) -> None:
        """A trial has this value, the best so far, at a rung."""
        if number in self._at[rung]:
            return
        self._went_on(number, rung, value)
        self._at[rung][number] = value
        insort(self._ordered[rung], (value, number))

    def end(self, number: int, value: float) -> None:
        """A trial has ended with this value; infinity when it is worth nothing."""
        self._went_on(number, LEVELS, value)

    def goes_on(self, number: int) -> bool:
        """Whether a trial is among the best at the highest rung that it has reached, or let past it."""
        rung = self._highest(number)
        if rung is None or self._is_let_past(number, rung):
            return True
        return self._place(number, rung) < math.floor(self._share(rung) * len(self._at[rung]) + 1e-9)

    def next(self, waiting: Iterable[int]) -> int | None:
        """Of trials that wait the one to promote: of those that may go on the best at the highest rung."""
        return min((number for number in waiting if self.goes_on(number)), key=self._merit, default=None)

    def foremost(self, waiting: Iterable[int]) -> int:
        """Of trials that wait the best at the highest rung, whether it may go on or not."""
        return min(waiting, key=self._merit)

    def hindmost(self, waiting: Iterable[int]) -> int:
        """Of trials that wait the one that lies furthest behind at its rung."""

        def behind(number: int) -> float:
            rung = self._highest(number)
            return 0.0 if rung is None else self._place(number, rung) / len(self._at[rung])

        return max(waiting, key=behind)

    def standing(self, number: int) -> tuple[int, int]:
        """A trial's place at its highest rung, counted from 1, and how many have reached it."""
        rung = self._highest(number)
        assert rung is not None
        return 1 + self._place(number, rung), len(self._at[rung])

    def expected(self, number: int) -> float | None:
        """What a trial that waits would come to, gaining what others gained; None when it has reached no rung."""
        rung = self._highest(number)
        if rung is None:
            return None
        return self._at[rung][number] - sum(self._gain(later) for later in range(rung, LEVELS))

    def _is_let_past(self, number: int, rung: int) -> bool:
        if self._seed is None or rung == LEVELS - 1 or (
            len(self._later[rung]) >= SURE_AFTER and self._share(rung) < SURE_BELOW * self._least
        ):
            return False
        return random.Random(f"{self._seed}.{number}.{rung}").random() < LET_PAST

    def _highest(self, number: int) -> int | None:
        return next((rung for rung in reversed(range(LEVELS)) if number in self._at[rung]), None)

    def _place(self, number: int, rung: int) -> int:
        return bisect_left(self._ordered[rung], (self._at[rung][number], number))

    def _merit(self, number: int) -> tuple[int, float, int]:
        rung = self._highest(number)
        return (0, 0.0, number) if rung is None else (-rung, self._at[rung][number], number)

    def _went_on(self, number: int, rung: int, value: float) -> None:
        before = next((below for below in reversed(range(rung)) if number in self._at[below]), None)
        if before is not None:
            self._later[before][number] = value
            self._shares[before] = self._gains[before] = None

    def _pairs(self, rung: int) -> list[tuple[float, float]]:
        latest = list(self._later[rung].items())[-LATEST_SEEN:]
        return [(self._at[rung][number], later) for number, later in latest]

    def _share(self, rung: int) -> float:
        """The part that goes on: Kendall's tau of the order at the rung with that at the next says how small it is."""
        share = self._shares[rung]
        if share is None:
            agree, pairs = PAIRS_BELIEVED, self._pairs(rung)
            seen = PAIRS_BELIEVED
            for place, (here, later) in enumerate(pairs):
                for other_here, other_later in pairs[:place]:
                    sign = (here > other_here) - (here < other_here)
                    later_sign = (later > other_later) - (later < other_later)
                    agree += sign * later_sign
                    seen += abs(sign * later_sign)
            tau = max(0.0, agree / seen)
            share = self._shares[rung] = self._least + (1 - self._least) * (1 - tau)
        return share

    def _gain(self, rung: int) -> float:
        gain = self._gains[rung]
        if gain is None:
            gains = [here - later for here, later in self._pairs(rung) if math.isfinite(later)]
            gain = self._gains[rung] = statistics.median(gains) if gains else 0.0
        return gain
