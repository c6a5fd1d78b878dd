"""What the trainer asks of a task: examples, a summed loss and a test score. The trainer knows nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpsearch.trial import Score

Batch = tuple[Tensor, ...]


class Task(Protocol):
    model: nn.Module

    @property
    def num_examples(self) -> dict[str, int]:
        """Examples per split: `train`, `validation`, `test`."""

    def batch(self, split: str, indices: NDArray[np.int64]) -> Batch:
        """The examples of a split at these indices, on the CPU."""

    def losses(self, batch: Batch) -> tuple[Tensor, int]:
        """Unreduced losses of a batch in nats, with 0 where nothing is predicted, and how many are predicted."""

    def evaluation_batch_size(self) -> int:
        """Examples in one evaluation batch: fixed, so that a loss does not depend on the sampled batch size."""

    def score(self, losses: Sequence[Tensor]) -> tuple[Score, ...]:
        """Test metrics from the unreduced losses of all batches of the test split, in order."""

    def save(self, folder: str) -> None:
        """Write what is needed beside the weights to load the model again without hpsearch."""


def bootstrap_ratio(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(numerators) / sum(denominators), resampling the pairs.

    Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3. Both arrays have shape (examples,).
    """
    rng = np.random.default_rng(seed)
    count = len(numerators)
    ratios = np.empty(resamples)
    rows = max(1, 2_000_000 // count)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        chosen = rng.integers(0, count, size=(stop - start, count))
        ratios[start:stop] = numerators[chosen].sum(axis=1) / denominators[chosen].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def gather_losses(losses: Sequence[Tensor]) -> NDArray[np.float64]:
    """The batches' losses, flattened and joined in order, in double precision."""
    return torch.cat([batch.reshape(-1) for batch in losses]).double().cpu().numpy()
