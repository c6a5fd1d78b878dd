"""Learning curves, as tables to search on: mostly published runs of others. None is part of this project.

A folder of tables holds, as far as someone has fetched them:

- taskset_NAME.json.gz: TaskSet (Metz et al., arXiv 2002.11887), text classification, 8 optimizer settings, training and
  validation loss at 50 evaluations. github.com/releaunifreiburg/DPL, data/taskset (Apache-2.0), each file gzipped.
- nmtlc_NAME.json.gz: NMTLC (Zhang & Duh, TACL 2020, AMTA 2024), translation from scratch and by LoRA, dev perplexity at
  each checkpoint. github.com/Este1le/hpo_nmt, lc_datasets/nmtlc.pkl (MIT), the runs of each `dataset_name` as JSON.
- lcbench/: surrogate of LCBench (YAHPO Gym, Pfisterer et al., arXiv 2109.03670), networks on tables of data, learning
  rate, batch size and layers, validation cross-entropy at 50 epochs. github.com/slds-lmu/yahpo_data, lcbench
  (Apache-2.0), as it is; needs onnxruntime. LCBench's learning rates decay by a cosine.
- algoperf/: logs of AlgoPerf (Dahl et al., arXiv 2306.07179), translation, molecules and speech, by algorithms of many
  kinds, most with learning rates that decay by a cosine. github.com/mlcommons/submissions_algorithms (Apache-2.0): its
  eval_measurements.csv files, in their folders. For stop rules only: their settings are not of one space.
- live_NAME.json.gz: runs of our own example studies, made on the spot by `benchmarks/live.py`.
- nasbench-nlp/logs.zip: NAS-Bench-NLP (Klyuchnikov et al., arXiv 2006.07116), recurrent language models on WikiText-2.
  github.com/fmsnew/nas-bench-nlp-release, train_logs_wikitext-2 (Apache-2.0). For stop rules only.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
ALGOPERF_TASKS = ("librispeech", "ogbg", "wmt")
ALGOPERF_COSINE = (
    "adamg", "baseline", "caspr", "generalized_adam", "lawa", "nadamp", "nadamw", "shampoo",
)  # fmt: skip
"""How the algorithms are called whose learning rates decay by a cosine, as their code has it."""
SHORTEST = 10
"""Runs of fewer evaluations are left out of tables that are for stop rules only."""


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
    is_cosine: tuple[bool, ...] | None = None
    """Of each run whether its learning rate decays by a cosine; None where none does."""

    @property
    def is_for_search(self) -> bool:
        return bool(self.settings)

    def decay_to_come(self, run: int, epoch: int) -> float:
        """Part of a run's decay that is left, as if it had run to its horizon; 0 where there is none."""
        if self.is_cosine is None or not self.is_cosine[run]:
            return 0.0
        return 0.5 + 0.5 * math.cos(math.pi * epoch / len(self.valid[run]))

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
    found = list(_files(folder))
    for name, read in (("lcbench", _lcbench), ("algoperf", _algoperf), ("nasbench-nlp", _nasbench)):
        if (folder / name).is_dir():
            found += read(folder / name)
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
            # benchmarks/live.py writes its own tables in the same way.
            family = "own runs" if name.startswith("live_") else "TaskSet"
            table = _table(name, family, [run["hp"] for run in runs], valid, train)
            yield replace(table, is_cosine=tuple(run.get("cosine", False) for run in runs))
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


def _losses(values: Sequence[float | None], worst: float = WORST) -> NDArray[np.float64]:
    losses = np.array([math.nan if value is None else value for value in values], dtype=float)
    return np.minimum(np.where(np.isfinite(losses), losses, worst), worst)


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
        yield replace(_table(f"lcbench_{task}", "LCBench", named, valid, None), is_cosine=(True,) * LCBENCH_RUNS)


def _algoperf(folder: Path) -> Iterator[Table]:
    """A table for each workload, whoever wrote the algorithm and in which framework."""
    found: dict[str, list[tuple[str, list[dict[str, str]]]]] = defaultdict(list)
    for file in sorted(folder.rglob("eval_measurements.csv")):
        *_, algorithm, _, workload, _, _ = file.parts
        if workload.startswith(ALGOPERF_TASKS):
            with file.open(newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if _number(row, "validation") is not None]
            found[re.sub("_(jax|pytorch)$", "", workload)].append((algorithm, rows))
    for workload, runs in found.items():
        worst = float(np.median([_number(rows[0], "validation") for _, rows in runs if rows]))
        # The first row is the untrained model.
        runs = [(algorithm, rows[1:]) for algorithm, rows in runs if len(rows) > SHORTEST]
        curves = {
            split: tuple(_losses([_number(row, split) for row in rows], worst) for _, rows in runs)
            for split in ("validation", "train")
        }
        is_cosine = tuple(algorithm.startswith(ALGOPERF_COSINE) for algorithm, _ in runs)
        no_settings = np.empty((len(runs), 0))
        name = f"algoperf_{workload}"
        yield Table(name, "AlgoPerf", (), no_settings, curves["validation"], curves["train"], is_cosine)


def _number(row: dict[str, str], split: str) -> float | None:
    text = row.get(f"{split}/loss") or row.get(f"{split}/ctc_loss")
    return float(text) if text else None


def _nasbench(folder: Path) -> Iterator[Table]:
    with zipfile.ZipFile(folder / "logs.zip") as archive:
        runs = [json.loads(archive.read(name)) for name in sorted(archive.namelist())]
    # Perplexity 20,000: an untrained model.
    both = [[_losses(run[split], math.log(20_000)) for split in ("val_losses", "train_losses")] for run in runs]
    both = [[curve[: min(map(len, pair))] for curve in pair] for pair in both]
    valid, train = zip(*[pair for pair in both if len(pair[0]) >= SHORTEST], strict=True)
    yield Table("nasbench-nlp_wikitext-2", "NAS-Bench-NLP", (), np.empty((len(valid), 0)), valid, train)
