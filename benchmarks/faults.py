"""The same faults for us and for stock Ray Tune with OptunaSearch: what is lost, repeated, wrong, and for how long.

    python benchmarks/faults.py [--only WORD] [--systems hpsearch,stock]

Each case breaks a running study of 4 trials of 4 epochs once, then does what a person would: wait, and if the launch
ends, run the same command again (for the peer, a script that restores itself by `Tuner.restore` where it can). A trial
is lost when the store has no result for it in the end; states are wrong when rows are left running, rows are more than
were asked for, or the exit code says 0 of a study that is not finished. `make test-faults` holds us to much more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults.harness import EPOCHS, Row, Stopwatch, Study, lock_sqlite, table
from tests.faults.postgres import Postgres

ENDS_WITHIN_S = 240
PEER = Path(__file__).parent / "peers" / "stock_tune.py"


@dataclass
class StockStudy(Study):
    """The peer, driven by the same hands."""

    def launch(self, *more: str, wait: bool = False) -> subprocess.Popen[str]:
        settings = {
            "folder": str(self.folder), "store": self.store, "trials": self.trials, "epochs": EPOCHS,
            "pace": self.pace, "log": str(self.log), "trial_layers": 1, **self.faults,
        }  # fmt: skip
        number = len(self.launches)
        with self.errors(number).open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, str(PEER), json.dumps(settings)], cwd=self.folder, text=True, start_new_session=True,
                stdout=errors, stderr=errors, env={**os.environ, "RAY_AUTH_TOKEN": "0" * 64},
            )  # fmt: skip
        self.launches.append(process)
        return process

    def judge(self, row: Row, code: int, *, expected_code: int = 0) -> Row:
        row.asked = self.trials
        trained = Counter((epoch["trial"], epoch["evaluation"]) for epoch in self.epochs())
        row.repeated = sum(count - 1 for count in trained.values())
        try:
            trials = optuna.load_study(study_name="suffering", storage=self.store).trials
        except KeyError:
            trials = []
        states = Counter(trial.state.name for trial in trials)
        row.lost = max(0, self.trials - states["COMPLETE"] - states["PRUNED"])
        row.wrong += [f"trial {trial.number} left running" for trial in trials if not trial.state.is_finished()]
        if len(trials) > self.trials:
            row.wrong.append(f"{len(trials)} rows of {self.trials}")
        if code == 0 and (row.lost or row.wrong):
            row.wrong.append("exit code 0")
        return row


def finish(study: Study, launch: subprocess.Popen[str], row: Row) -> Row:
    """Wait for the end; if it is not a good one, give the same command once more."""
    code = _wait(launch)
    if code != 0:
        row.recovered_by = "the same command"
        code = _wait(study.launch())
    return study.judge(row, code)


def _wait(launch: subprocess.Popen[str]) -> int:
    try:
        return launch.wait(ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(launch.pid).children(recursive=True):
            child.kill()
        launch.kill()
        launch.wait()
        return -9


def worker_killed(study: Study, number: signal.Signals) -> Row:
    launch = study.launch()
    victim = study.wait_for_victim(launch)
    watch = Stopwatch(study)
    os.kill(victim["pid"], number)
    row = Row(f"{number.name} of a worker")
    with suppress(AssertionError):  # it may never go on
        row.seconds = watch.next_worker(launch, victim["trial"])
    return finish(study, launch, row)


def driver_killed(study: Study, number: signal.Signals) -> Row:
    first = study.launch()
    study.wait_for_epochs(5, first)
    watch = Stopwatch(study)
    first.send_signal(number)
    code = _wait(first)
    row = Row(f"{number.name} of the driver", recovered_by="the same command")
    if code == 0:
        row.wrong.append("exit code 0 of a study that was interrupted")
    second = study.launch()
    with suppress(AssertionError):  # it may never go on
        row.seconds = watch.next_worker(second)
    return finish(study, second, row)


def ray_killed(study: Study, name: str) -> Row:
    launch = study.launch()
    study.wait_for_epochs(5, launch)
    watch = Stopwatch(study)
    for victim in study.children(name):
        victim.kill()
    row = Row(f"SIGKILL of {name}")
    code = None
    try:
        row.seconds = watch.next_worker(launch)
    except AssertionError:
        code = _wait(launch)
    return finish(study, launch, row) if code is None else finish(study, study.launch(), row)


def broken(study: Study, name: str) -> Row:
    return finish(study, study.launch(), Row(name))


def locked(study: Study, seconds: float) -> Row:
    launch = study.launch()
    study.wait_for_epochs(3, launch)
    watch = Stopwatch(study)
    lock = lock_sqlite(study.folder / "studies.db")
    time.sleep(seconds)
    lock.close()
    row = Row(f"SQLite locked for {seconds:.0f} s")
    with suppress(AssertionError):  # it may never go on
        row.seconds = watch.next_epoch(launch)
    return finish(study, launch, row)


def two_drivers(study: Study) -> Row:
    first = study.launch()
    second = study.launch()
    codes = sorted([_wait(first), _wait(second)])
    row = Row("two drivers at once on an empty store")
    return study.judge(row, 0 if codes[0] == 0 else codes[0])


def postgres_away(study: Study, server: Postgres, seconds: float) -> Row:
    launch = study.launch()
    study.wait_for_epochs(3, launch)
    watch = Stopwatch(study)
    server.stop()
    time.sleep(seconds)
    server.start()
    row = Row(f"PostgreSQL away for {seconds:.0f} s" if seconds else "PostgreSQL restarted")
    with suppress(AssertionError):  # it may never go on
        row.seconds = watch.next_epoch(launch)
    return finish(study, launch, row)


Case = Callable[[Study], Row]
CASES: dict[str, tuple[Case, dict[str, dict[str, object]]]] = {
    "worker SIGKILL": (lambda study: worker_killed(study, signal.SIGKILL), {}),
    "worker SIGTERM": (lambda study: worker_killed(study, signal.SIGTERM), {}),
    "driver SIGKILL": (lambda study: driver_killed(study, signal.SIGKILL), {}),
    "driver SIGTERM": (lambda study: driver_killed(study, signal.SIGTERM), {}),
    "driver SIGINT": (lambda study: driver_killed(study, signal.SIGINT), {}),
    "raylet": (lambda study: ray_killed(study, "raylet"), {}),
    "gcs_server": (lambda study: ray_killed(study, "gcs_server"), {}),
    "nan": (
        lambda study: broken(study, "NaN in some trials"),
        {"hpsearch": {"break": "nan", "trial": 1, "step": 5}, "stock": {"break": "nan"}},
    ),
    "oom": (
        lambda study: broken(study, "out of memory in some trials"),
        {"hpsearch": {"break": "oom", "trial": 1, "fits": 7}, "stock": {"break": "oom"}},
    ),
    "hang": (
        lambda study: broken(study, "a worker hangs once"),
        {"hpsearch": {"break": "hang", "trial": 1, "step": 5, "only_first": True}, "stock": {"break": "hang"}},
    ),
    "locked": (lambda study: locked(study, 60), {}),
    "two drivers": (two_drivers, {}),
}


def run(name: str, system: str) -> Row:
    case, faults = CASES[name]
    kind = {"hpsearch": Study, "stock": StockStudy}[system]
    with tempfile.TemporaryDirectory(prefix="hps-faults-") as folder:
        study = kind(
            folder=Path(folder) / "study", faults=dict(faults.get(system, {})), pace=1.0,
            overrides=["limits.stall_minutes=0.1"],
        )  # fmt: skip
        return _one(study, system, name, case)


def run_postgres(system: str, seconds: float) -> Row:
    kind = {"hpsearch": Study, "stock": StockStudy}[system]
    with tempfile.TemporaryDirectory(prefix="hps-faults-") as folder:
        server = Postgres(Path(folder) / "pg")
        try:
            study = kind(folder=Path(folder) / "study", store=server.url, pace=1.0)
            return _one(study, system, "postgres", lambda study: postgres_away(study, server, seconds))
        finally:
            server.stop()


def _one(study: Study, system: str, name: str, case: Case) -> Row:
    try:
        row = case(study)
    except AssertionError as error:
        row = study.judge(Row(name), -1)
        row.wrong.append(f"gave up: {str(error)[:200]}")
    finally:
        study.end()
    row.system = system
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--systems", default="hpsearch,stock")
    chosen = parser.parse_args()
    rows: list[Row] = []
    for name in [*CASES, "postgres restart", "postgres away"]:
        for system in chosen.systems.split(","):
            if chosen.only not in name:
                continue
            if name.startswith("postgres"):
                rows.append(run_postgres(system, 20.0 if name.endswith("away") else 0.0))
            else:
                rows.append(run(name, system))
            print(table(rows[-1:]).splitlines()[-1], *rows[-1].wrong, sep="\n    ", flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
