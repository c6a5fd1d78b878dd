"""The words of the field that cross rooms: what a trial is asked to run, what it reports, how it ends."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import Field

from hpsearch.pruning.overfitting import Evidence, Judgement, Verdict
from hpsearch.spec.sections import OverfitRule
from hpsearch.spec.settings import ModelSettings, RunSettings, Strict


class TrialState(StrEnum):
    """What happened to a trial. Optuna's state, which says what the sampler should learn, is in `search`."""

    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    OVERFIT = "overfit"
    PLATEAU = "plateau"
    UNPROMISING = "unpromising"
    DIVERGED = "diverged"
    INFEASIBLE = "infeasible"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


LIVE = frozenset({TrialState.RUNNING, TrialState.PAUSED})
UNFINISHED = LIVE | {TrialState.INTERRUPTED}
"""Trials that run, are paused or are queued."""
RANKED = frozenset({TrialState.COMPLETED, TrialState.OVERFIT, TrialState.PLATEAU})
"""Trials that ended with a checkpoint worth scoring on the test split."""
STOPPED = frozenset({TrialState.PAUSED, TrialState.INTERRUPTED})
"""Trials that have not ended, and are ranked by their best checkpoint so far once the study was stopped."""
PRUNED = frozenset({TrialState.OVERFIT, TrialState.PLATEAU, TrialState.UNPROMISING, TrialState.DIVERGED})
"""What a person reads as "pruned", each with its reason."""
PREEMPTED = "preempted"
"""How the reason begins when a trial was interrupted by no fault of its own."""


