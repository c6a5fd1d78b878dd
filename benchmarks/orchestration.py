"""What a trial costs beside its training: CPU-seconds, wall time and SQL statements of trials that only report.

    python benchmarks/orchestration.py [--trials N] [--repeats N]

Each trial reports five times and ends; two run at once; the record is SQLite. Four orchestrators: hpsearch (its own
launch; its worker's trainer is replaced), Ray Tune's Tuner with OptunaSearch on an RDBStorage as their documentation
has it, the same tuned (actors used again, no loggers, no snapshots), and plain Optuna in two processes. None prunes.
CPU-seconds are of the whole machine, all processes of Ray included, less what it took to start: the same run with two
trials. Start: from the command to the first optimizer step of a trial that trains for real, for hpsearch and for Ray
Tune + OptunaSearch + HF Trainer (`benchmarks/peers/hf_tune.py`), on the text and the model of studies/lm.yaml. Runs are
interleaved; figures are medians. Before them text is tokenized and hpsearch has tried to build its models, as after a
first launch beside that text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import whole
import yaml

HERE = Path(__file__).parent
METHODS = ("hpsearch", "Tuner + OptunaSearch, stock", "Tuner + OptunaSearch, tuned", "Optuna, 2 processes")
REPORTS = 5
PEER = "Ray Tune + OptunaSearch + HF Trainer"
STARTS = 5
"""Of each, one after the other."""
SETTLES_S = 3
"""What the processes of the Ray before get to be gone."""
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


def injected(name: str, value: str) -> dict[str, str]:
    """The environment in which `peers/injected` does what it is told."""
    places = [str(HERE / "peers" / "injected"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, places))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, f"HPSEARCH_BENCHMARK_{name}": value}


def run(method: str, trials: int, data: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hps-b-") as folder:
        place = Path(folder)
        (place / "study.yaml").write_text(STUDY)
        if method == "hpsearch":
            # Tokenized once for all runs, as Tune's trials have nothing to tokenize.
            (place / "runs").mkdir()
            for entry in data.iterdir():
                (place / "runs" / entry.name).symlink_to(entry)
        environment = injected("NOOP", "1")
        before = cpu_seconds()
        settings = {"trials": trials, "reports": REPORTS, "folder": folder}
        ended = subprocess.run(
            [sys.executable, str(HERE / "peers" / "noop.py"), method, json.dumps(settings)],
            capture_output=True, text=True, env=environment, cwd=folder, timeout=1800, check=False,
        )  # fmt: skip
        said = place / "said.json"
        if not said.is_file():
            raise SystemExit(f"{method} failed:\n{ended.stderr[-3000:]}")
        return {**json.loads(said.read_text()), "cpu_s": cpu_seconds() - before}


def prepared(folder: Path, study: str = STUDY) -> Path:
    """The tokenized data of a study, in a folder of its own."""
    from hpsearch.driver.plan import prepare_data
    from hpsearch.spec.load import load_study

    folder.mkdir()
    file = folder / "study.yaml"
    file.write_text(study)
    prepare_data(load_study(file, folder=str(folder / "data")))
    return folder / "data"


LAUNCH = """
import sys, hpsearch
folder = sys.argv[1]
hpsearch.launch(folder + "/study.yaml", trials=2, store=f"sqlite:///{folder}/s.db", folder=folder + "/runs")
"""


def short_study() -> dict[str, Any]:
    """studies/lm.yaml with trials of one epoch."""
    content = whole.study("causal LM")
    content["search"]["num_epochs"] = 1
    return content


def first_step(*, is_ours: bool, data: Path) -> float:
    """Seconds from the command to the first optimizer step of one of two trials."""
    with tempfile.TemporaryDirectory(prefix="hps-b-") as name:
        folder = Path(name)
        noted = folder / "steps.txt"
        environment = {**injected("FIRST_STEP", str(noted)), "OMP_WAIT_POLICY": "PASSIVE"}
        if is_ours:
            del environment["OMP_NUM_THREADS"]  # it sets its own
            (folder / "study.yaml").write_text(yaml.safe_dump(short_study()))
            shutil.copytree(data, folder / "runs")
            command = ["-c", LAUNCH, name]
        else:
            tokenized = next(place for place in (data / "data").iterdir() if place.is_dir())
            chosen = whole.settings("causal LM", folder, tokenized, 1, trials=2, seed=0)
            chosen |= {"space": {**chosen["space"], "num_epochs": [1]}, "most_evaluations": 1, "began": time.time()}
            command = [str(HERE / "peers" / "hf_tune.py"), json.dumps(chosen)]
        time.sleep(SETTLES_S)
        began = time.time()
        ended = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        if not noted.is_file():
            raise SystemExit(f"no trial began:\n{ended.stderr[-3000:]}")
        return float(noted.read_text().split()[0]) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    starts: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder) / "noop")
        text = prepared(Path(folder) / "lm", yaml.safe_dump(short_study()))
        steps: dict[str, list[float]] = {"hpsearch": [], PEER: []}
        for _ in range(STARTS):
            for name, times in steps.items():
                times.append(first_step(is_ours=name == "hpsearch", data=text))
        for _ in range(options.repeats):
            for method in METHODS:
                starts[method].append(run(method, FEW, data))
                found[method].append(run(method, options.trials, data))
    print(f"{options.trials} trials of {REPORTS} reports, 2 at once, SQLite, {options.repeats} runs")
    heads = f"{'CPU s/trial':>12}{'driver':>9}{'wall ms':>9}{'SQL/trial':>11}"
    print(f"{'':<30}{heads}   of stock: CPU, wall")
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
            "runs": found[method],
            "starts": starts[method],
        }
    stock = rows["Tuner + OptunaSearch, stock"]
    for method, row in rows.items():
        shares = ", ".join(f"{row[name] / stock[name]:.2f}" for name in ("cpu_s", "wall_ms"))
        print(
            f"{method:<30}{row['cpu_s']:>12.3f}{row['driver_cpu_s']:>9.3f}{row['wall_ms']:>9.0f}"
            f"{row['statements']:>11.1f}   {shares}"
        )
    ours, theirs = (statistics.median(times) for times in steps.values())
    spread = "; ".join(f"{min(times):.1f} to {max(times):.1f}" for times in steps.values())
    print(f"first optimizer step after: hpsearch {ours:.1f} s, {PEER} {theirs:.1f} s ({spread}): {ours / theirs:.2f}")
    record.keep(
        "orchestration", "ray", "optuna", "sqlalchemy", "torch", "transformers",
        trials=options.trials, repeats=options.repeats, rows=rows, first_steps=steps,
    )  # fmt: skip


if __name__ == "__main__":
    main()
