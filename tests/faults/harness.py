"""A study that is about to suffer: launches in child processes, a log of every epoch, and the seven invariants.

What is waited for is something in a log, never a time; what is ended is ended by its process id.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy as sa

import hpsearch
from tests.commands import HPSEARCH
from tests.conftest import command_of, kill_all

INJECT = Path(__file__).parent / "inject"
PATIENCE_S = 240.0
STUDY = """
name: suffering
task: causal_lm
data: {corpus: python_docs, fraction: 0.05}
tokenizer: {vocab_size: 260}
model: {architecture: gpt2, hidden_size: 16, num_heads: 2, context_length: 32, init_std: 0.08}
training: {evaluations_per_epoch: 1, schedule: constant}
search:
  learning_rate: {min: 1e-3, max: 1e-2, scale: log}
  batch_size: 64
  num_layers: 1
  num_epochs: 4
prune: {overfit: false, unpromising: none}
resources: {gpus_per_trial: 0, parallel: 2}
"""
EPOCHS = 4
STEPS = 10
"""Fewer than the optimizer steps of a trial."""


@dataclass
class Row:
    """A line of the table."""

    fault: str
    system: str = "hpsearch"
    asked: int = 0
    lost: int = 0
    """Trials without a result in the end."""
    repeated: int = 0
    """Epochs that were trained more than once."""
    wrong: list[str] = field(default_factory=list)
    """States, rows and exit codes that are not true."""
    recovered_by: str = "itself"
    seconds: float = math.nan
    """From the fault to the first epoch after it."""


@dataclass
class Study:
    """One study in a folder of its own."""

    folder: Path
    backend: str = "ray"
    trials: int = 4
    store: str = ""
    faults: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    pace: float = 0.4
    clock: dict[str, str] = field(default_factory=dict)
    """Environment of `wrong_clock`."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "study.yaml"
        self.file.write_text(STUDY)
        self.log = self.folder / "epochs.jsonl"
        self.store = self.store or f"sqlite:///{self.folder}/studies.db"
        self.launches: list[subprocess.Popen[str]] = []

    def launch(self, *more: str, wait: bool = False) -> subprocess.Popen[str]:
        """Start `hpsearch launch`; its events are in `events-N.jsonl`, its errors in `errors-N.txt`."""
        number = len(self.launches)
        faults = {"log": str(self.log), "pace": self.pace, **self.faults}
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(INJECT), os.environ.get("PYTHONPATH", "")]),
            "HPSEARCH_TEST_FAULTS": json.dumps(faults),
            "HPSEARCH_STORE": self.store,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **self.clock,
        }
        command = [*HPSEARCH, "launch", str(self.file), "--json", "--backend", self.backend]
        command += ["--trials", str(self.trials), *(f"--set={override}" for override in self.overrides), *more]
        with (self.folder / f"events-{number}.jsonl").open("w") as out, self.errors(number).open("w") as errors:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=out, stderr=errors, text=True, start_new_session=True
            )
        self.launches.append(process)
        if wait:
            process.wait(PATIENCE_S)
        return process

    def finish(self, *more: str) -> int:
        """Launch to the end; returns the exit code."""
        return self.launch(*more, wait=True).wait()

    def errors(self, number: int = -1) -> Path:
        return self.folder / f"errors-{number % max(1, len(self.launches)) if number < 0 else number}.txt"

    def events(self, launch: int | None = None) -> list[dict[str, Any]]:
        """What one launch (or all) told, in order."""
        files = sorted(self.folder.glob("events-*.jsonl"), key=lambda file: int(file.stem.split("-")[1]))
        chosen = files if launch is None else [files[launch]]
        return [json.loads(line) for file in chosen for line in file.read_text().splitlines() if line.endswith("}")]

    def epochs(self) -> list[dict[str, Any]]:
        """Every epoch that was trained, also those that were lost."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def wait_for(self, what: Callable[[], Any], alive: subprocess.Popen[str] | None = None) -> Any:
        """Wait until something is true, as long as a launch lives."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            found = what()
            if found:
                return found
            if alive is not None and alive.poll() is not None:
                raise AssertionError(f"the launch ended in {alive.returncode}: {self.errors().read_text()[-2000:]}")
            time.sleep(0.05)
        raise AssertionError(f"waited in vain: {self.errors().read_text()[-2000:]}")

    def wait_for_epochs(self, count: int, alive: subprocess.Popen[str]) -> dict[str, Any]:
        """Wait until so many epochs have been trained; returns the last."""
        return self.wait_for(lambda: len(self.epochs()) >= count and self.epochs()[-1], alive)

    def wait_for_victim(self, alive: subprocess.Popen[str]) -> dict[str, Any]:
        """Wait until a trial has trained its second epoch, with more before it; returns that epoch."""
        return self.wait_for(
            lambda: next((epoch for epoch in reversed(self.epochs()) if epoch["evaluation"] == 2), None), alive
        )

    def children(self, name: str) -> list[psutil.Process]:
        """Processes below the last launch that have a name."""
        below = psutil.Process(self.launches[-1].pid).children(recursive=True)
        return [child for child in below if name in command_of(child)]

    def end(self) -> None:
        for process in self.launches:
            if process.poll() is None:
                kill_all(psutil.Process(process.pid).children(recursive=True))
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()

    # What is true in the end

    def judge(self, row: Row, code: int, *, expected_code: int = 0) -> Row:
        """The seven invariants, after the last launch has ended with this code; and once more after another one."""
        row.asked = self.trials
        trained = Counter((epoch["trial"], epoch["evaluation"]) for epoch in self.epochs())
        row.repeated = sum(count - 1 for count in trained.values())
        if code != expected_code:
            row.wrong.append(f"exit code {code} instead of {expected_code}: {self.errors().read_text()[-600:]}")
        self._judge_rows(row, {epoch["trial"] for epoch in self.epochs()})
        before = self._rows("SELECT * FROM hpsearch_trials ORDER BY number")
        if expected_code in (0, 3):
            again = self.finish("--backend", "inline")
            if again != code or self._rows("SELECT * FROM hpsearch_trials ORDER BY number") != before:
                row.wrong.append(f"a second launch did something (exit code {again})")
            if len(self.epochs()) != sum(trained.values()):
                row.wrong.append("a second launch trained")
        return row

    def _judge_rows(self, row: Row, seen: set[int]) -> None:
        opened = hpsearch.open_study("suffering", store=self.store)
        trials = opened.trials()
        ended = [trial for trial in trials if trial.state not in ("running", "paused", "interrupted")]
        row.lost = self.trials - len(ended)
        if [trial.number for trial in trials] != list(range(self.trials)):
            row.wrong.append(f"trials {[trial.number for trial in trials]} of {self.trials}")
        loaded = optuna.load_study(study_name="suffering", storage=self.store)
        if [trial.number for trial in loaded.trials] != list(range(self.trials)):
            row.wrong.append(f"Optuna has {len(loaded.trials)} rows of {self.trials}")
        row.wrong += [
            f"Optuna's trial {trial.number} is {trial.state.name}"
            for trial in loaded.trials
            if not trial.state.is_finished()
        ]
        row.wrong += [f"trial {number} trained and has no row" for number in seen - {t.number for t in trials}]
        told = {(event["trial"], event["point"]["evaluation"]) for event in self.events() if event["event"] == "point"}
        kept = Counter(
            (trial.number, point.evaluation) for trial in trials for point in opened.trial(trial.number).points
        )
        if lost := told - set(kept):
            row.wrong.append(f"points that were acknowledged are gone: {sorted(lost)}")
        if any(count > 1 for count in kept.values()):
            row.wrong.append("points are doubled")
        ranked = [trial for trial in trials if trial.state in ("completed", "overfit", "plateau")]
        if ranked and not math.isclose(loaded.best_value, min(trial.best_valid_loss for trial in ranked)):
            row.wrong.append("Optuna's best is not ours")
        for trial in ranked:
            whole = [epoch for number, epoch in kept if number == trial.number]
            if trial.last_epoch == EPOCHS and sorted(whole) != list(range(1, EPOCHS + 1)):
                row.wrong.append(f"the curve of trial {trial.number} has gaps: {sorted(whole)}")
        row.wrong += [f"doctor: {finding.trial}: {finding.problem}" for finding in hpsearch.doctor(store=self.store)]
        for command in (["rank", "suffering"], ["show", "suffering", "0"]):
            done = subprocess.run(
                [*HPSEARCH, *command], env={**os.environ, "HPSEARCH_STORE": self.store},
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                row.wrong.append(f"`hpsearch {command[0]}` ends in {done.returncode}: {done.stderr[-300:]}")

    def _rows(self, query: str) -> list[Any]:
        engine = sa.create_engine(self.store)
        with engine.connect() as connection:
            rows = [tuple(str(value) for value in row) for row in connection.execute(sa.text(query))]
        engine.dispose()
        return rows


@dataclass
class Stopwatch:
    """From a fault to the first epoch after it. Make one just before the fault."""

    study: Study
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._count = len(self.study.epochs())
        self._workers = {epoch["pid"] for epoch in self.study.epochs()}
        self._worker_of = {epoch["trial"]: epoch["pid"] for epoch in self.study.epochs()}

    def next_epoch(self, launch: subprocess.Popen[str]) -> float:
        """Seconds until another epoch has been trained."""
        self.study.wait_for_epochs(self._count + 1, launch)
        return time.monotonic() - self.began

    def next_worker(self, launch: subprocess.Popen[str], trial: int | None = None) -> float:
        """Seconds until a new process has trained an epoch; of a certain trial, until another than the one it had."""

        def is_it(epoch: dict[str, Any]) -> bool:
            if trial is None:
                return epoch["pid"] not in self._workers
            return epoch["trial"] == trial and epoch["pid"] != self._worker_of[trial]

        self.study.wait_for(lambda: any(map(is_it, self.study.epochs()[self._count :])), launch)
        return time.monotonic() - self.began


def wrong_clock(file: Path) -> dict[str, str]:
    """Environment of processes whose wall clock is off by what the file says, from the moment at which it says so.

    Wolfgang Hommel's libfaketime stands between them and the system's clock; the monotonic one stays true, as it does
    when a clock is set.
    """
    # Its Python wrapper is not wanted, nor what that imports.
    (library,) = [file for file in distribution("libfaketime").files or () if file.name == "libfaketime.so.1"]
    file.write_text("+0")
    return {
        "LD_PRELOAD": str(library.locate()),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


def lock_sqlite(file: Path) -> sqlite3.Connection:
    """A connection that holds SQLite's write lock until it is closed."""
    connection = sqlite3.connect(file, timeout=60, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def table(rows: list[Row]) -> str:
    """The table of the suite, as Markdown."""
    lines = [
        "| fault | system | trials lost | epochs repeated | states right | recovers by | seconds to recover |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        right = "yes" if not row.wrong else f"no: {len(row.wrong)}"
        seconds = "-" if math.isnan(row.seconds) else f"{row.seconds:.1f}"
        lines.append(
            f"| {row.fault} | {row.system} | {row.lost} of {row.asked} | {row.repeated} | {right} | {row.recovered_by} | {seconds} |"
        )
    return "\n".join(lines)
