"""What the trainer asks of a task: batches, a summed loss and a test score. The trainer knows nothing else of it.

Here, too, is what the tasks share: padding and bucketing by length, scores with intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hpsearch.data.shards import TokenSplit
from hpsearch.metrics.intervals import interval
from hpsearch.metrics.metric import Examples
from hpsearch.records import Score

Indices = NDArray[np.int64]
Evaluate = Callable[[str, "Callable[[Batch], Tensor]"], Iterator[tuple[Indices, Tensor]]]
"""Run a function over all evaluation batches of a split; yields the examples' indices and the function's answer."""

EVALUATION_TOKENS = 4096
"""Padded tokens in an evaluation batch: fixed, so that a loss does not depend on the sampled batch size."""
_POOL = 50
"""Batches whose examples are sorted by length together: enough to pad little, few enough to stay random."""


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, labels last."""

    tensors: tuple[Tensor, ...]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return Batch(tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in self.tensors))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Test metrics, and what a person may want to look at beside them."""

    scores: tuple[Score, ...]
    details: dict[str, Any] = field(default_factory=dict)
    """JSON by kind: `samples`, `outputs`, `confusion`, ..."""
    examples: Examples = field(default_factory=dict)
    """What each test example adds to the scores; see `statistics`."""


class Task(Protocol):
    model: PreTrainedModel

    @property
    def num_examples(self) -> dict[str, int]:
        """Examples per split: `train`, `validation`, `test`."""

    def epoch_batches(self, order: np.random.Generator, batch_size: int) -> list[Indices]:
        """The training examples of one epoch, each once, in batches of this size (the last may be smaller)."""

    def evaluation_batches(self, split: str) -> list[Indices]:
        """The examples of a split, each once, in batches that do not depend on the trial."""

    def batch(self, split: str, indices: Indices) -> Batch:
        """The examples of a split at these indices, on the CPU."""

    def predicted(self, split: str, indices: Indices) -> int:
        """How many tokens (or examples) of these examples are predicted: what their summed loss is divided by."""

    def losses(self, batch: Batch) -> Tensor:
        """Unreduced losses of a batch in nats, with 0 where nothing is predicted."""

    def score(self, evaluate: Evaluate) -> Scored:
        """Test metrics of the model as it stands."""

    def save(self, folder: str) -> None:
        """Write what is needed beside the weights to load the model again without hpsearch."""


@runtime_checkable
class ScoredTask(Task, Protocol):
    """A task whose validation score a study may search for in place of the loss (see `TaskDefinition.objectives`)."""

    def validation_score(self, evaluate: Evaluate) -> float:
        """The score of the model as it stands."""


def cut(indices: Indices, size: int) -> list[Indices]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def bucketed(lengths: NDArray[np.int64], order: np.random.Generator, batch_size: int) -> list[Indices]:
    """All examples once, at random, in batches of examples of similar length, the batches at random, too.

    Every batch but one has `batch_size` examples.
    """
    shuffled = order.permutation(len(lengths))
    pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in cut(shuffled, _POOL * batch_size)]
    batches = [batch for pool in pools for batch in cut(pool, batch_size)]
    return [batches[index] for index in order.permutation(len(batches))]


def within_budget(lengths: NDArray[np.int64], tokens: int = EVALUATION_TOKENS) -> list[Indices]:
    """All examples once, sorted by length, in batches of at most `tokens` padded tokens."""
    batches: list[Indices] = []
    start = 0
    order = np.argsort(lengths, kind="stable")
    for position in range(1, len(order) + 1):
        # The last of a sorted run is its longest, so it decides what the run is padded to.
        if position == len(order) or (position + 1 - start) * lengths[order[position]] > tokens:
            batches.append(order[start:position])
            start = position
    return batches


def padded(split: TokenSplit, indices: Indices, *, longest: int, padding: int, end: int) -> Tensor:
    """Token ids of shape (examples, longest of them), cut to `longest` tokens and padded at the end.

    A document that is cut keeps the mark that ends it, if there is one: as its tokenizer cuts it elsewhere.
    """
    documents = []
    for index in indices:
        ids = split.document(int(index))
        if len(ids) > longest:
            ids = np.append(ids[: longest - 1], ids[-1] if ids[-1] == end else ids[longest - 1]).astype(ids.dtype)
        documents.append(ids)
    ids = np.full((len(documents), max(map(len, documents))), padding, dtype=np.int64)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = document
    return torch.from_numpy(ids)


def make_score(metric: str, value: float, examples: Examples, contract: dict[str, Any]) -> Score:
    """A test score with its 95 % interval."""
    low, high = interval(metric, examples, contract)
    count = len(next(iter(examples.values())))
    return Score(metric=metric, value=value, low=low, high=high, n=count, contract=contract)
