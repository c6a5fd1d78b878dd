"""How long a report takes and how large it is, by trials in the study, with 50 points a curve.

Two real trials are copied in the store as often as needed, with other values of what they sampled and scored.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import tempfile
import time
from pathlib import Path

import hpsearch

STUDY = """
name: report
task: causal_lm
data: {corpus: python_docs, fraction: 0.05}
tokenizer: {vocab_size: 260}
model: {architecture: gpt2, hidden_size: 16, num_heads: 2, context_length: 32}
training: {evaluations_per_epoch: 5}
search:
  learning_rate: {min: 1e-3, max: 1e-1, scale: log}
  batch_size: [32, 64]
  num_layers: 1
  num_epochs: 10
prune: {overfit: false, unpromising: none}
budget: {trials: 2}
resources: {gpus_per_trial: 0}
backend: inline
"""


def multiply(file: Path, trials: int) -> None:
    """Copy the rows of trial 0 until there are so many trials."""
    draw = random.Random(0)
    with sqlite3.connect(file) as database:
        database.row_factory = sqlite3.Row
        trial = dict(database.execute("SELECT * FROM hpsearch_trials WHERE number = 0").fetchone())
        tables = {
            name: [dict(row) for row in database.execute(f"SELECT * FROM {name} WHERE trial_id = ?", (trial["id"],))]
            for name in ("hpsearch_points", "hpsearch_scores")
        }
        for number in range(2, trials):
            shift = draw.gauss(0, 0.2)
            params = {**json.loads(trial["params"]), "learning_rate": 10 ** draw.uniform(-3, -1)}
            state = draw.choice(["completed", "overfit", "plateau", "unpromising"])
            insert(database, "hpsearch_trials", {
                **trial, "id": 1000 + number, "number": number, "params": json.dumps(params), "state": state,
                "best_valid_loss": trial["best_valid_loss"] + shift,
            })  # fmt: skip
            for name, rows in tables.items():
                if state == "unpromising" and name == "hpsearch_scores":
                    continue
                for row in rows:
                    changed = {key: row[key] + shift for key in ("train_loss", "valid_loss", "value") if key in row}
                    insert(database, name, {**row, **changed, "trial_id": 1000 + number})


def insert(database: sqlite3.Connection, table: str, row: dict[str, object]) -> None:
    marks = ", ".join("?" for _ in row)
    database.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    sizes = parser.parse_args().trials
    print("| trials | points | seconds | MB |\n| --- | --- | --- | --- |")
    for trials in sizes:
        with tempfile.TemporaryDirectory() as folder:
            study = Path(folder) / "study.yaml"
            store = f"sqlite:///{folder}/studies.db"
            study.write_text(f"{STUDY}store: {store}\nfolder: {folder}/runs\n")
            hpsearch.launch(study)
            multiply(Path(folder) / "studies.db", trials)
            began = time.perf_counter()
            document = hpsearch.report("report", store=store)
            seconds = time.perf_counter() - began
            print(f"| {trials} | {50 * trials:,} | {seconds:.1f} | {len(document.encode()) / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
