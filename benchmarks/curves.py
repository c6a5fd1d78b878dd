"""Published learning curves, as tables to search on: runs of others, with their settings. None is part of this project.

A folder of tables holds, as far as someone has fetched them:

- taskset_NAME.json.gz: TaskSet (Metz et al., arXiv 2002.11887), text classification, 8 optimizer settings, training and
  validation loss at 50 evaluations. github.com/releaunifreiburg/DPL, data/taskset (Apache-2.0), each file gzipped.
- nmtlc_NAME.json.gz: NMTLC (Zhang & Duh, TACL 2020, AMTA 2024), translation from scratch and by LoRA, dev perplexity at
  each checkpoint. github.com/Este1le/hpo_nmt, lc_datasets/nmtlc.pkl (MIT), the runs of each `dataset_name` as JSON.
- lcbench/: surrogate of LCBench (YAHPO Gym, Pfisterer et al., arXiv 2109.03670), networks on tables of data, learning
  rate, batch size and layers, validation cross-entropy at 50 epochs. github.com/slds-lmu/yahpo_data, lcbench
  (Apache-2.0), as it is; needs onnxruntime.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORST = 5.0
"""Losses above this (in nats), or that are no numbers, count as this: a diverged run."""
LCBENCH_TASKS = ("167168", "189906", "126026", "167185", "168868", "189873", "167104", "34539")
LCBENCH_RUNS = 1000
LCBENCH_LOSS = 2
"""Column of the surrogate's answer: validation cross-entropy."""


@dataclass(frozen=True)
class Setting:
    """One searched setting of a table."""

    name: str
    values: tuple[float, ...]
    """The values that occur, sorted."""

    @property
    def is_choice(self) -> bool:
        return len(self.values) <= 8

    @property
    def is_log(self) -> bool:
        return self.values[0] > 0 and self.values[-1] >= 30 * self.values[0]

    def scaled(self, value: float) -> float:
        """Between 0 and 1."""
        if self.is_choice:
            return self.values.index(value) / max(1, len(self.values) - 1)
        forth = math.log if self.is_log else float
        low, high = forth(self.values[0]), forth(self.values[-1])
        return (forth(value) - low) / (high - low)


@dataclass(frozen=True)
class Table:
    """Runs of one task."""

    name: str
    family: str
    settings: tuple[Setting, ...]
    configs: NDArray[np.float64]
    """Of shape (runs, settings)."""
    valid: tuple[NDArray[np.float64], ...]
    """Of each run a validation loss (nats) per epoch, as many as it ran."""
    train: tuple[NDArray[np.float64], ...] | None

    @cached_property
    def epochs(self) -> int:
        """Of the longest runs."""
        return max(map(len, self.valid))

    @cached_property
    def full_run(self) -> float:
        """Epochs of a run on average."""
        return float(np.mean([len(curve) for curve in self.valid]))

    @cached_property
    def points(self) -> NDArray[np.float64]:
        """The settings between 0 and 1."""
        columns = [
            [setting.scaled(value) for value in self.configs[:, place].tolist()]
            for place, setting in enumerate(self.settings)
        ]
        return np.array(columns).T

    @cached_property
    def bests(self) -> NDArray[np.float64]:
        return np.array([curve.min() for curve in self.valid])

    def regret(self, value: float) -> float:
        """0 at the best run of the table, 1 at its median run."""
        low, median = float(self.bests.min()), float(np.median(self.bests))
        return min((value - low) / (median - low), 2.0)


def load(folder: Path, only: Sequence[str] = ()) -> list[Table]:
    """The tables in a folder, or those whose names contain one of these words."""
    found = [*_files(folder), *(_lcbench(folder / "lcbench") if (folder / "lcbench").is_dir() else ())]
    return [table for table in found if not only or any(word in table.name for word in only)]


def _files(folder: Path) -> Iterator[Table]:
    for file in sorted(folder.glob("*.json.gz")):
        with gzip.open(file, "rt") as stream:
            runs = json.load(stream)
        name = file.name.removesuffix(".json.gz")
        if "valid" in runs[0]:
            # Index 0 is the untrained model.
            valid = [_losses(run["valid"]["loss"][1:]) for run in runs]
            train = [_losses(run["train"]["loss"][1:]) for run in runs]
            yield _table(name, "TaskSet", [run["hp"] for run in runs], valid, train)
        elif "perplexity_curve" in runs[0]:
            valid = [_losses([_log(value) for value in run["perplexity_curve"]]) for run in runs]
            # Some runs went on for many times as long as nearly all others: none here does.
            longest = int(np.percentile([len(curve) for curve in valid], 90))
            yield _table(
                name, "NMTLC", [run["hyperparams"] for run in runs], [curve[:longest] for curve in valid], None
            )


def _table(
    name: str,
    family: str,
    configs: Sequence[dict[str, Any]],
    valid: Sequence[NDArray[np.float64]],
    train: Sequence[NDArray[np.float64]] | None,
) -> Table:
    settings = [Setting(key, tuple(sorted({float(config[key]) for config in configs}))) for key in configs[0]]
    settings = [setting for setting in settings if len(setting.values) > 1]
    matrix = np.array([[float(config[setting.name]) for setting in settings] for config in configs])
    return Table(name, family, tuple(settings), matrix, tuple(valid), None if train is None else tuple(train))


def _log(value: float | None) -> float:
    return math.log(value) if value and value > 0 else math.nan


def _losses(values: Sequence[float | None]) -> NDArray[np.float64]:
    losses = np.array([math.nan if value is None else value for value in values], dtype=float)
    return np.minimum(np.where(np.isfinite(losses), losses, WORST), WORST)


def _lcbench(folder: Path) -> Iterator[Table]:
    """Curves of random settings by the surrogate; its first epoch is the untrained network."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    tasks = json.loads((folder / "encoding.json").read_text())["OpenML_task_id"]
    draw = np.random.default_rng(0)
    epochs = np.arange(2, 52)
    rates = np.exp(draw.uniform(math.log(1e-4), math.log(1e-1), LCBENCH_RUNS))
    batches = np.round(np.exp(draw.uniform(math.log(16), math.log(512), LCBENCH_RUNS)))
    layers = draw.integers(1, 6, LCBENCH_RUNS).astype(float)
    for task in LCBENCH_TASKS:
        valid = []
        for rate, batch, layer in zip(rates, batches, layers, strict=True):
            # epoch, batch size, learning rate, momentum, weight decay, layers, units, dropout
            rows = np.tile([0, batch, rate, 0.9, 1e-3, layer, 256, 0.2], (len(epochs), 1))
            rows[:, 0] = epochs
            codes = np.full((len(epochs), 1), tasks[task], dtype=np.int32)
            answer = session.run(None, {"x_cat": codes, "x_cont": rows.astype(np.float32)})[0]
            valid.append(_losses(answer[:, LCBENCH_LOSS].tolist()))
        named = [
            {"learning_rate": rate, "batch_size": batch, "num_layers": layer}
            for rate, batch, layer in zip(rates.tolist(), batches.tolist(), layers.tolist(), strict=True)
        ]
        yield _table(f"lcbench_{task}", "LCBench", named, valid, None)
