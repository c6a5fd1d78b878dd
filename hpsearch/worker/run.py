"""One trial, in whichever process the backend chose: task, trainer and the verdict on the run's own curve.

The overfitting verdict is taken here, with no round trip to the driver: the run stops, its best checkpoint is scored
on the test split, and its device is free at once. What the trial has come to is in its folder before it is told, so
that nothing is lost with a driver that does not hear it.

A trial on several devices has a process for each. This one, the first, reports and decides; the others `follow`.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import platform
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import transformers

import hpsearch
from hpsearch.errors import DiskFullError, LeaseLostError, UsageError
from hpsearch.files import storage
from hpsearch.files.storage import Folder, locate
from hpsearch.files.trial_log import LOGGER, log_file, trial_log
from hpsearch.metrics import statistics
from hpsearch.pruning.overfitting import Judgement, Verdict, judge
from hpsearch.records import (
    LAST_WORDS,
    PREEMPTED,
    PULSE_EVERY_S,
    PULSE_FILE,
    RESULT,
    STOP_FILE,
    TRIAL,
    Point,
    Progress,
    TrialConfig,
    TrialResult,
    TrialState,
    judgement_dict,
)
from hpsearch.spec.sections import OverfitRule
from hpsearch.tasks import build_task
from hpsearch.training import checkpoints
from hpsearch.training.devices import describe_cpu, device_name, peak_memory, pick_device, use_memory
from hpsearch.training.ranks import Ranks, join, lead
from hpsearch.training.trainer import (
    Order,
    OutOfMemoryError,
    PreemptedError,
    SmallerMicroBatchError,
    Trainer,
    seed_everything,
)

_STATE_OF = {
    Verdict.OVERFITTING: TrialState.OVERFIT,
    Verdict.PLATEAU: TrialState.PLATEAU,
    Verdict.DIVERGING: TrialState.DIVERGED,
}
_LARGEST_LOSS = 700.0
"""In nats: a perplexity of more is no floating-point number."""
_ROOM_TO_BEGIN = 1_000_000
"""Bytes that a trial waits for that could not even make its folder."""
_LOOK_EVERY_S = 0.25
"""Seconds between two looks for a request to stop."""
_LOOK_AFAR_EVERY_S = 5.0
"""The same where each look is a request to an object store."""
_NEWS_S = 5.0
"""A process that loses another hears of it from the network before the backend knows which one it was and why."""
_SILENCE = timedelta(minutes=30)
"""What the processes of a trial wait for each other at most, unless `limits.stall_minutes` says less."""


class Team(Protocol):
    """The other processes of a trial on several devices, as the backend knows them."""

    size: int
    """This process counted."""
    host: str
    """The address that they reach this process at."""

    def start(self, config: TrialConfig, address: str) -> None:
        """Make each of them `follow`."""

    def lost(self, wait_s: float = 0.0) -> str | None:
        """What is known of one that ended before its time; None while there is none."""

    def end(self, *, is_done: bool) -> None:
        """Wait for those that are done, or end those that are not."""


class ProcessLostError(Exception):
    """Another process of the trial died; the trial goes on from its checkpoint with new ones."""


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
        watch = _Watch(config, folder, own_process, team.size if team else 1)
        storage.write(folder / TRIAL, config.model_dump_json().encode())
    except DiskFullError as error:
        return TrialResult(state=TrialState.INTERRUPTED, reason=str(error), needed_bytes=error.needed)
    except OSError as error:
        if error.errno not in storage.FULL:
            raise
        return TrialResult(state=TrialState.INTERRUPTED, reason=f"no room in {folder}", needed_bytes=_ROOM_TO_BEGIN)
    log = trial_log(log_file(folder.parent, config.number), config.attempt, own_process=own_process)
    with watch, log:
        LOGGER.info("attempt %d begins", config.attempt, extra={"facts": {"params": config.params, **_where()}})
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


def _score_best(config: TrialConfig, watch: _Watch) -> TrialResult:
    """Test scores of the best checkpoint that earlier attempts have left of a trial that has not ended."""
    trainer = watch.trainer = _trainer(config, Ranks(), watch.pulse)
    unfinished = TrialResult(state=TrialState.INTERRUPTED, reason="has no checkpoint to be scored yet")
    if not trainer.recover_best() or trainer.best is None or trainer.best.valid_loss > _LARGEST_LOSS:
        return unfinished
    last = trainer.curve[-1]
    reason = f"scored as it was at epoch {last.epoch:.4g} of {config.training.num_epochs}"
    return _scored(replace(unfinished, reason=reason), trainer)


def export_unfinished(config: TrialConfig, place: Path) -> None:
    """Write the best model that the earlier attempts at a trial have left into a folder. Raises UsageError."""
    trainer = _trainer(config, Ranks(), lambda: Order.GO_ON)
    if not trainer.recover_best():
        raise UsageError(f"trial {config.number} has written no checkpoint yet")
    trainer.restore_best()
    trainer.write_model(place)


def follow(config: TrialConfig, address: str, *, rank: int, size: int, host: str) -> str:
    """Be one of the other processes of a trial; returns why the trial must begin again, or nothing when it is over."""
    asked = Order.GO_ON

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = Order.PREEMPT

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        with join(address, rank=rank, size=size, host=host, timeout=_patience(config)) as ranks:
            time_left = None if config.finish_in_s is None else (lambda: math.inf)  # the first process's counts
            trainer = _trainer(config, ranks, lambda: asked, time_left)
            for _ in trainer.points():
                pass
            trainer.follow()
    except PreemptedError:
        return ""
    except SmallerMicroBatchError as error:
        return f"{PREEMPTED}: {error}"
    finally:
        signal.signal(signal.SIGTERM, before)
    return ""


def can_use_gpus() -> bool:
    """False in a fork of a process that has used one: CUDA does not survive that."""
    return not torch.cuda._is_in_bad_fork()


def first_cause(words: Sequence[str]) -> str | None:
    """Of what is known of processes that ended, what explains the others' ends; None when all ended well."""
    return min(filter(None, words), key=lambda said: "Connection" in said, default=None)


