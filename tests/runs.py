"""Runs of a task, stopped and resumed, as curves that can be compared to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from hpsearch.records import Point
from hpsearch.spec.settings import RunSettings
from hpsearch.tasks.base import Task
from hpsearch.training.trainer import Order, Trainer


def curve_of(
    task: Task, settings: RunSettings, folder: Path, *, earlier: tuple[Path, ...] = (), stop_at: int | None = None
) -> list[Point]:
    """The points of a run but for their times; it is asked to leave at a step, and then raises PreemptedError."""
    steps = 0

    def pulse() -> Order:
        nonlocal steps
        steps += 1
        return Order.PREEMPT if steps == stop_at else Order.CONTINUE

    device = torch.device("cpu")
    trainer = Trainer(task, settings, seed=0, device=device, folder=folder, earlier=earlier, pulse=pulse)
    return [dataclasses.replace(point, seconds=0.0) for point in trainer.points()]
