"""One trial, in whichever process the backend chose: task, trainer and the verdict on the run's own curve.

The overfitting verdict is taken here, with no round trip to the driver: the run stops, its best checkpoint is scored
on the test split, and its device is free at once.
"""

from __future__ import annotations

import platform
import shutil
import socket
import time
import traceback
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import hpsearch
from hpsearch import statistics
from hpsearch.pruning import Judgement, OverfitRule, Verdict, judge
from hpsearch.tasks import build_task
from hpsearch.trainer import OutOfMemoryError, Trainer, pick_device, seed_everything
from hpsearch.trial import RANKED, Point, Progress, TrialConfig, TrialResult, TrialState, judgement_dict

_STATE_OF = {
    Verdict.OVERFITTING: TrialState.OVERFIT,
    Verdict.PLATEAU: TrialState.PLATEAU,
    Verdict.DIVERGING: TrialState.DIVERGED,
}


def run_trial(config: TrialConfig) -> Generator[Progress, None, TrialResult]:
    """Run one trial; yields Progress per evaluation and returns how it ended. Close it to stop the trial early.

    Whatever the trial raises ends that trial alone: it comes back as a `failed` result with its traceback.
    """
    started = time.perf_counter()
    folder = Path(config.folder)
    try:
        result = yield from _run(config, folder)
    except GeneratorExit:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OutOfMemoryError as error:
        result = TrialResult(state=TrialState.INFEASIBLE, reason=f"out of memory at micro-batch 1: {error}")
    except Exception as error:
        result = TrialResult(
            state=TrialState.FAILED, reason=f"{type(error).__name__}: {error}", error=traceback.format_exc()
        )
    if result.state not in RANKED:
        shutil.rmtree(folder, ignore_errors=True)
    return replace(
        result,
        host=socket.gethostname(),
        seconds=time.perf_counter() - started,
        provenance={
            "hpsearch": hpsearch.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
    )


def _run(config: TrialConfig, folder: Path) -> Generator[Progress, None, TrialResult]:
    torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    device = pick_device(config.device)
    trainer = Trainer(
        build_task(config),
        config.training,
        seed=config.seed,
        device=device,
        folder=folder,
        objective=config.objective,
    )
    # Without the overfitting rule a run is still ended when its loss is no number any more.
    rule = config.rule or OverfitRule()
    curve: list[Point] = []
    per_epoch = len(trainer.evaluation_steps)
    judgement = judge(curve, trainer.total_evaluations, rule)
    for point in trainer.points():
        curve.append(point)
        judgement = judge(curve, trainer.total_evaluations, rule, evaluations_per_epoch=per_epoch)
        stops = judgement.stops and (config.rule is not None or _is_broken(judgement))
        yield Progress(point=point, judgement=judgement, stops=stops)
        if stops:
            break
    else:
        stops = False
    common = TrialResult(
        state=TrialState.COMPLETED,
        reason=f"ran its {config.training.num_epochs} epochs",
        judgement=judgement_dict(judgement),
        num_parameters=trainer.num_parameters,
        micro_batch_size=trainer.micro_batch_size,
        device=_device_name(device),
    )
    trainer.settle(curve[-1])
    state = _STATE_OF[judgement.verdict] if stops else TrialState.COMPLETED
    if state is TrialState.DIVERGED or trainer.best is None:
        return replace(common, state=TrialState.DIVERGED, reason=_why(judgement, curve))
    scored = trainer.score()
    trainer.export()
    return replace(
        common,
        state=state,
        reason=_why(judgement, curve) if stops else common.reason,
        best_evaluation=trainer.best.evaluation,
        best_epoch=trainer.best.epoch,
        best_valid_loss=trainer.best.valid_loss,
        best_valid_score=trainer.best.valid_score,
        scores=scored.scores,
        examples=statistics.pack(scored.examples),
        details=scored.details,
        checkpoint=str(folder),
    )


def _is_broken(judgement: Judgement) -> bool:
    return judgement.evidence.rule in ("non-finite", "exploding")


def _why(judgement: Judgement, curve: list[Point]) -> str:
    evidence, last = judgement.evidence, curve[-1]
    if evidence.rule == "non-finite":
        return f"loss is no finite number at epoch {last.epoch:.2f}"
    if evidence.rule == "exploding":
        return f"training loss exploded to {last.train_loss:.3g} at epoch {last.epoch:.2f}"
    best = curve[(evidence.best_evaluation or 1) - 1]
    turned = {
        "rising trend": f"validation loss rises (Mann-Kendall z {evidence.valid_trend_z or 0:+.2f})",
        "patience": f"no better validation loss for {evidence.since_best} evaluations",
    }.get(evidence.rule, evidence.rule)
    training = {
        Verdict.OVERFITTING: "while training loss falls",
        Verdict.PLATEAU: "and training loss is flat",
        Verdict.DIVERGING: "and training loss rises",
    }.get(judgement.verdict, "")
    return (
        f"{turned} {training}: {last.valid_loss:.3f} at epoch {last.epoch:.2f}, "
        f"best {best.valid_loss:.3f} at epoch {best.epoch:.2f}"
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