def _run(
    config: TrialConfig, watch: _Watch, progress: list[Progress], team: Team | None
) -> Generator[Progress, None, TrialResult]:
    with _together(config, team, watch) as ranks:
        trainer = watch.trainer = _trainer(config, ranks, watch.pulse, watch.time_left)
        try:
            result = yield from _train(config, trainer, progress)
        except GeneratorExit:
            trainer.dismiss()
            raise
        trainer.dismiss()
        return result


def _trainer(
    config: TrialConfig, ranks: Ranks, pulse: Callable[[], Order], time_left: Callable[[], float] | None = None
) -> Trainer:
    torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    device = pick_device(config.device)
    use_memory(device, config.device_share)
    task = build_task(config.model_copy(update={"data": str(storage.cached(locate(config.data)))}))
    if ranks.rank:
        torch.manual_seed(config.seed + ranks.rank)  # equal weights, but not equal dropout
    return Trainer(
        task,
        config.training,
        seed=config.seed,
        device=device,
        folder=locate(config.folder),
        objective=config.objective,
        earlier=[locate(place) for place in config.earlier],
        origin=config.origin,
        rungs=config.rungs,
        pulse=pulse,
        time_left=time_left,
        ranks=ranks,
    )


@contextmanager
def _together(config: TrialConfig, team: Team | None, watch: _Watch) -> Iterator[Ranks]:
    """The processes of a trial, found and in the end dismissed."""
    if team is None:
        yield Ranks()
        return
    is_done = False
    guard = _Guard(team, watch)

    def call(address: str) -> None:
        team.start(config, address)
        if watch.own_process:
            guard.start()  # those that do not even come would be waited for

    try:
        with lead(team.host, team.size, call, timeout=_patience(config)) as ranks:
            try:
                yield ranks
                is_done = True
            except GeneratorExit:
                is_done = True
                raise
            except RuntimeError as error:  # what lost connections raise
                if lost := team.lost(_NEWS_S):
                    raise ProcessLostError(lost) from error
                raise
    finally:
        guard.stopped.set()
        team.end(is_done=is_done)


def _patience(config: TrialConfig) -> timedelta:
    return timedelta(minutes=config.stall_minutes) if config.stall_minutes is not None else _SILENCE


class _Guard(threading.Thread):
    """Ends this process when it waits in vain, deep in a library, for another one that died."""

    def __init__(self, team: Team, watch: _Watch) -> None:
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self._team = team
        self._watch = watch

    def run(self) -> None:
        while not self.stopped.wait(1.0):
            lost = self._team.lost()
            # Often the network has told the main thread, which then says it better.
            if lost is not None and not self.stopped.wait(2 * _NEWS_S):
                self._watch.say(lost)
                os._exit(1)


def _train(config: TrialConfig, trainer: Trainer, progress: list[Progress]) -> Generator[Progress, None, TrialResult]:
    # Without the overfitting rule a run is still ended when its loss is no number any more.
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
                decay_to_come=trainer.decay_to_come(point.step),
            )
            stops = judgement.stops and (config.rule is not None or _is_broken(judgement))
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
        reason=_end(config, curve),
        judgement=judgement_dict(judgement),
        num_parameters=trainer.num_parameters,
        micro_batch_size=trainer.micro_batch_size,
        device=device_name(trainer.device),
        provenance={"precision": trainer.precision},
    )
    trainer.settle(curve[-1])
    state = _STATE_OF[judgement.verdict] if stops else TrialState.COMPLETED
    if state is TrialState.DIVERGED or trainer.best is None:
        return replace(common, state=TrialState.DIVERGED, reason=_why(judgement, curve))
    if trainer.best.valid_loss > _LARGEST_LOSS:
        reason = f"its best validation loss is {trainer.best.valid_loss:.3g}, too large for any score"
        return replace(common, state=TrialState.DIVERGED, reason=reason)
    result = _scored(replace(common, state=state, reason=_why(judgement, curve) if stops else common.reason), trainer)
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
        details=scored.details,
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


