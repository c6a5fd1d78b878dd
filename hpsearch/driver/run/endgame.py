"""What a study does as its time runs out: when new trials cease to pay, and how long a trial would still take.

Pure; knows nothing of stores or backends. A trial takes as long as the other trials of its study took for an epoch of
a model of its size. When what is left is needed to bring the leading trial to its end, nothing else begins: the best of
the unfinished trials run on, and those that would not come to their end have their schedule shortened so that they do.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

RESERVED = 0.35
"""Part of the whole time that the end of the leading trial may take at most."""
MOST_RESERVED = 0.6
"""The same part of a budget of seconds."""
SCORING = 0.1
"""Part of the time of a shortened run, or SCORING_S if that is less, that is kept for scoring it."""
SCORING_S = 30.0
LEAST_S = 5.0
"""Less time than this is not worth the start of a trial."""
_VOCABULARY = 1000
"""Tokens whose embedding and head a model computes with, beside its layers: what a small model spends on them."""


class Clock:
    """The time budget of one launch. Times are seconds of one monotonic clock."""

    def __init__(self, budget_s: float, now: float) -> None:
        self._budget_s = budget_s
        self.deadline = now + budget_s
        self._paces: dict[int, float] = {}
        """By trial: seconds of an epoch, for each unit of size."""

    def learn(self, trial: int, settings: Mapping[str, Any], *, epochs: float, seconds: float) -> None:
        """Note that a trial with these settings took `seconds` for its `epochs` so far."""
        if epochs > 0:
            self._paces[trial] = seconds / epochs / _size(settings)

    def needed(self, settings: Mapping[str, Any], epoch: float) -> float | None:
        """Seconds from this epoch to the end of a trial with these settings; None while no trial has shown any."""
        if not self._paces:
            return None
        epochs = settings["training"]["num_epochs"] - epoch
        return float(statistics.median(self._paces.values()) * _size(settings) * epochs)

    def is_short(self, now: float, leader: Mapping[str, Any] | None, epoch: float) -> bool:
        """Whether the leading trial, which is at this epoch, needs all the time that is left."""
        needed = None if leader is None else self.needed(leader, epoch)
        # Of a budget of seconds the usual part is less than what a trial is worth starting for.
        reserved = max(RESERVED * self._budget_s, min(2 * LEAST_S, MOST_RESERVED * self._budget_s))
        return needed is not None and self.is_worth_a_start(now) and self.deadline - now <= min(needed, reserved)

    def is_worth_a_start(self, now: float) -> bool:
        """Whether enough time is left for a run that begins now."""
        return self.left(now) >= LEAST_S

    def left(self, now: float) -> float:
        """Seconds that a run that begins now may train."""
        left = self.deadline - now
        return left - min(SCORING * left, SCORING_S)


def _size(settings: Mapping[str, Any]) -> float:
    """What an epoch costs, up to a factor that the trials of a study share."""
    model = settings["model"]
    layers = [model.get(name) for name in ("num_layers", "num_encoder_layers", "num_decoder_layers")]
    depth = sum(layer for layer in layers if layer) or 2
    width = model["hidden_size"]
    return float(12 * depth * width**2 + _VOCABULARY * width)
