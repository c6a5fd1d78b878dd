"""An average of a run's weights whose width grows with the run: what is evaluated and kept in place of the last step's.

The power function of Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models
(arXiv 2312.02696).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from hpsearch.training import torch_internals


class WeightAverage:
    """The average of the trained parameters; of width 0, none."""

    def __init__(self, trained: Mapping[str, nn.Parameter], width: float) -> None:
        """`width` is the standard deviation of the average's weights, as a part of the steps so far."""
        self._trained = trained
        self._width = width
        self.tensors = {name: value.detach().clone() for name, value in trained.items() if width}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after this step, counted from 1."""
        if self.tensors:
            share = 1.0 - (1.0 - 1.0 / step) ** (_power(self._width) + 1.0)
            torch_internals.lerp_(list(self.tensors.values()), list(self._trained.values()), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with averaged weights, if there are any."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            self.tensors[name].copy_(value)

    def _swap(self) -> None:
        for name, average in self.tensors.items():
            self.tensors[name], self._trained[name].data = self._trained[name].data, average


@cache
def _power(width: float) -> float:
    """The exponent of an average of this width: the positive root of a cubic, algorithm 2 of the paper."""
    return float(np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2]).real.max())