class Decision(StrEnum):
    """What search answers to a point."""

    CONTINUE = "continue"
    PAUSE = "pause"
    """Leave the device to others; the checkpoint of this point is written."""
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a run. It has no field for a test score: search cannot see one."""

    evaluation: int
    """Counted from 1."""
    epoch: float
    """Epochs trained so far; whole at the end of an epoch."""
    step: int
    """Optimizer steps taken so far."""
    train_loss: float
    """Mean since the last evaluation, in nats per token, with dropout on."""
    valid_loss: float
    """Mean over the whole validation split, in nats per token."""
    learning_rate: float
    tokens: int
    """Training tokens seen so far."""
    seconds: float
    """Device-seconds spent so far, evaluation included."""
    valid_score: float | None = None
    """BLEU or F1 of the validation split, at the ends of epochs of a study that searches for it."""

    @property
    def ends_epoch(self) -> bool:
        return self.epoch == int(self.epoch)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A point and the verdict on the curve up to it."""

    point: Point
    judgement: Judgement
    stops: bool
    """True when the worker ends the run at this verdict: the next thing it sends is its result."""
    rung: int | None = None
    """The rung that the run has reached with this point. It can be resumed from here later."""
    memory: dict[str, int] = field(default_factory=dict)
    """At a rung: what the run has taken of a GPU so far, as in the provenance of a result."""
    micro_batch_size: int | None = None
    """At a rung."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Progress:
        content = json.loads(text)
        judgement = content["judgement"]
        return cls(
            point=Point(**content["point"]),
            judgement=Judgement(verdict=Verdict(judgement["verdict"]), evidence=Evidence(**judgement["evidence"])),
            stops=content["stops"],
            rung=content["rung"],
            memory=content["memory"],
            micro_batch_size=content["micro_batch_size"],
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """One test metric with its 95 % interval and everything that makes it comparable."""

    metric: str
    value: float
    low: float
    high: float
    n: int
    """Test documents or examples behind the value."""
    contract: dict[str, Any] = field(default_factory=dict)
    """Two scores may be compared only when their contracts are equal."""


WHOLE = "whole_validation_loss"
"""Detail of a trial: the loss of its best checkpoint on all of the validation split, where its curve is of a part."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a trial ended, as its worker saw it."""

    state: TrialState
    reason: str
    best_evaluation: int | None = None
    best_epoch: float | None = None
    best_valid_loss: float | None = None
    best_valid_score: float | None = None
    """Of a study whose objective is a score."""
    scores: tuple[Score, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """What the task keeps beside its scores, by kind: `samples`, `outputs`, `confusion`, `predictions`."""
    examples: bytes | None = None
    """What each test example adds to the scores, as `statistics.pack` writes it: for paired tests."""
    num_parameters: int | None = None
    micro_batch_size: int | None = None
    device: str | None = None
    host: str | None = None
    seconds: float = 0.0
    """Device-seconds, test scoring and earlier attempts included, as far as they count in the curve."""
    checkpoint: str | None = None
    error: str | None = None
    """Traceback of a trial that failed."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions and thread count that the numbers depend on."""
    lost_files: bool = False
    """Of a trial that failed because the system could not read or write a file: it may be able to later."""
    needed_bytes: int | None = None
    """Of a trial that was interrupted because the disk is full: how much did not fit."""

    def to_json(self) -> str:
        examples = None if self.examples is None else base64.b64encode(self.examples).decode()
        return json.dumps({**asdict(self), "examples": examples})

    @classmethod
    def from_json(cls, text: str) -> TrialResult:
        content = json.loads(text)
        scores = tuple(Score(**score) for score in content.get("scores", ()))
        examples = None if content["examples"] is None else base64.b64decode(content["examples"])
        return cls(**{**content, "state": TrialState(content["state"]), "scores": scores, "examples": examples})


class TrialConfig(Strict):
    """Everything a worker needs to run one trial. Travels as JSON; holds no secret and no handle."""

    study: str
    study_uid: str = ""
    """What tells the study from every other, of the same name in another store, too."""
    number: int
    task: str
    seed: int
    params: dict[str, Any]
    """What the sampler chose."""
    attributes: dict[str, Any] | None = None
    """What the sampler must know of its choice when the trial is recovered from its folder."""
    repeat_of: int | None = None
    """Of a trial of the finals: the trial whose settings it runs again."""
    objective: str = "loss"
    model: ModelSettings
    training: RunSettings
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the task."""
    rule: OverfitRule | None
    """None when overfitting does not prune."""
    data: str
    """Folder of the tokenized data."""
    folder: str
    """Folder of this attempt's files; no other attempt writes there."""
    attempt: int = 1
    earlier: tuple[str, ...] = ()
    """Folders of earlier attempts, to resume from."""
    recorded: int = 0
    """Evaluations of earlier attempts that the driver knows."""
    rungs: tuple[float, ...] = ()
    """Parts of the run at which it may be paused, in order."""
    finish_in_s: float | None = None
    """Seconds of wall time after which the run must have come to its end: its schedule is shortened if need be."""
    scores_only: bool = False
    """Train nothing: score the best checkpoint of the earlier attempts on the test split."""
    max_minutes: float | None = None
    stall_minutes: float | None = None
    threads: int
    device_share: float | None = None
    """The part of a GPU's memory that the trial may take, where others are on the same."""
    device: str = "auto"
    """auto: the GPU given to this process if there is one."""

    @property
    def origin(self) -> str:
        """What the trial's files carry: those of another trial are not taken for its own."""
        return f"{self.study_uid}/{self.number}"


@dataclass(frozen=True, kw_only=True)
class StudyOpened:
    """A launch has its study, its data and its backend, and begins."""

    kind: ClassVar = "study"
    name: str
    store: str
    """Its URL without secrets."""
    where: str
    """The backend, in words."""
    budget: int
    finished: int
    """Trials that earlier launches have finished."""
    resumed: int
    """Trials that wait to be resumed."""
    data: dict[str, Any]
    """The fields of the DataCard."""


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial runs, for the first time or again."""

    kind: ClassVar = "trial_started"
    trial: int
    params: dict[str, Any]
    epochs: int
    repeat_of: int | None
    attempt: int


@dataclass(frozen=True, kw_only=True)
class PointReported:
    """A trial has been evaluated."""

    kind: ClassVar = "point"
    trial: int
    point: Point
    verdict: str
    epochs: int


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial has ended, has paused, or is back in the queue: see the state of its result."""

    kind: ClassVar = "trial_ended"
    trial: int
    result: TrialResult
    last_epoch: float | None
    epochs: int
    params: dict[str, Any]
    metric: str
    """That trials are ranked by."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something that a person should know, in a sentence."""

    kind: ClassVar = "note"
    text: str


@dataclass(frozen=True, kw_only=True)
class DataProgress:
    """How far a stage of preparing the study's data is."""

    kind: ClassVar = "data"
    stage: str
    done: int
    """Bytes of text."""
    total: int
    """Bytes in all; 0 when they are not known before the end."""
    seconds: float
    """Since the stage began."""

    @property
    def seconds_left(self) -> float | None:
        return self.seconds * (self.total - self.done) / self.done if self.total > self.done > 0 else None


Event = DataProgress | StudyOpened | TrialStarted | PointReported | TrialEnded | Note
"""What a person watching wants to know."""


Listener = Callable[[Event], None]
