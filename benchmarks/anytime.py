"""A winner at any moment: what a study whose time is short ends with, beside the usual glue in the same time.

    python benchmarks/anytime.py [--seeds N] [--parts P ...] [--only WORD ...]

First the default study of each task runs to its end without a limit: that is the time it needs. Then, for every seed,
`hpsearch launch` has `budget.minutes` at a part of it. Its winner (what `hpsearch best` says) is compared by validation
loss with the best that the peer had by the moment at which our command had ended, its start and its scoring included.
The peer is `benchmarks/peers/hf_tune.py`: Ray Tune + OptunaSearch + ASHA + HF Trainer, on the same text, space, CPUs
and seed, with as many trials as it has time for.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import whole

ENOUGH = 1000
"""Trials that the peer never comes to the end of."""
OURS = """
import json, sys, hpsearch
study, folder = json.loads(sys.argv[1])
ended = hpsearch.launch(study, store=f"sqlite:///{folder}/s.db", folder=folder + "/runs")
best = ended.choose("test")
states = [trial.state for trial in ended.trials()]
if best is not None:
    trial = ended.trial(best.trial)
    best = {"state": best.state, "loss": trial.details.get("whole_validation_loss", trial.best_valid_loss)}
print(json.dumps({"best": best, "states": {state: states.count(state) for state in sorted(set(states))}}))
"""


def ours(case: str, folder: Path, runs: Path, *, seed: int, minutes: float | None) -> dict[str, Any]:
    """How a launch ended: seconds from its start, state and validation loss of its winner, trials by state."""
    content = {**whole.study(case), "seed": seed}
    if minutes is not None:
        content["budget"]["minutes"] = minutes
    file = whole.begin(content, folder, runs)
    began = time.monotonic()
    command = [sys.executable, "-c", OURS, json.dumps([str(file), str(folder)])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if ended.returncode:
        raise SystemExit(f"hpsearch failed:\n{ended.stderr[-3000:]}")
    return {"ended_s": time.monotonic() - began, **json.loads(ended.stdout.splitlines()[-1])}


def compare(case: str, seed: int, needed_s: float, parts: list[float]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="hps-a-") as place:
        folder = Path(place)
        data, evaluations = whole.prepare(case, folder)
        rows = []
        for part in parts:
            (folder / f"{part}").mkdir()
            minutes = part * needed_s / 60
            rows.append({"part": part, **ours(case, folder / f"{part}", folder / "data", seed=seed, minutes=minutes)})
        (folder / "peer").mkdir()
        last = max(row["ended_s"] for row in rows)
        reports = whole.finite(
            whole.peer(case, folder / "peer", data, evaluations, trials=ENOUGH, seed=seed, seconds=last)
        )
    for row in rows:
        there = [one["loss"] for one in reports if one["at"] <= row["ended_s"]]
        row["peer"] = min(there) if there else None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of the time that is needed")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="tasks whose names hold one of these")
    options = parser.parse_args()
    cases = [case for case in whole.STUDIES if not options.only or any(word in case for word in options.only)]
    needed: dict[str, float] = {}
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="hps-a-") as place:
            folder = Path(place)
            whole.prepare(case, folder)
            (folder / "ours").mkdir()
            needed[case] = ours(case, folder / "ours", folder / "data", seed=0, minutes=None)["ended_s"]
        print(f"{case}: the default study needs {needed[case]:.0f} s", flush=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    print(f"{'':<16}{'seed':>5}{'part':>6}{'ended':>8}{'winner':>9}{'peer':>8}  winner's state")
    for seed in range(options.seeds):
        for case in cases:
            for row in compare(case, seed, needed[case], options.parts):
                rows.setdefault(case, []).append({"seed": seed, **row})
                loss = math.nan if row["best"] is None else row["best"]["loss"]
                peer = math.nan if row["peer"] is None else row["peer"]
                state = "none" if row["best"] is None else row["best"]["state"]
                print(
                    f"{case:<16}{seed:>5}{row['part']:>6.2f}{row['ended_s']:>8.0f}{loss:>9.3f}{peer:>8.3f}  {state}",
                    flush=True,
                )
        # It takes long: what is there is kept.
        record.keep("anytime", "ray", "optuna", "torch", "transformers", seeds=seed + 1, needed_s=needed, rows=rows)
    for case, found in rows.items():
        for part in options.parts:
            here = [row for row in found if row["part"] == part]
            # A peer without any report by then has lost; so have we without a winner.
            won = sum(
                row["best"] is not None and (row["peer"] is None or row["best"]["loss"] <= row["peer"]) for row in here
            )
            print(f"{case:<16}{part:>6.2f}  at least as good in {won} of {len(here)}", flush=True)


if __name__ == "__main__":
    main()
