"""Task name to the module that knows its data, loss and scores; modules are imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpsearch.tasks.base import Task
    from hpsearch.trial import TrialConfig

TASKS = {"causal_lm": "hpsearch.tasks.causal_lm"}

RANKING_METRIC = {"causal_lm": "perplexity"}
"""The test metric that each task is ranked by."""

HIGHER_IS_BETTER = {"perplexity": False, "bits_per_byte": False}


def build_task(config: TrialConfig) -> Task:
    """The task of a trial, with its data opened and its model built (weights drawn from torch's current seed)."""
    task: Task = import_module(TASKS[config.task]).build(config)
    return task


def sort_key(metric: str, value: float) -> float:
    """Smaller is better, whatever the metric; a NaN sorts last."""
    if value != value:
        return float("inf")
    return -value if HIGHER_IS_BETTER[metric] else value
