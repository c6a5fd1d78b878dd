"""What validation losses cost a run: with the share that they may take, beside the whole split each time.

    python benchmarks/evaluation.py [--seeds N] [--only WORD ...]

Each study's first settings are trained on one thread, and so is a run of one epoch; both ways are interleaved. Printed
are the part of the run's time that evaluation takes, a token's cost in evaluation by its cost in training, and the
validation loss of the best checkpoint on all of the split, which both ways report.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import record
import torch

from hpsearch.data.prepare import prepare
from hpsearch.driver.plan import fitted
from hpsearch.records import TrialConfig
from hpsearch.search.study import first_suggestions
from hpsearch.spec.load import load_study
from hpsearch.spec.study import StudySpec
from hpsearch.training.ranks import Ranks
from hpsearch.training.trainer import Order, Trainer
from hpsearch.worker.setup import build_trainer

STUDIES = Path(__file__).parents[1] / "studies"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "causal LM": ("lm.yaml", {}),
    "translation": ("translation.yaml", {}),
    "classification": ("classification.yaml", {}),
    "causal LM, one epoch": ("lm.yaml", {"corpus": "python_docstrings", "fraction": 1.0, "epochs": 1}),
}


def study(case: str, folder: Path, share: float) -> StudySpec:
    file, changes = CASES[case]
    sets = [f"training.evaluation_share={share}"]
    if changes:
        sets += [f"data.corpus={changes['corpus']}", f"data.fraction={changes['fraction']}"]
        sets += [f"search.num_epochs={changes['epochs']}"]
    return load_study(STUDIES / file, overrides=sets, folder=str(folder), store=f"sqlite:///{folder}/s.db")


def run(case: str, data: Path, seed: int, share: float) -> dict[str, float]:
    """Of one run: its seconds, those of evaluation, a token's cost in it, and the loss it ends with."""
    spec = study(case, data, share)
    place, card = prepare(spec)
    # Without a share, as many evaluations as the longest run of a study has.
    spec = fitted(spec, card) if share < 1 else spec
    model, training = spec.settings_for(first_suggestions(spec, 1)[0])
    with tempfile.TemporaryDirectory() as folder:
        config = TrialConfig(
            study=spec.name,
            number=0,
            task=spec.task,
            seed=seed,
            params={},
            model=model,
            training=training,
            options=spec.options.model_dump(),
            rule=None,
            data=str(place),
            folder=folder,
            threads=1,
            device="cpu",
        )
        trainer = build_trainer(config, Ranks(), lambda: Order.CONTINUE)
        spent = timed(trainer)
        began = time.perf_counter()
        points = list(trainer.points())
        seconds = time.perf_counter() - began
        trainer.restore_best()
        assert trainer.best is not None
        whole = trainer.evaluator.whole_loss()
        loss = trainer.best.valid_loss if whole is None else whole
    task = trainer.task
    looked_at = sum(task.predicted("validation", batch) for batch in task.evaluation_batches("validation"))
    of = points[-1].tokens
    cost = (spent[0] / len(points) / (trainer.evaluator.part * looked_at)) / ((seconds - spent[0]) / of)
    return {"seconds": seconds, "share": spent[0] / seconds, "cost": cost, "loss": loss, "evaluations": len(points)}


def timed(trainer: Trainer) -> list[float]:
    """Seconds that the trainer's evaluations take, once it has run."""
    spent = [0.0]
    own = trainer.evaluator.mean_loss

    def mean_loss() -> float:
        began = time.perf_counter()
        found = own()
        spent[0] += time.perf_counter() - began
        return found

    trainer.evaluator.mean_loss = mean_loss  # type: ignore[method-assign] - only this run's is timed
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print(f"{'':22} {'share of the time':>18} {'evaluations':>12} {'token cost':>11} {'seconds':>9} {'loss':>8}")
    for case in CASES:
        if given.only and not any(word in case for word in given.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows: dict[float, list[dict[str, float]]] = {0.1: [], 1.0: []}
            for seed in range(given.seeds):
                for share, found in rows.items():
                    found.append(run(case, Path(folder), seed, share))
        results[case] = rows
        for share, found in rows.items():
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            label = f"{case}" if share < 1 else "  the whole split"
            print(
                f"{label:22} {middle['share']:18.1%} {middle['evaluations']:12.0f} {middle['cost']:11.2f} "
                f"{middle['seconds']:9.1f} {np.mean([one['loss'] for one in found]):8.4f}",
                flush=True,
            )
    if not given.only:
        record.keep("evaluation", "torch", results=results)


if __name__ == "__main__":
    main()
