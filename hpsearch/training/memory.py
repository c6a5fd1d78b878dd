"""How much device memory a trial will take, learned from the trials of its study that have run. Pure functions.

The peak of a transformer in training is, to first order, a sum of parts with known shapes: what is always there,
weights with gradients and optimizer state (layers x width^2, and vocabulary x width), activations (tokens x layers x
width) and logits (tokens, over a vocabulary that the study fixes). Their coefficients are fitted without negative ones
(Lawson & Hanson, Solving Least Squares Problems, 1974), so that a larger trial never seems to take less than a smaller
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LEARN_FROM = 5
"""Trials that have a device for themselves before others are packed together."""
MARGIN = 0.25
"""Above the estimate, for what an allocator wastes; more where the estimates of the trials so far were worse."""
CONTEXT_BYTES = 1_000_000_000
"""An allowance for what a process takes of a GPU before its first tensor."""
SMALLEST_SHARE = 0.05
"""Shares are multiples of this, so that workers of one size are used again."""


@dataclass
class PeakMemory:
    """What the trials of one study took."""

    _sizes: list[tuple[float, ...]] = field(default_factory=list)
    _peaks: list[float] = field(default_factory=list)
    device_bytes: float | None = None
    """Of the smallest device that a trial ran on."""

    def learn(self, settings: Mapping[str, Any], micro_batch_size: int | None, provenance: Mapping[str, Any]) -> None:
        """Take in a trial that ended: its `model` and `training` settings, and what its worker measured."""
        peak, device = provenance.get("peak_memory_bytes"), provenance.get("device_memory_bytes")
        if not peak or not device:
            return
        self._sizes.append(_size(settings, micro_batch_size))
        self._peaks.append(float(peak))
        self.device_bytes = min(self.device_bytes or device, device)

    def share(self, settings: Mapping[str, Any]) -> float:
        """The part of a device that a trial with these settings should have; 1 while too little is known."""
        if self.device_bytes is None or len(self._peaks) < LEARN_FROM:
            return 1.0
        needed = self._estimate(_size(settings, settings["training"]["micro_batch_size"])) + CONTEXT_BYTES
        steps = np.ceil(needed / self.device_bytes / SMALLEST_SHARE)
        return float(min(1.0, round(steps * SMALLEST_SHARE, 10)))

    def _estimate(self, size: tuple[float, ...]) -> float:
        """Bytes, margin included."""
        from scipy.optimize import nnls  # workers import this module for its constants

        seen, peaks = np.array(self._sizes), np.array(self._peaks)
        scale = seen.max(axis=0)
        # Relative errors count: a small trial that is misjudged by half is as bad as a large one.
        weights, _ = nnls(seen / scale / peaks[:, None], np.ones(len(peaks)))
        fitted = seen / scale @ weights
        worst = float((peaks / fitted).max())
        return float(np.array(size) / scale @ weights) * max(1.0 + MARGIN, worst + MARGIN)


def _size(settings: Mapping[str, Any], micro_batch_size: int | None) -> tuple[float, ...]:
    model, training = settings["model"], settings["training"]
    layers = [model.get(name) for name in ("num_layers", "num_encoder_layers", "num_decoder_layers")]
    depth = sum(layer for layer in layers if layer) or 2
    width = model["hidden_size"]
    tokens = (micro_batch_size or training["batch_size"]) * model["context_length"]
    return 1.0, depth * width**2, width, tokens * depth * width, tokens
