"""Which paused trials are promoted, and how well one can be expected to end. Pure; knows nothing of Optuna, Ray or SQL.

Successive halving of the promoting kind (ASHA: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys
2020): a trial pauses at each rung, with its checkpoint, unless it is among the best of all that have reached it; it
is promoted once it has become one of them. What is not ASHA's:

- Ranks at a rung are trusted only as far as the study's own trials confirm them. The promoted share is 1/eta where the
  order at the rung is the order later, and grows as they disagree. So that this is known of more than the best trials,
  one in ten is exempt from the lower rungs, whatever its rank, as long as there is doubt.
- The first trials are drawn blindly, and those that follow are chosen: to be behind chosen ones says little so early.
  A trial is promoted, too, when it is among the best share of the first.
- The sampler sees a paused trial at its value so far, less what other trials gained from that rung on.

Rungs lie at equal parts of each run after its warm-up, so that two runs are compared at the same place of their
schedules, whatever their numbers of epochs.
"""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import islice

LEVELS = 4
"""Rungs of a run: at 1/eta^4, ..., 1/eta of it. Its end is one more."""
APART = 1.5
"""A rung that is less than this many times as far as the one before is merged with it."""
ENOUGH_OF_FIRST = 8
"""Of the first trials, those that must have reached a rung before others are compared with them there."""
PAIRS_BELIEVED = 8
"""Prior: pairs of trials that are assumed to keep their order before any pair is observed."""
LATEST_SEEN = 100
"""Trials that the agreement at a rung is computed from: the last ones promoted from it."""
EXEMPT = 0.1
"""Share of trials that is exempt from a rung as long as there is doubt."""
DOUBT_UNTIL = 10
DOUBT_ABOVE = 1.5
"""A rung is in doubt until DOUBT_UNTIL trials were promoted from it, and while its share is above DOUBT_ABOVE / eta."""


def places(reduction_factor: int, warmup_fraction: float) -> tuple[float, ...]:
    """Where the rungs lie, as parts of a run, in order; those that fall together are equal."""
    found: list[float] = []
    for level in range(LEVELS):
        part = warmup_fraction + (1 - warmup_fraction) * reduction_factor ** (level - LEVELS)
        found.append(found[-1] if found and part < APART * found[-1] else part)
    return tuple(found)


