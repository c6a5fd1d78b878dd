"""Holds a store to its invariants, and repairs what can be repaired without a guess.

Each trial has one state and one end; curves are whole and in order; Optuna's state follows from ours; nothing belongs
to nobody; nobody holds a lease without being alive; the ranking is that of the scores.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from hpsearch.errors import StudyBusyError, UsageError
from hpsearch.files.layout import earlier_attempts, run_folder
from hpsearch.files.storage import locate
from hpsearch.records import LIVE, RANKED, STOPPED, UNFINISHED, TrialState
from hpsearch.search.record import RecordedTrial, recorded_trials
from hpsearch.search.study import OPTUNA_STATE, Search
from hpsearch.spec.study import StudySpec, recorded_study
from hpsearch.store import leases
from hpsearch.store.leases import owner_of
from hpsearch.store.rows import LeaseRow, PointRow, StudyRow, TrialRow
from hpsearch.store.store import Store
from hpsearch.training import checkpoints
from hpsearch.upkeep.retention import collect, find_garbage

WATCH_S = 3 * leases.BEAT_S
"""How long a lease whose holder cannot be seen is watched for a beat."""
_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that should not be."""

    study: str
    trial: int | None = None
    problem: str
    remedy: str
    """What `--repair` does, or what a person can do."""
    can_repair: bool = False
    repaired: bool = False


@dataclass
class _Study:
    row: StudyRow
    trials: list[TrialRow]
    curves: dict[int, list[PointRow]]
    recorded: dict[int, RecordedTrial]
    is_running: bool
    repairs: list[Callable[[], None]] = field(default_factory=list)

    def found(self, problem: str, *, trial: int | None = None, repair: str | None = None) -> Finding:
        """A finding; `repair` says what `--repair` would do."""
        remedy = repair or "needs a person: see `hpsearch show`"
        return Finding(study=self.row.name, trial=trial, problem=problem, remedy=remedy, can_repair=repair is not None)


def examine(store: Store, *, only: str | None = None, repair: bool = False) -> list[Finding]:
    """Everything that is wrong with a store, or with one study of it; with `repair`, repaired as far as is safe.

    Raises UnknownStudyError, StudyBusyError when a driver takes a study while it is being repaired, RunFolderError when
    the store is a copy and the files are the original's.
    """
    names = [only] if only is not None else [row.name for row in store.studies()]
    found: list[Finding] = []
    for name in names:
        row = store.study(name)
        lease = store.lease(row.id)
        is_held = leases.is_held(lease)
        is_dead = is_held and lease is not None and leases.is_dead(store, lease, watch_s=WATCH_S)
        study = _Study(
            row=row,
            trials=store.trials(row.id),
            curves=store.study_points(row.id),
            recorded=recorded_trials(store.url, name),
            is_running=is_held and not is_dead,
        )
        here = list(_findings(store, study, lease if is_dead else None))
        if repair and any(finding.can_repair for finding in here):
            try:
                spec = recorded_study(row.spec, row.placement, store.url, trials=row.budget_trials)
            except (
                ValueError,
                UsageError,
            ) as error:  # its task is not here: the other studies are repaired all the same
                here.append(study.found(f"cannot be repaired here: {error}"))
            else:
                _repair(store, study, spec)
                here = [_repaired(finding) for finding in here]
        found += here
    if only is None and (orphans := store.orphans(remove=repair)):
        text = ", ".join(f"{count} in {table}" for table, count in orphans.items())
        finding = Finding(study="", problem=f"rows that belong to nothing: {text}", remedy="remove", can_repair=True)
        found.append(_repaired(finding) if repair else finding)
    return found


def _findings(store: Store, study: _Study, dead_lease: LeaseRow | None) -> Iterator[Finding]:
    if dead_lease is not None:
        yield study.found(f"its lease is held by {dead_lease.holder}, which is dead", repair="release it")
    for row in study.trials:
        number, state = row.number, TrialState(row.state)
        for problem in (*_wrong_state(row), *_wrong_curve(study, row)):
            yield study.found(problem, trial=number)
        if state not in LIVE:
            yield from _against_optuna(study, row, state)
        elif not study.is_running and state is not TrialState.PAUSED:
            yield study.found("is running, and no driver holds the study", trial=number, repair="back to the queue")
        yield from _wrong_files(study, row, state)
    if not study.is_running:
        for number in sorted(study.recorded.keys() - {row.number for row in study.trials}):
            there = study.recorded[number].state
            if there != "WAITING":  # a trial whose driver died at once is in the queue like this
                repair = "back to the queue" if there == "RUNNING" else None
                yield study.found("is in Optuna's tables and not in ours", trial=number, repair=repair)
        if study.row.placement is not None:
            for piece in find_garbage(store, study.row, keep=len(study.trials) + 1):
                yield study.found(f"{piece.folder}: {piece.why}", repair="remove it")
    yield from _wrong_ranking(store, study)


def _wrong_state(row: TrialRow) -> Iterator[str]:
    has_ended = row.state not in UNFINISHED
    if has_ended != (row.ended_at is not None):
        yield f"is {row.state}, " + ("but has no time of its end" if has_ended else "but has an end")


