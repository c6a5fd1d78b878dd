"""Task name to the module that knows its data, loss and scores; modules are imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpsearch.data.shards import DataCard
    from hpsearch.records import TrialConfig
    from hpsearch.spec.settings import ModelSettings
    from hpsearch.tasks.base import Task

TASKS = {
    "causal_lm": "hpsearch.tasks.causal_lm",
    "translation": "hpsearch.tasks.translation",
    "classification": "hpsearch.tasks.classification",
}

RANKING_METRIC = {"causal_lm": "perplexity", "translation": "bleu", "classification": "f1"}
"""The test metric that each task is ranked by."""


def build_task(config: TrialConfig) -> Task:
    """The task of a trial, with its data opened and its model built (weights drawn from torch's current seed)."""
    task: Task = import_module(TASKS[config.task]).build(config)
    return task


def check_model(task: str, settings: ModelSettings, card: DataCard) -> None:
    """Raise UsageError if the task cannot build such a model; allocates no memory for weights."""
    import_module(TASKS[task]).check_model(
        settings, vocab_size=card.vocab_size, target_vocab_size=card.target_vocab_size, labels=len(card.labels)
    )
