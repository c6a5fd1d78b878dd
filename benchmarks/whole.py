"""The whole job: how long hpsearch takes to the validation loss that the usual glue ends at.

    python benchmarks/whole.py [--seeds N] [--trials N] [--only WORD ...]

The peer is Ray Tune + OptunaSearch + ASHA + HF Trainer (`benchmarks/peers/hf_tune.py`): same text, same search space,
same two cores, same seeds. It runs to the end of its trials; then `hpsearch launch` runs with its defaults until it has
reached the best validation loss that the peer has ended with, in at most four times as many trials (of ours most pause
early) and twice the peer's time: `never` is what was not reached by then. The table says when it was reached, how many
of its own seconds of training it had spent by then, and when the first validation loss came in from either. Text is
tokenized before either starts, and hpsearch has tried to build its models, as after a first launch beside that text.

Both begin with the same learning rates, batch sizes, layers and epochs. The HF Trainer trains with its own AdamW, with
hpsearch's decay, warm-up and clipping; hpsearch takes what it comes with, which is Muon and averaged weights: `--adamw`
takes that from it.
"""

from __future__ import annotations

import argparse
import json
import math
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
import yaml

HERE = Path(__file__).parent
MORE = 4
"""Times as many trials as the peer's that ours may use."""
LONGER = 2
"""Times as long as the peer that ours may take."""
STUDIES = {"causal LM": "lm.yaml", "translation": "translation.yaml", "classification": "classification.yaml"}


def study(case: str, *, adamw: bool = False) -> dict[str, Any]:
    from hpsearch.spec.parsing.yaml_file import read_study_file

    # YAML 1.2, whose 1e-3 is a number.
    content: dict[str, Any] = json.loads(json.dumps(read_study_file(HERE.parent / "studies" / STUDIES[case]).content))
    for name in ("store", "prune"):  # both as they are by default
        content.pop(name, None)
    if adamw:
        content["training"] = {"optimizer": "adamw", "weight_average": 0.0}
    content["resources"] = {"cpus_per_trial": 1, "gpus_per_trial": 0, "parallel": 2}
    return content


def settings(case: str, folder: Path, data: Path, evaluations: int, *, trials: int, seed: int) -> dict[str, Any]:
    content = study(case)
    space = {name: there for name, there in content["search"].items() if isinstance(there, list | dict)}
    longest = space["num_epochs"]["max"]
    return {
        "case": case, "folder": str(folder), "data": str(data), "trials": trials, "seed": seed, "space": space,
        "dropout": content["search"]["dropout"], "evaluations": evaluations, "most_evaluations": longest * evaluations,
    }  # fmt: skip


def peer(
    case: str, folder: Path, data: Path, evaluations: int, *, trials: int, seed: int, seconds: float | None = None
) -> list[dict[str, Any]]:
    """Its reports, in the order of time; it ends after the trials, or after the seconds."""
    chosen = {**settings(case, folder, data, evaluations, trials=trials, seed=seed), "seconds": seconds}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(HERE / "peers" / "hf_tune.py"), json.dumps({**chosen, "began": time.time()})]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600, check=False)
    reports = folder / "reports.jsonl"
    if not reports.is_file():
        raise SystemExit(f"the peer failed:\n{ended.stderr[-3000:]}")
    return [json.loads(line) for line in reports.read_text().splitlines()]


OURS = """
import json, os, signal, sys, time, hpsearch
began, study, folder, trials, goal, limit = json.loads(sys.argv[1])
def hear(event):
    if event.kind == "point":
        point = event.point
        line = {"at": time.time() - began, "trial": event.trial, "loss": point.valid_loss, "seconds": point.seconds}
        open(folder + "/reports.jsonl", "a").write(json.dumps(line) + "\\n")
        if point.valid_loss <= goal or line["at"] > limit:
            os.kill(os.getpid(), signal.SIGINT)
hpsearch.launch(study, trials=trials, store=f"sqlite:///{folder}/s.db", folder=folder + "/runs", listen=hear)
"""


def ours(
    case: str, folder: Path, runs: Path, *, trials: int, seed: int, adamw: bool, goal: float, limit: float
) -> list[dict[str, Any]]:
    content = study(case, adamw=adamw)
    # The goal is a loss of all of the validation split.
    content["training"] = {**content.get("training", {}), "evaluation_share": 1}
    file = begin({**content, "seed": seed}, folder, runs)
    given = json.dumps([time.time(), str(file), str(folder), MORE * trials, goal, limit])
    command = [sys.executable, "-c", OURS, given]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    reports = folder / "reports.jsonl"
    if not reports.is_file():
        raise SystemExit(f"hpsearch failed:\n{ended.stderr[-3000:]}")
    return [json.loads(line) for line in reports.read_text().splitlines()]


