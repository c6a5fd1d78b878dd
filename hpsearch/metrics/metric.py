"""What a test metric is: its direction, and how it follows from sums over test examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Examples = Mapping[str, NDArray[Any]]
"""Arrays whose first axis is test examples: what a task keeps of them, by name."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score that is a function of sums over test examples. Rank, objective, interval and ties follow from it."""

    name: str
    higher_is_better: bool
    digits: int = 2
    """Behind the point, where a person compares scores."""
    needs: tuple[str, ...]
    """Names of the arrays that it is computed from."""
    sums: Callable[[Examples], Floats]
    """What each example adds, of shape (examples, columns)."""
    score_from_sums: Callable[[Floats, Mapping[str, Any]], Floats]
    """Scores of sums of shape (..., columns), given the score's contract."""
    top: float = math.inf
    """The largest score; the smallest is 0."""
    unit: float = 1.0
    """What counts as a whole: 100 for percentages."""
    estimate: Literal["jackknife", "log", "labels"] = "jackknife"
    """How its interval is made: from the score without each example; likewise, of the score's logarithm; or class by
    class, from arrays `truth` and `predicted` (see `intervals`)."""

    @property
    def is_relative(self) -> bool:
        """Whether differences count relative to the score: it has no scale of its own."""
        return math.isinf(self.top) and self.unit == 1.0
