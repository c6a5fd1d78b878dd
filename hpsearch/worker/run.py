"""One trial, in whichever process the backend chose: task, trainer and the verdict on the run's own curve.

The overfitting verdict is taken here, with no round trip to the driver: the run stops, its best checkpoint is scored
on the test split, and its device is free at once. What the trial has come to is in its folder before it is told, so
that nothing is lost with a driver that does not hear it.

A trial on several devices has a process for each. This one, the first, reports and decides; the others `follow`.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import traceback
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers

import hpsearch
from hpsearch.errors import DiskFullError, LeaseLostError, UsageError
from hpsearch.files import storage
from hpsearch.files.layout import RESULT, TRIAL
from hpsearch.files.storage import Folder, locate
from hpsearch.files.trial_log import LOGGER, log_file, trial_log
from hpsearch.metrics import statistics
from hpsearch.pruning.overfitting import Judgement, Verdict, judge
from hpsearch.records import WHOLE, Point, Progress, TrialConfig, TrialResult, TrialState
from hpsearch.spec.sections import OverfitRule
from hpsearch.training import checkpoints, torch_internals
from hpsearch.training.devices import describe_cpu, device_name, peak_memory, pick_device
from hpsearch.training.evaluation import OutOfMemoryError
from hpsearch.training.ranks import Ranks
from hpsearch.training.steps import SmallerMicroBatchError
from hpsearch.training.trainer import Order, PreemptedError, Trainer
from hpsearch.worker.reasons import ending, is_broken, why
from hpsearch.worker.setup import build_trainer
from hpsearch.worker.team import ProcessLostError, Team, together
from hpsearch.worker.watchdog import Watchdog, whereabouts

_STATE_OF = {
    Verdict.OVERFITTING: TrialState.OVERFIT,
    Verdict.PLATEAU: TrialState.PLATEAU,
    Verdict.DIVERGING: TrialState.DIVERGED,
}
_LARGEST_LOSS = 700.0
"""In nats: a perplexity of more is no floating-point number."""
_ROOM_TO_BEGIN = 1_000_000
"""Bytes that a trial waits for that could not even make its folder."""


def run_trial(
    config: TrialConfig, *, own_process: bool = False, team: Team | None = None
) -> Generator[Progress, None, TrialResult]:
    """Run one trial; yields Progress per evaluation and returns how it ended. Close it to stop the trial early.

    Whatever the trial raises ends that trial alone: it comes back as a `failed` result with its traceback. Raises
    LeaseLostError when another launch has removed its folder, and ProcessLostError. Asked to
    stop, by SIGTERM or by STOP_FILE in its folder, it writes a checkpoint and ends as `interrupted`. With
    `own_process`, a trial that is silent for its `stall_minutes` ends the process and leaves LAST_WORDS. A `team`
    trains it together with this process.
    """
    folder = locate(config.folder)
    try:
        for place in map(locate, () if config.scores_only else config.earlier):
            if (found := _read_result(place, config.origin)) is not None:
                result, curve = found
                yield from (progress for progress in curve if progress.point.evaluation > config.recorded)
                return result
        watch = Watchdog(config, folder, own_process, team.size if team else 1)
        storage.write(folder / TRIAL, config.model_dump_json().encode())
    except DiskFullError as error:
        return TrialResult(state=TrialState.INTERRUPTED, reason=str(error), needed_bytes=error.needed)
    except OSError as error:
        if error.errno not in storage.FULL:
            raise
        return TrialResult(state=TrialState.INTERRUPTED, reason=f"no room in {folder}", needed_bytes=_ROOM_TO_BEGIN)
    log = trial_log(log_file(folder.parent, config.number), config.attempt, own_process=own_process)
    with watch, log:
        LOGGER.info("attempt %d begins", config.attempt, extra={"facts": {"params": config.params, **whereabouts()}})
        curve = []
        try:
            result = _score_best(config, watch) if config.scores_only else (yield from _run(config, watch, curve, team))
        except LeaseLostError:
            raise  # nobody waits for this attempt any more
        except ProcessLostError as error:
            watch.say(str(error))
            raise
        except PreemptedError:
            result = TrialResult(state=TrialState.INTERRUPTED, reason=watch.leave())
        except DiskFullError as error:
            result = TrialResult(state=TrialState.INTERRUPTED, reason=str(error), needed_bytes=error.needed)
        except SmallerMicroBatchError as error:
            LOGGER.warning("%s", error)
            result = TrialResult(state=TrialState.INTERRUPTED, reason=str(error))
        except OutOfMemoryError as error:
            result = TrialResult(state=TrialState.INFEASIBLE, reason=f"out of memory at micro-batch 1: {error}")
        except OSError as error:
            LOGGER.exception("a file could not be read or written")
            reason = f"{type(error).__name__}: {error}"
            result = TrialResult(state=TrialState.FAILED, reason=reason, error=traceback.format_exc(), lost_files=True)
        except Exception as error:
            LOGGER.exception("the trial raised an error")
            result = TrialResult(
                state=TrialState.FAILED, reason=f"{type(error).__name__}: {error}", error=traceback.format_exc()
            )
        result = replace(
            result,
            host=socket.gethostname(),
            seconds=watch.seconds,
            provenance={
                **result.provenance,
                **describe_cpu(),
                "hpsearch": hpsearch.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "threads": torch.get_num_threads(),
                "processes": team.size if team else 1,
                **peak_memory(pick_device(config.device)),
                "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            },
        )
        LOGGER.info("ends as %s: %s", result.state, result.reason)
        if result.state is TrialState.INTERRUPTED or result.lost_files:
            return result
        try:
            _write_result(folder, result, curve, config.origin)
            checkpoints.forget(folder)
        except DiskFullError as error:
            return replace(result, state=TrialState.INTERRUPTED, reason=str(error), needed_bytes=error.needed)
        return result


def _score_best(config: TrialConfig, watch: Watchdog) -> TrialResult:
    """Test scores of the best checkpoint that earlier attempts have left of a trial that has not ended."""
    trainer = watch.trainer = build_trainer(config, Ranks(), watch.pulse)
    unfinished = TrialResult(state=TrialState.INTERRUPTED, reason="has no checkpoint to be scored yet")
    if not trainer.recover_best() or trainer.best is None or trainer.best.valid_loss > _LARGEST_LOSS:
        return unfinished
    last = trainer.curve[-1]
    reason = f"scored as it was at epoch {last.epoch:.4g} of {config.training.num_epochs}"
    return _scored(replace(unfinished, reason=reason), trainer)


def export_unfinished(config: TrialConfig, place: Path) -> None:
    """Write the best model that the earlier attempts at a trial have left into a folder. Raises UsageError."""
    trainer = build_trainer(config, Ranks(), lambda: Order.CONTINUE)
    if not trainer.recover_best():
        raise UsageError(f"trial {config.number} has written no checkpoint yet")
    trainer.restore_best()
    trainer.write_model(place)


def _run(
    config: TrialConfig, watch: Watchdog, progress: list[Progress], team: Team | None
) -> Generator[Progress, None, TrialResult]:
    with together(config, team, watch) as ranks:
        trainer = watch.trainer = build_trainer(config, ranks, watch.pulse, watch.time_left)
        try:
            result = yield from _train(config, trainer, progress)
        except GeneratorExit:
            trainer.dismiss()
            raise
        trainer.dismiss()
        return result


def _train(config: TrialConfig, trainer: Trainer, progress: list[Progress]) -> Generator[Progress, None, TrialResult]:
    # Without the overfitting rule a run is still ended when its loss is NaN or infinite.
    rule = config.rule or OverfitRule()
    curve: list[Point] = []
    per_epoch = len(trainer.evaluation_steps)
    judgement = judge(curve, trainer.total_evaluations, rule)
    stops = False
    with closing(trainer.points()) as points:
        for point in points:
            curve.append(point)
            judgement = judge(
                curve,
                trainer.total_evaluations,
                rule,
                evaluations_per_epoch=per_epoch,
                decay_to_come=trainer.schedule.decay_to_come(point.step),
            )
            stops = judgement.stops and (config.rule is not None or is_broken(judgement))
            if point.evaluation > trainer.resumed_evaluations:
                said = "evaluation %d at epoch %.4g: train %.4g, valid %.4g, %s"
                losses = (point.train_loss, point.valid_loss, judgement.verdict)
                LOGGER.info(said, point.evaluation, point.epoch, *losses, extra={"facts": asdict(point)})
            progress.append(_progress(trainer, point, judgement, stops=stops))
            if point.evaluation > config.recorded or point.evaluation > trainer.resumed_evaluations:
                yield progress[-1]
            if stops:
                break
    if not curve:
        return TrialResult(state=TrialState.INFEASIBLE, reason=f"no evaluation within {config.max_minutes:g} minutes")
    common = TrialResult(
        state=TrialState.COMPLETED,
        reason=ending(config, curve),
        num_parameters=trainer.num_parameters,
        micro_batch_size=trainer.micro_batch_size,
        device=device_name(trainer.device),
        provenance={"precision": trainer.precision},
    )
    trainer.settle(curve[-1])
    state = _STATE_OF[judgement.verdict] if stops else TrialState.COMPLETED
    if state is TrialState.DIVERGED or trainer.best is None:
        return replace(common, state=TrialState.DIVERGED, reason=why(judgement, curve))
    if trainer.best.valid_loss > _LARGEST_LOSS:
        reason = f"its best validation loss is {trainer.best.valid_loss:.3g}, too large for any score"
        return replace(common, state=TrialState.DIVERGED, reason=reason)
    result = _scored(replace(common, state=state, reason=why(judgement, curve) if stops else common.reason), trainer)
    trainer.export()
    return replace(result, checkpoint=str(trainer.folder))


def _scored(result: TrialResult, trainer: Trainer) -> TrialResult:
    """The result with the test scores of the run's best checkpoint."""
    scored = trainer.score()
    assert trainer.best is not None
    return replace(
        result,
        best_evaluation=trainer.best.evaluation,
        best_epoch=trainer.best.epoch,
        best_valid_loss=trainer.best.valid_loss,
        best_valid_score=trainer.best.valid_score,
        num_parameters=trainer.num_parameters,
        micro_batch_size=trainer.micro_batch_size,
        device=device_name(trainer.device),
        scores=scored.scores,
        examples=statistics.pack(scored.examples),
        details=scored.details if trainer.confirmed_loss is None else {**scored.details, WHOLE: trainer.confirmed_loss},
    )


def _progress(trainer: Trainer, point: Point, judgement: Judgement, *, stops: bool) -> Progress:
    rung = trainer.rungs.get(point.evaluation)
    if rung is None:
        return Progress(point=point, judgement=judgement, stops=stops)
    return Progress(
        point=point,
        judgement=judgement,
        stops=stops,
        rung=rung,
        memory=peak_memory(trainer.device),
        micro_batch_size=trainer.micro_batch_size,
    )


def _write_result(folder: Folder, result: TrialResult, curve: list[Progress], origin: str) -> None:
    content = {"origin": origin, "result": result.to_json(), "curve": [progress.to_json() for progress in curve]}
    checkpoints.write_whole(folder / RESULT, json.dumps(content).encode())


def _read_result(folder: Folder, origin: str) -> tuple[TrialResult, list[Progress]] | None:
    text = storage.read(folder / RESULT)
    if text is None:
        return None
    content = json.loads(text)
    if content.get("origin", origin) != origin:
        return None
    return TrialResult.from_json(content["result"]), [Progress.from_json(text) for text in content["curve"]]


def can_use_gpus() -> bool:
    """False in a fork of a process that has used one: CUDA does not survive that."""
    return not torch_internals.is_in_bad_fork()