def finite(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in reports if math.isfinite(one["loss"])]


def prepare(case: str, folder: Path) -> tuple[Path, int]:
    """Where the tokenized text of a task lies from now on, under `data` in the folder; and evaluations per epoch."""
    from hpsearch.driver.plan import prepare_data
    from hpsearch.spec.load import load_study

    (folder / "prepared.yaml").write_text(yaml.safe_dump(study(case)))
    spec = load_study(folder / "prepared.yaml", folder=str(folder / "data"))
    return prepare_data(spec)[0], spec.evaluations_per_epoch


def begin(content: dict[str, Any], folder: Path, runs: Path) -> Path:
    """The study file in a folder of its own, beside runs that know the text already."""
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    (folder / "runs").mkdir()
    for entry in runs.iterdir():
        (folder / "runs" / entry.name).symlink_to(entry)
    return folder / "study.yaml"


def compare(case: str, seed: int, trials: int, *, adamw: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hps-w-") as place:
        folder = Path(place)
        data, evaluations = prepare(case, folder)
        for name in ("peer", "ours"):
            (folder / name).mkdir()
        theirs = finite(peer(case, folder / "peer", data, evaluations, trials=trials, seed=seed))
        shutil.rmtree(folder / "peer" / "results", ignore_errors=True)
        goal = min(one["loss"] for one in theirs)
        wall = max(one["at"] for one in theirs)
        limits = {"goal": goal, "limit": LONGER * wall}
        mine = finite(ours(case, folder / "ours", folder / "data", trials=trials, seed=seed, adamw=adamw, **limits))
    there = next((one["at"] for one in mine if one["loss"] <= goal), None)
    spent: dict[int, float] = {}
    for one in mine:
        spent[one["trial"]] = one["seconds"]
        if one["loss"] <= goal:
            break
    return {
        "seed": seed,
        "goal": goal,
        "peer_wall_s": wall,
        "peer_first_report_s": min(one["at"] for one in theirs),
        "wall_s": there,
        "device_seconds": sum(spent.values()) if there is not None else None,
        "ended_s": max(one["at"] for one in mine),
        "first_report_s": min(one["at"] for one in mine),
        "best": min(one["loss"] for one in mine),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=None, help="of both; by default those of the study file")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="tasks whose names hold one of these")
    parser.add_argument("--adamw", action="store_true", help="the HF Trainer's optimizer for hpsearch, too; not kept")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {}
    print("seconds of wall time; 'reached': ours at the validation loss that the peer ends with")
    heads = f"{'seed':>5}{'peer ends':>11}{'with':>8}{'reached':>9}{'part':>7}{'device s':>10}{'first loss: peer':>18}"
    print(f"{'':<16}{heads}{'ours':>7}")
    cases = [case for case in STUDIES if not options.only or any(word in case for word in options.only)]
    for seed in range(options.seeds):
        for case in cases:
            trials = options.trials or study(case)["budget"]["trials"]
            one = compare(case, seed, trials, adamw=options.adamw)
            rows.setdefault(case, []).append({**one, "trials": trials})
            reached = "never" if one["wall_s"] is None else f"{one['wall_s']:.0f}"
            part = "-" if one["wall_s"] is None else f"{one['wall_s'] / one['peer_wall_s']:.2f}"
            spent = "-" if one["device_seconds"] is None else f"{one['device_seconds']:.0f}"
            print(
                f"{case:<16}{seed:>5}{one['peer_wall_s']:>11.0f}{one['goal']:>8.3f}{reached:>9}{part:>7}{spent:>10}"
                f"{one['peer_first_report_s']:>18.1f}{one['first_report_s']:>7.1f}",
                flush=True,
            )
        if options.adamw:
            continue
        # It takes long: what is there is kept.
        record.keep("whole", "ray", "optuna", "torch", "transformers", seeds=seed + 1, rows=rows)
    for case, found in rows.items():
        # What was never reached counts as worse than all that was.
        parts = [(one["wall_s"] or math.inf) / one["peer_wall_s"] for one in found]
        start = statistics.median(one["first_report_s"] / one["peer_first_report_s"] for one in found)
        missed = sum(math.isinf(part) for part in parts)
        said = f"median {statistics.median(parts):.2f} of the peer's time, {start:.2f} of it to the first loss"
        print(f"{case:<16}{said}" + (f"; {missed} never" if missed else ""), flush=True)


if __name__ == "__main__":
    main()