def _where() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


class _Watch:
    """Tells a run when to stop, and ends the process of one that hangs."""

    def __init__(self, config: TrialConfig, folder: Folder, own_process: bool, processes: int) -> None:
        self.trainer: Trainer | None = None
        self._processes = processes
        self._config = config
        self._stop_file = folder / STOP_FILE
        self._last_words_file = folder / LAST_WORDS
        self._pulse_file = folder / PULSE_FILE
        self._touched = -math.inf
        self.own_process = own_process
        self._is_remote = storage.is_remote(folder)
        storage.make(folder)
        # A process that crashes cannot write to an object store: there, its stack is in Ray's log on its node.
        own = self._last_words_file if isinstance(self._last_words_file, Path) else None
        self._last_words = own.open("w") if own else os.fdopen(os.dup(2), "w")
        self._began = self._looked = time.monotonic()
        self._asked = Order.GO_ON
        self._had_sigterm = False

    @property
    def time_left(self) -> Callable[[], float] | None:
        """Tells the seconds of wall time that the run has, if it must have come to its end by a certain time."""
        finish_in_s = self._config.finish_in_s
        return None if finish_in_s is None else lambda: self._began + finish_in_s - time.monotonic()

    @property
    def seconds(self) -> float:
        """Device-seconds of the whole trial, as far as they are known."""
        return self.trainer.seconds if self.trainer else self._processes * (time.monotonic() - self._began)

    def __enter__(self) -> _Watch:
        if self.own_process:
            # A crash in native code says where it was.
            faulthandler.enable(self._last_words)
        if threading.current_thread() is threading.main_thread() and self.own_process:
            self._before: Any = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._arm()
        if self.own_process or self._is_remote:
            self._beat()
        return self

    def __exit__(self, *_: object) -> None:
        if self.own_process or self._is_remote:
            with suppress(Exception):
                self._pulse_file.unlink(missing_ok=True)
        if self.own_process:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self._before)
        self._last_words.close()

    def leave(self) -> str:
        """Say why the run left before its end."""
        if not self._had_sigterm and self._asked is Order.PREEMPT:
            return "asked to stop"
        reason = f"{PREEMPTED} by SIGTERM" if self._had_sigterm else f"{PREEMPTED} with one of its processes"
        self.say(reason)
        return reason

    def say(self, words: str) -> None:
        """Leave word of why this process will not be there any more."""
        if self._is_remote:
            storage.write(self._last_words_file, words.encode())
        self._last_words.write(words)
        self._last_words.flush()

    def pulse(self) -> Order:
        """Called while the run is alive; answers what is asked of it."""
        now = time.monotonic()
        if now - self._looked < (_LOOK_AFAR_EVERY_S if self._is_remote else _LOOK_EVERY_S):
            return self._asked
        self._looked = now
        self._arm()
        if self.own_process and now - self._touched > PULSE_EVERY_S:
            self._touched = now
            if isinstance(self._pulse_file, Path):
                with suppress(OSError):
                    os.utime(self._pulse_file)
            else:
                self._beat()
        if self._asked is Order.GO_ON and self._is_asked_to_stop():
            self._asked = Order.PREEMPT
        limit = self._config.max_minutes
        if self._asked is Order.GO_ON and limit is not None and self.seconds > 60 * limit * self._processes:
            self._asked = Order.TIME_UP
        if self._asked is Order.GO_ON and self.time_left is not None and self.time_left() <= 0:
            self._asked = Order.TIME_UP
        return self._asked

    def _beat(self) -> None:
        # A full disk, or an object store that is away, is noticed where it matters.
        with suppress(Exception):
            self._pulse_file.write_text(json.dumps(_where()))

    def _is_asked_to_stop(self) -> bool:
        with suppress(Exception):
            return self._stop_file.exists()
        return False

    def _arm(self) -> None:
        if self.own_process and self._config.stall_minutes is not None:
            faulthandler.dump_traceback_later(60 * self._config.stall_minutes, exit=True, file=self._last_words)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._asked = Order.PREEMPT
        self._had_sigterm = True


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


def _end(config: TrialConfig, curve: list[Point]) -> str:
    epochs = config.training.num_epochs
    if curve[-1].epoch < epochs and config.finish_in_s is not None:
        return f"brought to its end at epoch {curve[-1].epoch:.2f} of {epochs}, as the study's time ran out"
    if curve[-1].epoch >= epochs or config.max_minutes is None:
        return f"ran its {epochs} epochs"
    return f"stopped after max_minutes ({config.max_minutes:g}) at epoch {curve[-1].epoch:.2f} of {epochs}"


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
