"""What a trial will take of a GPU: learned from trials, never less than it turns out to be, nor much more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpsearch.training.memory import CONTEXT_BYTES, LEARN_FROM, SMALLEST_SHARE, PeakMemory

DEVICE = 80e9


def settings(layers: int, batch: int, width: int = 512, micro: int | None = None) -> dict[str, Any]:
    return {
        "model": {"num_layers": layers, "hidden_size": width, "context_length": 512},
        "training": {"batch_size": batch, "micro_batch_size": micro},
    }


def peak(layers: int, batch: int, width: int = 512) -> float:
    """What GPT-2 of such a size takes by hand: weights and their kin, activations in bfloat16, logits in float32."""
    parameters = 12 * layers * width**2 + 32_000 * width
    tokens = batch * 512
    return 16 * parameters + tokens * layers * width * 34 + tokens * 32_000 * 6 + 3e7


def provenance(peak_bytes: float) -> dict[str, Any]:
    return {"peak_memory_bytes": int(peak_bytes), "device_memory_bytes": int(DEVICE)}


def test_a_trial_has_a_gpu_for_itself_until_enough_is_known() -> None:
    memory = PeakMemory()
    for number in range(LEARN_FROM):
        assert memory.share(settings(2, 8)) == 1.0
        memory.learn(settings(2, 8 + number), None, provenance(peak(2, 8 + number)))
    assert memory.share(settings(2, 8)) < 0.2
    memory = PeakMemory()
    for _ in range(LEARN_FROM):
        memory.learn(settings(2, 8), None, {})
    assert memory.share(settings(2, 8)) == 1.0, "trials on CPUs teach nothing"


def test_shares_are_no_less_than_what_a_trial_takes() -> None:
    """Of 100 studies that search layers, batch size and width, trials that were never seen included."""
    short, wasted, count = 0, 0.0, 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        memory = PeakMemory()
        for number in range(25):
            layers, batch = int(random.integers(1, 13)), int(2 ** random.integers(2, 7))
            width = int(random.choice([256, 512, 768]))
            truth = peak(layers, batch, width) * random.uniform(0.95, 1.05)
            if number >= LEARN_FROM:
                share = memory.share(settings(layers, batch, width))
                needed = (truth + CONTEXT_BYTES / 2) / DEVICE
                count += 1
                short += share < needed
                wasted += share - needed
            memory.learn(settings(layers, batch, width), None, provenance(truth))
    assert short <= 0.005 * count, "and these make do with smaller micro-batches"
    assert wasted / count < 0.12


def test_a_larger_trial_never_seems_to_take_less() -> None:
    memory = PeakMemory()
    random = np.random.default_rng(0)
    for _ in range(12):
        layers, batch = int(random.integers(1, 13)), int(2 ** random.integers(2, 7))
        memory.learn(settings(layers, batch), None, provenance(peak(layers, batch) * random.uniform(0.7, 1.4)))
    for bigger in ((8, 64), (12, 32), (12, 128)):
        assert memory.share(settings(*bigger)) >= memory.share(settings(8, 32))


@pytest.mark.parametrize(("layers", "batch"), [(200, 64), (1, 1)])
def test_shares_are_between_the_smallest_and_the_whole(layers: int, batch: int) -> None:
    memory = PeakMemory()
    for number in range(1, 8):
        memory.learn(settings(number, 8 * number), None, provenance(peak(number, 8 * number)))
    assert SMALLEST_SHARE <= memory.share(settings(layers, batch)) <= 1.0
    assert memory.share(settings(2, 64, micro=4)) < memory.share(settings(2, 64)), "the micro-batch counts"
