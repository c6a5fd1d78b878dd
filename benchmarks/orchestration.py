"""What a trial costs beside its training: CPU-seconds, wall time and SQL statements of trials that only report.

    python benchmarks/orchestration.py [--trials N] [--repeats N]

Each trial reports five times and ends; two run at once; the record is SQLite. Four orchestrators: hpsearch (its own
launch; its worker's trainer is replaced), Ray Tune's Tuner with OptunaSearch on an RDBStorage as their documentation
has it, the same tuned (actors used again, no loggers, no snapshots), and plain Optuna in two processes. None prunes.
CPU-seconds are of the whole machine, all processes of Ray included, less what it took to start: the same run with two
trials. Start: from the command to the first report in the driver. Runs are interleaved; figures are medians. Before
them text is tokenized and hpsearch has tried to build its models, as after a first launch beside that text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

HERE = Path(__file__).parent
METHODS = ("hpsearch", "Tuner + OptunaSearch, stock", "Tuner + OptunaSearch, tuned", "Optuna, 2 processes")
REPORTS = 5
FEW = 2
"""Trials of a run that shows what starting costs."""
STUDY = """
name: noop
task: causal_lm
data: {corpus: python_docs, fraction: 0.02}
tokenizer: {vocab_size: 260}
model: {architecture: gpt2, hidden_size: 16, num_heads: 2, context_length: 32}
training: {num_epochs: 5, evaluations_per_epoch: 1}
search:
  learning_rate: {min: 1e-5, max: 1e-1, scale: log}
  batch_size: [8, 16, 32]
  num_layers: {min: 1, max: 4}
prune: {overfit: false, unpromising: none}
resources: {cpus_per_trial: 1, gpus_per_trial: 0, parallel: 2}
"""


def cpu_seconds() -> float:
    """Of all processes of this machine since it started."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def run(method: str, trials: int, data: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hps-b-") as folder:
        place = Path(folder)
        (place / "study.yaml").write_text(STUDY)
        if method == "hpsearch":
            # Tokenized once for all runs, as Tune's trials have nothing to tokenize.
            (place / "runs").mkdir()
            for entry in data.iterdir():
                (place / "runs" / entry.name).symlink_to(entry)
        worker = str(HERE / "peers" / "noop_worker")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [worker, os.environ.get("PYTHONPATH")])),
            "HPSEARCH_BENCHMARK_NOOP": "1",
        }
        before, began = cpu_seconds(), time.time()
        settings = {"trials": trials, "reports": REPORTS, "folder": folder, "began": began}
        ended = subprocess.run(
            [sys.executable, str(HERE / "peers" / "noop.py"), method, json.dumps(settings)],
            capture_output=True, text=True, env=environment, cwd=folder, timeout=1800, check=False,
        )  # fmt: skip
        said = place / "said.json"
        if not said.is_file():
            raise SystemExit(f"{method} failed:\n{ended.stderr[-3000:]}")
        return {**json.loads(said.read_text()), "cpu_s": cpu_seconds() - before}


def prepared(folder: Path) -> Path:
    """The tokenized data of the study, in a folder of its own."""
    from hpsearch.api import _prepare_data
    from hpsearch.spec import load_study

    file = folder / "study.yaml"
    file.write_text(STUDY)
    _prepare_data(load_study(file, folder=str(folder / "data")))
    return folder / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    starts: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder))
        for _ in range(options.repeats):
            for method in METHODS:
                starts[method].append(run(method, FEW, data))
                found[method].append(run(method, options.trials, data))
    print(f"{options.trials} trials of {REPORTS} reports, 2 at once, SQLite, {options.repeats} runs")
    heads = f"{'CPU s/trial':>12}{'driver':>9}{'wall ms':>9}{'SQL/trial':>11}{'start s':>9}"
    print(f"{'':<30}{heads}   of stock: CPU, wall, start")
    rows: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        more = options.trials - FEW

        def per_trial(name: str, method: str = method, more: int = more) -> float:
            """The median of what a trial adds."""
            pairs = zip(found[method], starts[method], strict=True)
            return statistics.median((many[name] - few[name]) / more for many, few in pairs)

        rows[method] = {
            "cpu_s": per_trial("cpu_s"),
            "driver_cpu_s": per_trial("driver_cpu_s"),
            "wall_ms": 1000 * per_trial("wall_s"),
            "statements": per_trial("statements"),
            "start_s": statistics.median(one["start_s"] for one in [*found[method], *starts[method]]),
            "runs": found[method],
            "starts": starts[method],
        }
    stock = rows["Tuner + OptunaSearch, stock"]
    for method, row in rows.items():
        shares = ", ".join(f"{row[name] / stock[name]:.2f}" for name in ("cpu_s", "wall_ms", "start_s"))
        print(
            f"{method:<30}{row['cpu_s']:>12.3f}{row['driver_cpu_s']:>9.3f}{row['wall_ms']:>9.0f}"
            f"{row['statements']:>11.1f}{row['start_s']:>9.1f}   {shares}"
        )
    record.keep(
        "orchestration", "ray", "optuna", "sqlalchemy", trials=options.trials, repeats=options.repeats, rows=rows
    )


if __name__ == "__main__":
    main()
