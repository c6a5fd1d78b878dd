"""How much of the validation split is looked at during training, so that it takes a bounded share of a run's time.

A run is judged by how its validation loss changes from one evaluation to the next, on the same examples each time: what
the examples have in common cancels, and fewer are enough than a loss itself would need. All trials of a study see the
same ones, whatever their settings, and the checkpoint that a trial ends with is confirmed on all of the split.
"""

from __future__ import annotations

import math

from hpsearch.data.shards import DataCard

COST = 0.38
"""A token in evaluation, in tokens of training: it has no backward pass and no optimizer (`make bench-evaluation`)."""
LEAST_TOKENS = 4096
LEAST_TEXTS = 400
"""Of a task whose loss is taken for each text: below these, noise hides what the verdict is about."""


def part_of_validation(card: DataCard, *, share: float, evaluations_per_epoch: int) -> float:
    """The part of the validation split that fits into a share of a run's time; not less than the verdict needs."""
    room = _room(card, share) / evaluations_per_epoch
    return min(1.0, max(room, _least(card)) / card.tokens["validation"])


def fitting_evaluations(card: DataCard, *, share: float, wanted: int) -> int:
    """Evaluations of an epoch that fit into a share of a run's time, at most as many as are wanted, at least one."""
    least = min(_least(card), card.tokens["validation"])
    return max(1, int(min(wanted, _room(card, share) / least)))


def _room(card: DataCard, share: float) -> float:
    """Tokens that can be evaluated in an epoch."""
    return math.inf if share == 1 else card.tokens["train"] * share / (1 - share) / COST


def _least(card: DataCard) -> float:
    if not card.labels:
        return LEAST_TOKENS
    return LEAST_TEXTS * card.tokens["validation"] / card.documents["validation"]