class Rungs:
    """The values of a study's trials at its rungs; lower is better."""

    def __init__(self, reduction_factor: int, seed: int | None = None, *, first: int = 10) -> None:
        """The seed decides which trials are exempt; without one none is. The `first` trials are drawn blindly."""
        self._num_first = first
        self._least = 1 / reduction_factor
        self._seed = seed
        self._paths: dict[int, list[float]] = {}
        """Of each trial the value at each rung and at its end; NaN where it has none."""
        self._highest: dict[int, int] = {}
        self._ordered: list[list[tuple[float, int]]] = [[] for _ in range(LEVELS)]
        self._first: list[list[float]] = [[] for _ in range(LEVELS)]
        self._promoted: list[dict[int, float]] = [{} for _ in range(LEVELS)]
        """Of trials that went on from a rung: the value at the next one that they reached, or at the end."""
        self._shares: list[float | None] = [None] * LEVELS
        self._gains: list[float | None] = [None] * LEVELS

    def reach(self, number: int, rung: int, value: float) -> None:
        """A trial has this value, the best so far, at a rung."""
        if number in self._paths and not math.isnan(self._paths[number][rung]):
            return
        self._add(number, rung, value)
        self._highest[number] = rung
        insort(self._ordered[rung], (value, number))
        if number < self._num_first:
            insort(self._first[rung], value)

    def end(self, number: int, value: float) -> None:
        """A trial has ended with this value; infinity when it is worth nothing."""
        if number in self._paths:
            self._add(number, LEVELS, value)

    def is_promoted(self, number: int) -> bool:
        """Whether a trial is among the best at the highest rung it has reached, or exempt from it."""
        rung = self._highest.get(number)
        if rung is None:
            return True
        share = self._share(rung)
        if self._place(number, rung) < math.floor(share * len(self._ordered[rung]) + 1e-9):
            return True
        first = self._first[rung]
        if number >= self._num_first and len(first) >= ENOUGH_OF_FIRST:
            better = bisect_left(first, self._paths[number][rung])
            if better < math.floor(share * len(first) + 1e-9):
                return True
        return self._is_exempt(number, rung)

    def next(self, waiting: Iterable[int]) -> int | None:
        """The paused trial to promote: the best one at the highest rung, of those that may be promoted."""
        return min((number for number in waiting if self.is_promoted(number)), key=self._merit, default=None)

    def leading(self, waiting: Iterable[int]) -> int:
        """The best paused trial at the highest rung, whether it may be promoted or not."""
        return min(waiting, key=self._merit)

    def worst(self, waiting: Iterable[int]) -> int:
        """The paused trial that is furthest behind at its rung."""

        def behind(number: int) -> float:
            rung = self._highest.get(number)
            return 0.0 if rung is None else self._place(number, rung) / len(self._ordered[rung])

        return max(waiting, key=behind)

    def standing(self, number: int) -> tuple[int, int]:
        """A trial's place at its highest rung, counted from 1, and how many have reached it."""
        rung = self._highest[number]
        return 1 + self._place(number, rung), len(self._ordered[rung])

    def expected(self, number: int) -> float | None:
        """The final value of a paused trial if it gains what others gained; None when it has reached no rung."""
        rung = self._highest.get(number)
        if rung is None:
            return None
        return self._paths[number][rung] - sum(self._gain(later) for later in range(rung, LEVELS))

    def _add(self, number: int, level: int, value: float) -> None:
        path = self._paths.setdefault(number, [math.nan] * (LEVELS + 1))
        path[level] = value
        before = [rung for rung in range(level) if not math.isnan(path[rung])]
        if before:
            self._promoted[before[-1]].setdefault(number, value)
            self._gains[before[-1]] = None
        for rung in before:
            self._shares[rung] = None

    def _place(self, number: int, rung: int) -> int:
        return bisect_left(self._ordered[rung], (self._paths[number][rung], number))

    def _merit(self, number: int) -> tuple[int, float, int]:
        rung = self._highest.get(number)
        return (0, 0.0, number) if rung is None else (-rung, self._paths[number][rung], number)

    def _is_exempt(self, number: int, rung: int) -> bool:
        if self._seed is None or rung >= LEVELS - 2:
            return False
        is_doubted = len(self._promoted[rung]) < DOUBT_UNTIL or self._share(rung) > DOUBT_ABOVE * self._least
        return is_doubted and random.Random(f"{self._seed}.{number}.{rung}").random() < EXEMPT

    def _latest(self, rung: int) -> list[int]:
        return list(islice(reversed(self._promoted[rung]), LATEST_SEEN))

    def _share(self, rung: int) -> float:
        """The promoted share, by Kendall's tau between the order at the rung and at the last place two share."""
        share = self._shares[rung]
        if share is None:
            import numpy as np  # whoever reads a study file does without it

            paths = np.array([self._paths[number] for number in self._latest(rung)]).reshape(-1, LEVELS + 1)
            agree = seen = float(PAIRS_BELIEVED)
            here = np.sign(paths[:, None, rung] - paths[None, :, rung])
            is_open = np.triu(np.ones_like(here, dtype=bool), 1)
            for level in range(LEVELS, rung, -1):
                with np.errstate(invalid="ignore"):
                    later = np.sign(paths[:, None, level] - paths[None, :, level])
                both = here * np.where(np.isnan(later), 0.0, later)
                agree += float(both[is_open].sum())
                seen += float(np.abs(both[is_open]).sum())
                there = ~np.isnan(paths[:, level])
                is_open &= ~(there[:, None] & there[None, :])
            tau = max(0.0, agree / seen)
            share = self._shares[rung] = self._least + (1 - self._least) * (1 - tau)
        return share

    def _gain(self, rung: int) -> float:
        gain = self._gains[rung]
        if gain is None:
            later = [(number, self._promoted[rung][number]) for number in self._latest(rung)]
            gains = [self._paths[number][rung] - value for number, value in later if math.isfinite(value)]
            gain = self._gains[rung] = statistics.median(gains) if gains else 0.0
        return gain
