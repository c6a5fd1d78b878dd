"""What commands read of a store, as records: made here, from rows, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hpsearch.records import Score


@dataclass(frozen=True, kw_only=True)
class LeaseRow:
    """Who drives a study, or was the last to do so."""

    study_id: int
    holder: str
    token: int
    """The fencing token: larger for each that has held the lease."""
    beat: int
    """Beats of the heart since it was taken; negative where nobody holds it."""
    acquired_at: datetime
    heartbeat_at: datetime
    process: dict[str, Any] | None

    @property
    def is_held(self) -> bool:
        """Whether somebody holds it, dead or alive."""
        return self.beat >= 0


@dataclass(frozen=True, kw_only=True)
class NewStudy:
    """What is recorded of a study when it starts."""

    name: str
    task: str
    metric: str
    """The test metric that its trials are ranked by."""
    higher_is_better: bool
    spec: dict[str, Any]
    """`StudySpec.record()`."""
    fingerprint: str
    overrides: list[str]
    budget_trials: int
    data: dict[str, Any]
    """The fields of the DataCard."""
    objective: str
    placement: dict[str, Any]
    """`StudySpec.placement()` of the last launch: where it runs, which is not part of what it is."""


@dataclass(frozen=True, kw_only=True)
class StudyRow(NewStudy):
    """A study of a store."""

    id: int
    created_at: datetime
    uid: str


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """A trial in any state."""

    id: int
    study_id: int
    number: int
    state: str
    """A TrialState."""
    reason: str
    params: dict[str, Any]
    """What the sampler chose."""
    settings: dict[str, Any]
    """All of them: `model` and `training`."""
    seed: int
    attempt: int
    worker_deaths: int
    repeat_of: int | None
    """Of a trial of the finals: the trial whose settings it runs again."""
    started_at: datetime
    ended_at: datetime | None
    device_seconds: float | None
    host: str | None
    device: str | None
    last_epoch: float | None
    best_evaluation: int | None
    best_epoch: float | None
    best_valid_loss: float | None
    """In the task's unit: nats per token, or per text."""
    best_valid_score: float | None
    num_parameters: int | None
    micro_batch_size: int | None
    checkpoint: str | None
    error: str | None
    provenance: dict[str, Any]

    def best_valid(self, objective: str) -> float | None:
        """The best validation value of this kind."""
        return self.best_valid_loss if objective == "loss" else self.best_valid_score


@dataclass(frozen=True, kw_only=True)
class PointRow:
    """An evaluation of a trial. A loss that is no finite number is None."""

    trial_id: int
    evaluation: int
    epoch: float
    step: int
    train_loss: float | None
    valid_loss: float | None
    valid_score: float | None
    learning_rate: float
    tokens: int
    seconds: float

    def valid(self, objective: str) -> float | None:
        """The validation value of this kind."""
        return self.valid_loss if objective == "loss" else self.valid_score


@dataclass(frozen=True, kw_only=True)
class ScoreRow(Score):
    """A test score of a trial, with its 95 % interval."""

    trial_id: int


@dataclass(frozen=True, kw_only=True)
class DecisionRow:
    """What was decided of a trial after an evaluation, and why."""

    id: int
    trial_id: int
    evaluation: int
    verdict: str
    action: str
    evidence: dict[str, Any]
    decided_at: datetime


@dataclass(frozen=True, kw_only=True)
class SpecRow:
    """One of the specs that a study has had."""

    id: int
    study_id: int
    version: int
    spec: dict[str, Any]
    fingerprint: str
    budget_trials: int
    recorded_at: datetime


@dataclass(frozen=True, kw_only=True)
class StateCount:
    """How many trials of a study are in a state, those of finals and the others apart."""

    state: str
    is_repeat: bool
    trials: int


@dataclass(frozen=True, kw_only=True)
class LeadingTrial:
    """A trial that has not ended, with its best validation value so far."""

    trial: int
    state: str
    params: dict[str, Any]
    epoch: float
    """Of that value."""
    value: float


@dataclass(frozen=True, kw_only=True)
class RankedTrial:
    """A trial with a test score, in its place: the columns of `hpsearch_leaderboard`."""

    study: str
    task: str
    test_rank: int
    tie: str = ""
    """Its place as shown: `1`, `1=` of a trial that cannot be told from the winner, `4`."""
    valid_rank: int
    trial: int
    state: str
    metric: str
    score: float
    score_low: float
    score_high: float
    score_n: int
    test_perplexity: float | None
    test_bits_per_byte: float | None
    test_bleu: float | None
    test_f1: float | None
    valid_loss: float | None
    valid_score: float | None
    best_epoch: float | None
    last_epoch: float | None
    num_parameters: int | None
    device_seconds: float | None
    reason: str
    checkpoint: str | None
    params: dict[str, Any]
    p_value: float | None = None
    """Of the paired test against the winner."""


@dataclass(frozen=True, kw_only=True)
class StudySummary(StudyRow):
    """A study with what has become of it."""

    states: dict[str, int]
    """Trials by state."""
    best: RankedTrial | None
    lease: LeaseRow | None


@dataclass(frozen=True, kw_only=True)
class TrialWithCurve(TrialRow):
    """A trial with its evaluations."""

    points: list[PointRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class WholeTrial(TrialWithCurve):
    """Everything that is kept of a trial."""

    scores: list[ScoreRow]
    decisions: list[DecisionRow]
    details: dict[str, Any]
    """What its task kept beside the scores, by kind."""