def _wrong_curve(study: _Study, row: TrialRow) -> Iterator[str]:
    points = study.curves.get(row.id, [])
    if [point.evaluation for point in points] != list(range(1, len(points) + 1)):
        yield f"its curve has gaps: {len(points)} points, the last is evaluation {points[-1].evaluation}"
    if any(later.step <= earlier.step for earlier, later in pairwise(points)):
        yield "the steps of its curve do not rise"
    if row.state not in RANKED:
        return
    objective = study.row.objective
    kind, best = ("loss", min) if objective == "loss" else ("score", max)
    told = row.best_valid(objective)
    there = [value for point in points if (value := point.valid(objective)) is not None]
    if there and (told is None or not math.isclose(told, best(there), rel_tol=_TOLERANCE)):
        yield f"its best valid {kind} is said to be {told}, and is {best(there)} in its curve"


def _against_optuna(study: _Study, row: TrialRow, state: TrialState) -> Iterator[Finding]:
    number = row.number
    there, wanted = study.recorded.get(number), OPTUNA_STATE[state].name
    if there is None:
        yield study.found("is not in Optuna's tables", trial=number)
    elif there.state != wanted:
        is_open = there.state in ("RUNNING", "WAITING")
        if not (study.is_running and is_open):  # its driver may be about to tell
            problem = f"is {state}, and {there.state} for Optuna, which should have {wanted}"
            yield study.found(problem, trial=number, repair="tell Optuna" if is_open else None)
    elif there.params != row.params:
        yield study.found(f"ran {row.params}, and Optuna has {there.params}", trial=number)
    elif wanted == "COMPLETE":
        value = row.best_valid(study.row.objective)
        if there.value is None or value is None or not math.isclose(there.value, value, rel_tol=_TOLERANCE):
            yield study.found(f"its value is {value}, and {there.value} for Optuna", trial=number)


def _wrong_files(study: _Study, row: TrialRow, state: TrialState) -> Iterator[Finding]:
    number = row.number
    if row.checkpoint is not None and not (locate(row.checkpoint) / "config.json").is_file():
        yield study.found(f"its checkpoint {row.checkpoint} is gone", trial=number)
    if state not in (TrialState.INTERRUPTED, TrialState.PAUSED) or study.is_running or study.row.placement is None:
        return
    folder = run_folder(study.row.placement["folder"], study.row)
    for place in earlier_attempts(folder, number, row.attempt + 1):
        for name in (*checkpoints.names(place, "resume"), *checkpoints.names(place, "best")):
            if not checkpoints.is_whole(place / name):
                study.repairs.append((place / name).unlink)
                yield study.found(f"{place / name} is damaged", trial=number, repair="remove it")


def _wrong_ranking(store: Store, study: _Study) -> Iterator[Finding]:
    metric = study.row.metric
    scores = store.study_scores(study.row.id)
    ranked = [row.number for row in study.trials if row.state in RANKED and row.repeat_of is None]
    for number in ranked:
        if metric not in scores.get(number, {}):
            yield study.found(f"has no test {metric}", trial=number)
    sign = -1.0 if study.row.higher_is_better else 1.0
    # A trial that was stopped is ranked when its best checkpoint was scored.
    stopped = [row.number for row in study.trials if row.state in STOPPED and row.repeat_of is None]
    numbers = [number for number in (*ranked, *stopped) if metric in scores.get(number, {})]
    values = {number: sign * scores[number][metric].value for number in numbers}
    ordered = sorted(values.values())
    wanted = {number: 1 + bisect_left(ordered, value) for number, value in values.items()}
    if {row.trial: row.test_rank for row in store.leaderboard(study.row.name)} != wanted:
        yield study.found("its leaderboard does not follow from its scores")


def _repair(store: Store, study: _Study, spec: StudySpec) -> None:
    """Do what the next launch would do first, and remove what nobody needs. Raises StudyBusyError."""
    if study.is_running:
        raise StudyBusyError(f"study '{study.row.name}' is running; repair it when its launch has ended")
    row = study.row
    with leases.hold(store, row, lambda text: None) as lease:
        owner = owner_of(store, row, lease.token)
        owner.claim(run_folder(row.placement["folder"], row))
        for trial in study.trials:
            if TrialState(trial.state) is TrialState.RUNNING:
                store.requeue_trial(trial.id, "its driver died")
        search = Search(spec, store.url, lease=(row.id, lease.token))
        states = {trial.number: trial for trial in store.trials(row.id)}
        for number in search.unfinished:
            known = states.get(number)
            state = TrialState(known.state) if known else TrialState.INTERRUPTED
            value = known.best_valid(row.objective) if known else None
            search.tell(number, state, value=value, notes={"outcome": state.value})
        search.close()
        collect(store, find_garbage(store, row, keep=len(study.trials) + 1), remove=owner.remove)
        for repair in study.repairs:
            repair()


def _repaired(finding: Finding) -> Finding:
    return Finding(**{**finding.__dict__, "repaired": finding.can_repair})
