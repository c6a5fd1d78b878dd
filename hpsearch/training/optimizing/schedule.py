"""The learning rate of a run, step by step: warm-up, schedule, and a cool-down when the run's time is short."""

from __future__ import annotations

import math
from collections.abc import Callable

from hpsearch.spec.settings import RunSettings

COOL_DOWN = 0.5
"""Part of the time that a shortened run has left in which its learning rate falls; the rest it keeps its schedule."""


class Schedule:
    """Steps are counted from 0 to `total_steps` - 1."""

    def __init__(
        self,
        settings: RunSettings,
        total_steps: int,
        *,
        time_left: Callable[[], float] | None = None,
        agree: Callable[[int], int] = lambda value: value,
    ) -> None:
        """`time_left` gives the seconds that the run has; the processes of a run `agree` on the largest of a number."""
        self.is_shortened = False
        """Whether the learning rate has left its schedule for the time that the run has left."""
        self._settings = settings
        self._total_steps = total_steps
        self._time_left = time_left
        self._time_given = time_left() if time_left else math.inf
        self._agree = agree
        self._first_step = 0
        self._shortening = 1.0
        """What the learning rate is multiplied by."""

    def begin_at(self, step: int) -> None:
        """The run starts here, or is resumed here."""
        self._first_step = step

    def advance(self, step: int) -> float:
        """The learning rate of the step that comes now, by the time that is left for the run.

        It falls in a straight line when that time is short. A run that is cut short by such a cool-down ends near where
        one ends that was planned so (Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training
        Durations, NeurIPS 2024).
        """
        self._shortening = self._shorten(step)
        return self.learning_rate(step)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then the schedule down to `final_lr_fraction` of it at the last step."""
        settings = self._settings
        if step < self._warmup_steps:
            return self._shortening * settings.learning_rate * (step + 1) / self._warmup_steps
        floor = settings.final_lr_fraction if settings.schedule != "constant" else 1.0
        scheduled = settings.learning_rate * (floor + (1.0 - floor) * self._decay(step))
        return min(scheduled, max(self._shortening * scheduled, settings.learning_rate * settings.final_lr_fraction))

    def decay_to_come(self, step: int) -> float:
        """Part of the learning rate's decay that is left at a step: 1 before it begins, 0 where there is none."""
        if self._settings.schedule == "constant" or self._settings.final_lr_fraction == 1.0:
            return 0.0
        return 1.0 if step < self._warmup_steps else self._decay(step)

    def _shorten(self, step: int) -> float:
        if self._time_left is None:
            return 1.0
        left = self._time_left()
        spent, steps = self._time_given - left, step - self._first_step
        fits = steps and spent / steps * (self._total_steps - step) < left
        share = 1.0 if fits and not self.is_shortened else left / (COOL_DOWN * self._time_given)
        share = self._agree(round(1e6 * min(1.0, max(0.0, share)))) / 1e6
        self.is_shortened = self.is_shortened or share < 1.0
        return share

    @property
    def _warmup_steps(self) -> int:
        return round(self._settings.warmup_fraction * self._total_steps)

    def _decay(self, step: int) -> float:
        """From 1 at the end of the warm-up to 0 at the last step, or always 1."""
        progress = min(1.0, (step - self._warmup_steps) / max(1, self._total_steps - 1 - self._warmup_steps))
        return {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self._settings.schedule]
