"""Optuna decides: it proposes settings, hears each curve, and says keep or stop. Owns Optuna.

The deciding study lives in memory, so that asking costs no SQL; every event is written through to an `RDBStorage` in
the study's own store, which the unmodified `optuna-dashboard` and `optuna.load_study` open, and from which the deciding
study is filled again at the next launch. The driver is the only writer, so the two cannot drift apart: the memory is
ahead of the record by what `write` has not done yet, and each write may be done twice.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from hpsearch.errors import StoreAwayError, StoreError
from hpsearch.pruning.rungs import LEVELS, Rungs
from hpsearch.records import TrialState
from hpsearch.search.samplers import make_sampler
from hpsearch.spec.redaction import hide_secrets
from hpsearch.spec.sections import UnpromisingSpec
from hpsearch.spec.space import Choice, Dimension
from hpsearch.spec.study import StudySpec
from hpsearch.store.addresses import parse_url
from hpsearch.store.engines import engine_options, guarded, set_limits
from hpsearch.store.fence import fence
from hpsearch.store.schema import storable

VALUE_NAMES = {"loss": "validation loss (nats per token)", "bleu": "validation BLEU", "f1": "validation F1"}
_START = "hpsearch:start"
"""System attribute of a trial whose settings a person or an earlier study gave: these settings, as JSON."""
_REPEAT = "hpsearch:repeat_of"
_SEED = "hpsearch:seed"
"""System attributes of a trial of the finals: the trial that it repeats, and its seed."""

OPTUNA_STATE = {
    TrialState.COMPLETED: OptunaState.COMPLETE,
    TrialState.OVERFIT: OptunaState.COMPLETE,
    TrialState.PLATEAU: OptunaState.COMPLETE,
    TrialState.PAUSED: OptunaState.RUNNING,
    TrialState.RUNNING: OptunaState.RUNNING,
    TrialState.UNPROMISING: OptunaState.PRUNED,
    TrialState.DIVERGED: OptunaState.PRUNED,
    TrialState.INFEASIBLE: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
    TrialState.INTERRUPTED: OptunaState.WAITING,
}
"""What the sampler should learn from what happened. An interrupted trial is back in the queue under its own number. An
overfit run is COMPLETE with its best value: its best checkpoint is a valid answer, and told as PRUNED it would rank
behind every complete trial with its last, worst value."""

_MOST_LISTED = 10_000
"""Settings of a space that are looked through for one that was not tried yet."""
_MOST_REJECTED = 20
"""Proposals that are sent back before a setting is chosen at random."""
_NOTE = re.compile(r"dashboard:(\d+):note_ver")
_ARTIFACT = re.compile(r"dashboard:artifacts:(\d+):[0-9a-fA-F-]+")
"""Keys of a study's system attributes that hold what the dashboard shows of a trial, by its id in Optuna's tables."""

_RUNG = "hpsearch:rung:"
"""How the system attributes begin that hold a trial's values at its rungs."""

_MIRRORED_ATTRIBUTES = (_START, _REPEAT, _SEED, "grid_id", "search_space", "completed_rung_")
"""System attributes that a resumed study needs. CMA-ES's pickled optimizer is none of them."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Settings to try next, under their trial number."""

    number: int
    params: dict[str, Any]
    attributes: dict[str, Any]
    """What `adopt` must be given beside them."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file about a trial, in the folder of artifacts under its `id`."""

    trial: int
    name: str
    id: str
    kind: str
    """MIME type."""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What the Optuna dashboard is to show of a study beside its numbers."""

    notes: Mapping[int, str]
    """Markdown, of trials that have none."""
    study_note: str
    replaces: str
    """How a note of the study begins that `study_note` may replace; no other is touched."""
    figures: Mapping[str, str]
    """plotly JSON by id."""
    artifacts: Sequence[Artifact]
    without: Collection[int]
    """Trials whose artifacts are taken off."""


class Search:
    """A study's sampler and cross-trial pruner, with its record in SQL."""

    def __init__(
        self,
        spec: StudySpec,
        store_url: str | None,
        *,
        starts: Sequence[Mapping[str, Any]] = (),
        lease: tuple[int, int] | None = None,
        write: Callable[[Callable[[], None]], None] = lambda write: write(),
    ) -> None:
        """Open the study in the store, taking up what it holds; without a store, decide in memory only.

        `starts` are settings to try first, those that the study has not tried yet; the sampler completes them.
        With a `lease` (study id and fencing token) nothing is written without it. Writes go through `write`, which may
        do them later but does them in order.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._write = write
        self._space = spec.space
        self._settings = list(spec.space.settings(_MOST_LISTED)) if spec.space.size <= _MOST_LISTED else None
        """Every setting that there is, where these are few."""
        self._tried: set[str] = set()
        self._rng = random.Random(f"{spec.seed}.untried")
        direction = StudyDirection.MINIMIZE if spec.objective == "loss" else StudyDirection.MAXIMIZE
        self._record = (
            _Record(store_url, spec.name, direction, VALUE_NAMES[spec.objective], lease) if store_url else None
        )
        if self._record:
            self._record.widen({name: _distribution(there) for name, there in spec.space.dimensions.items()})
        history = self._record.history() if self._record else []
        self.unfinished = [trial.number for trial in history if not trial.state.is_finished()]
        """Trials that Optuna believes to be running or waiting: those that an earlier launch did not end."""
        self._repeats = {trial.number for trial in history if _REPEAT in trial.system_attrs}
        self._sign = 1.0 if spec.objective == "loss" else -1.0
        rule = spec.prune.unpromising
        self._rungs = (
            Rungs(rule.reduction_factor, spec.seed, first=spec.sampler.startup_trials)
            if rule.rule == "promote"
            else None
        )
        self._paused: set[int] = set()
        self._refused: dict[int, str] = {}
        self._brain = optuna.create_study(
            study_name=spec.name,
            storage=_Memory(),
            direction=direction,
            sampler=make_sampler(spec, _seed_after(spec.seed, len(history)), self._expected),
            pruner=_make_pruner(spec.prune.unpromising, spec.max_epochs),
        )
        tried = {trial.system_attrs.get(_START) for trial in history}
        self._starts = deque(start for start in starts if _start_key(start) not in tried)
        for trial in history:
            if trial.state is not OptunaState.FAIL and trial.number not in self._repeats:
                self._tried.add(_key(trial.params))
            self._brain.add_trial(_untold(trial) if trial.number in self._repeats else _running(trial))
            if self._rungs and trial.number not in self._repeats:
                self._climb(self._rungs, trial)

    @property
    def is_exhausted(self) -> bool:
        """True when every setting of the space has been tried."""
        return self._settings is not None and len(self._tried) >= len(self._settings)

    @property
    def size(self) -> int:
        """How many trials there are."""
        return len(self._trials())

    def ask(self) -> Suggestion:
        """Propose settings that were not tried yet, those that were given first; the trial is RUNNING from here on.

        A trial that failed says nothing of its settings: they may be tried again.
        """
        tried = self._tried
        while self._starts:
            number = self._propose(self._starts.popleft())
            if _key(self._trial(number).params) not in tried:
                return self._begin(number)
            self._withdraw(number)
        rejected: set[str] = set()
        while (number := self._propose(None)) is not None:
            key = _key(self._trial(number).params)
            if key not in tried:
                return self._begin(number)
            self._withdraw(number)
            if key in rejected or len(rejected) >= _MOST_REJECTED:
                break  # the sampler insists on it
            rejected.add(key)
        return self._begin(self._propose(self._untried(), is_start=False))

    def _propose(self, given: Mapping[str, Any] | None, *, is_start: bool = True) -> int:
        """Ask for settings, or take those that are given as far as they go; returns the trial's number."""
        if given is not None:
            self._brain.enqueue_trial(dict(given))
        trial = self._brain.ask()
        if given is not None and is_start:
            self._brain._storage.set_trial_system_attr(trial._trial_id, _START, _start_key(given))
        for name, dimension in self._space.dimensions.items():
            if self._space.is_active(name, trial.params):
                _suggest(trial, name, dimension)
        return trial.number

    def _withdraw(self, number: int) -> None:
        """Take back the last proposal, as if it had not been made."""
        storage = self._brain._storage
        assert isinstance(storage, _Memory)
        storage.withdraw(self._trial(number)._trial_id)

    def _untried(self) -> dict[str, Any]:
        """A setting that was not tried yet, at random; of a space that has none left, any."""
        if self._settings is not None:
            left = [setting for setting in self._settings if _key(setting) not in self._tried]
            return dict(self._rng.choice(left or self._settings))
        setting: dict[str, Any] = {}
        for _ in range(_MOST_REJECTED):
            setting = self._space.draw(self._rng)
            if _key(setting) not in self._tried:
                break
        return setting

    def ask_again(self, number: int) -> Suggestion:
        """The settings of an interrupted or paused trial, which runs again under its number."""
        self._tell_record(number, OptunaState.RUNNING, None, {})
        return self.suggestion(number)

    def suggestion(self, number: int) -> Suggestion:
        """The settings of a trial, as they were proposed."""
        return Suggestion(number=number, params=self.params(number), attributes=_mirrored(self._trial(number)))

    def params(self, number: int) -> dict[str, Any]:
        """The settings of a trial."""
        return dict(self._trial(number).params)

    def repeated(self, number: int) -> tuple[int, int] | None:
        """Of a trial of the finals: the trial that it repeats, and its seed."""
        attributes = self._trial(number).system_attrs
        return (attributes[_REPEAT], attributes[_SEED]) if _REPEAT in attributes else None

    def repeat(self, number: int, *, seed: int) -> Suggestion:
        """The settings of a trial once more, on the record but hidden from the sampler: it is no new point."""
        return self._add(self.params(number), {_REPEAT: number, _SEED: seed})

    def adopt(self, params: dict[str, Any], attributes: dict[str, Any]) -> None:
        """Take up a trial as the next one: it was begun, but not on record."""
        self.unfinished.append(self._add(params, attributes).number)

    def _add(self, params: dict[str, Any], attributes: dict[str, Any]) -> Suggestion:
        distributions = {name: _distribution(self._space.dimensions[name]) for name in params}
        running: dict[str, Any] = {"state": OptunaState.RUNNING, "system_attrs": attributes}
        self._brain.add_trial(create_trial(params=params, distributions=distributions, **running))
        suggestion = self._begin(self.size - 1)
        if _REPEAT in attributes:
            self._repeats.add(suggestion.number)
            self._brain._storage.set_trial_state_values(self._trial(suggestion.number)._trial_id, OptunaState.FAIL)
        return suggestion

    def refuse(self, number: int, why: str) -> None:
        """From here on, a trial is on record as failed, whatever it is told. For the thread that writes."""
        self._refused[number] = why

    def report(self, number: int, *, epoch: int, value: float) -> bool:
        """Record the objective at the end of an epoch; True when the trial is unpromising and should stop."""
        if self._record:
            record = self._record
            self._write(lambda: record.report(number, epoch, value))
        if number in self._repeats:
            return False
        self._brain._storage.set_trial_intermediate_value(self._trial(number)._trial_id, epoch, value)
        return bool(self._brain.pruner.prune(self._brain, self._trial(number)))

    def at_rung(self, number: int, rung: int, value: float) -> bool:
        """Record the best objective so far at a rung (see `rungs`); whether the trial goes on or should pause."""
        assert self._rungs is not None
        if self._record:
            record, name = self._record, f"{_RUNG}{rung}"
            self._write(lambda: record.set_attribute(number, name, value))
        self._rungs.reach(number, rung, self._sign * value)
        return self._rungs.goes_on(number)

    def pause(self, number: int) -> None:
        """A trial waits at its rung."""
        self._paused.add(number)

    def promote(self) -> int | None:
        """The trial among those that wait that should go on now, if one should; it waits no more."""
        number = self._rungs.next(self._paused) if self._rungs else None
        self._paused.discard(-1 if number is None else number)
        return number

    def promote_leader(self, *, anyway: bool) -> int | None:
        """Of trials that wait one that leads its rung, or the foremost when one must go on; it waits no more."""
        assert self._rungs is not None
        leading = [number for number in self._paused if anyway or self._rungs.standing(number)[0] == 1]
        if not leading:
            return None
        number = self._rungs.foremost(leading)
        self._paused.discard(number)
        return number

    def resume(self, number: int) -> None:
        """A paused trial goes on, whatever its place."""
        self._paused.discard(number)

    def hindmost(self) -> int:
        """The last among those that wait."""
        assert self._rungs is not None
        return self._rungs.hindmost(self._paused)

    def standing(self, number: int) -> tuple[int, int]:
        """A trial's place at its last rung, counted from 1, and how many trials have reached that."""
        assert self._rungs is not None
        return self._rungs.standing(number)

    def tell(self, number: int, state: TrialState, *, value: float | None, notes: dict[str, Any]) -> None:
        """End a trial, or put it back into the queue when it was interrupted.

        `value` is its best objective; `notes` become attributes that the dashboard shows.
        """
        optuna_state = OPTUNA_STATE[state]
        values: list[float] | None = None
        if optuna_state is OptunaState.COMPLETE:
            assert value is not None
            values = [value]
        elif state is TrialState.UNPROMISING:
            intermediate = self._trial(number).intermediate_values
            values = [intermediate[max(intermediate)]] if intermediate else None if value is None else [value]
        self._paused.discard(number)
        if optuna_state is OptunaState.FAIL:
            self._tried.discard(_key(self._trial(number).params))
        # A trial that failed, or was never promoted, says nothing of how it would have ended.
        if self._rungs and optuna_state.is_finished() and state not in (TrialState.UNPROMISING, TrialState.FAILED):
            self._rungs.end(number, math.inf if value is None else self._sign * value)
        self._tell_record(number, optuna_state, values, notes)
        if number not in self._repeats and optuna_state.is_finished():
            self._brain._storage.set_trial_state_values(self._trial(number)._trial_id, optuna_state, values)

    def reopen(self, number: int) -> None:
        """Put a trial that failed back into the queue of Optuna's tables. Raises StoreAwayError."""
        if self._record:
            self._record.reopen(number)

    def annotated(self) -> tuple[set[int], dict[int, set[str]]]:
        """Trials that have a note in the dashboard, and the names of the artifacts that trials have."""
        return self._record.annotated() if self._record else (set(), {})

    def annotate(self, annotations: Annotations) -> None:
        """Write what the dashboard shows beside the numbers, in one transaction. Raises StoreAwayError."""
        if self._record:
            self._record.annotate(annotations)

    def _tell_record(self, number: int, state: OptunaState, values: list[float] | None, notes: dict[str, Any]) -> None:
        if self._record:
            record = self._record
            rungs = {key: rung for key, rung in _mirrored(self._trial(number)).items() if key.startswith("completed_")}

            def write() -> None:
                if (why := self._refused.get(number)) is not None:
                    record.tell(number, OptunaState.FAIL, None, {"outcome": TrialState.FAILED.value, "why": why}, {})
                else:
                    record.tell(number, state, values, notes, rungs)

            self._write(write)

    def close(self) -> None:
        """Give the connections to the store back."""
        if self._record:
            self._record.storage.remove_session()
            self._record.storage.engine.dispose()

    def _climb(self, rungs: Rungs, trial: FrozenTrial) -> None:
        """Take up what the record says of a trial's rungs."""
        for rung in range(LEVELS):
            if (value := trial.system_attrs.get(f"{_RUNG}{rung}")) is not None:
                rungs.reach(trial.number, rung, self._sign * value)
        if trial.state is OptunaState.COMPLETE and trial.value is not None:
            rungs.end(trial.number, self._sign * trial.value)
        elif trial.state is OptunaState.PRUNED and trial.value is None:
            rungs.end(trial.number, math.inf)

    def _expected(self, trial: FrozenTrial) -> float | None:
        """What a trial that has been paused, and perhaps never promoted, would come to."""
        was_left = trial.state is OptunaState.PRUNED and trial.value is not None
        if self._rungs is None or not (was_left or trial.number in self._paused):
            return None
        value = self._rungs.expected(trial.number)
        return None if value is None else self._sign * value

    def _begin(self, number: int) -> Suggestion:
        trial = self._trial(number)
        self._tried.add(_key(trial.params))
        if self._record:
            record, template = self._record, copy.deepcopy(trial)
            self._write(lambda: record.begin(template))
        return self.suggestion(number)

    def _trials(self) -> list[FrozenTrial]:
        return self._brain.get_trials(deepcopy=False)

    def _trial(self, number: int) -> FrozenTrial:
        return self._trials()[number]


class _Memory(InMemoryStorage):
    """The trials that the sampler sees. The last one can be taken back, as it cannot in Optuna's own (5.0)."""

    def withdraw(self, trial_id: int) -> None:
        with self._lock:
            study_id, number = self._trial_id_to_study_id_and_number.pop(trial_id)
            trials = self._studies[study_id].trials
            assert number == len(trials) - 1
            trials.pop()
            self._max_trial_id -= 1


class _Record:
    """The study as Optuna's own tables hold it. Every write may be done twice; raises StoreAwayError."""

    def __init__(
        self, url: str, name: str, direction: StudyDirection, value_name: str, lease: tuple[int, int] | None
    ) -> None:
        self.storage = open_storage(url)
        if lease is not None:
            fence(self.storage.engine, *lease)
        with _away(url):
            self._study = optuna.create_study(
                study_name=name, storage=self.storage, direction=direction, load_if_exists=True
            )
            self._study.set_metric_names([value_name])
        self._url = url
        self._ids: dict[int, int] = {}

    def history(self) -> list[FrozenTrial]:
        with _away(self._url):
            trials = self._study.get_trials(deepcopy=False)
        self._ids = {trial.number: trial._trial_id for trial in trials}
        return trials

    def widen(self, distributions: dict[str, BaseDistribution]) -> None:
        """Record past trials as drawn from these distributions, which hold all their values: a study was extended."""
        with _away(self._url), self._session() as session:
            rows: Any = (
                session.query(models.TrialParamModel)
                .join(models.TrialModel)
                .filter(models.TrialModel.study_id == self._study._study_id)
            )
            for name, distribution in distributions.items():
                wanted = distribution_to_json(distribution)
                of_name = models.TrialParamModel.param_name == name
                for row in rows.filter(of_name, models.TrialParamModel.distribution_json != wanted):
                    value = json_to_distribution(row.distribution_json).to_external_repr(row.param_value)
                    row.param_value = distribution.to_internal_repr(value)
                    row.distribution_json = wanted
            session.commit()

    @contextmanager
    def _session(self) -> Iterator[Any]:
        """A session that is given back whatever happens: a later one would find the error of this."""
        try:
            yield self.storage.scoped_session()
        finally:
            self.storage.remove_session()

    def begin(self, trial: FrozenTrial) -> None:
        with _away(self._url):
            study_id = self._study._study_id
            try:
                # A commit whose answer was lost has made the trial already.
                trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
            except KeyError:
                template = create_trial(
                    state=OptunaState.RUNNING,
                    params=trial.params,
                    distributions=trial.distributions,
                    system_attrs=_mirrored(trial),
                )
                trial_id = self.storage.create_new_trial(study_id, template)
            self._ids[trial.number] = trial_id

    def report(self, number: int, epoch: int, value: float) -> None:
        with _away(self._url):
            self.storage.set_trial_intermediate_value(self._ids[number], epoch, value)

    def reopen(self, number: int) -> None:
        """Optuna lets nobody change a trial that has ended; its tables (of 5.0) do."""
        with _away(self._url):
            session = self.storage.scoped_session()
            row: Any = models.TrialModel
            changed = {"state": OptunaState.WAITING, "datetime_complete": None}
            session.query(row).filter(row.trial_id == self._ids[number]).update(changed, synchronize_session=False)
            session.commit()
            self.storage.remove_session()

    def set_attribute(self, number: int, name: str, value: float) -> None:
        # A commit whose answer was lost may have ended the trial already.
        with _away(self._url), suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_system_attr(self._ids[number], name, value)

    def tell(
        self,
        number: int,
        state: OptunaState,
        values: list[float] | None,
        notes: dict[str, Any],
        attributes: dict[str, Any],
    ) -> None:
        trial_id = self._ids[number]
        # A commit whose answer was lost has ended the trial already.
        with _away(self._url), suppress(optuna.exceptions.UpdateFinishedTrialError):
            for key, note in storable(notes).items():
                self.storage.set_trial_user_attr(trial_id, key, note)
            for key, attribute in attributes.items():
                self.storage.set_trial_system_attr(trial_id, key, attribute)
            self.storage.set_trial_state_values(trial_id, state, values)

    def annotated(self) -> tuple[set[int], dict[int, set[str]]]:
        with _away(self._url):
            attributes = self.storage.get_study_system_attrs(self._study._study_id)
        artifacts: dict[int, set[str]] = {}
        numbers = self._numbers()
        for _, number, value in _numbered(_ARTIFACT, attributes, numbers):
            if (there := json.loads(value)) is not None:
                artifacts.setdefault(number, set()).add(there["filename"])
        return {number for _, number, _ in _numbered(_NOTE, attributes, numbers)}, artifacts

    def _numbers(self) -> dict[int, int]:
        """Numbers of trials by their ids. Another thread may be adding one."""
        return {trial_id: number for number, trial_id in dict(self._ids).items()}

    def annotate(self, annotations: Annotations) -> None:
        with _away(self._url):
            there = self.storage.get_study_system_attrs(self._study._study_id)
            wanted = _study_note(there, annotations.study_note, annotations.replaces)
            # A trial that Optuna's tables have lost, as `doctor` would find, has no place for a note.
            for number in annotations.notes.keys() & self._ids.keys():
                key = f"dashboard:{self._ids[number]}:note"
                wanted |= {f"{key}_ver": 1, f"{key}_str:0": annotations.notes[number]}
            wanted |= {f"dashboard:plot_data:{name}:0": content for name, content in annotations.figures.items()}
            for file in annotations.artifacts:
                if file.trial in self._ids:
                    about = {"artifact_id": file.id, "filename": file.name, "mimetype": file.kind, "encoding": None}
                    wanted[f"dashboard:artifacts:{self._ids[file.trial]}:{file.id}"] = json.dumps(about)
            for match, number, _ in _numbered(_ARTIFACT, there, self._numbers()):
                if number in annotations.without:
                    wanted[match[0]] = "null"
            self._write_attributes({key: value for key, value in wanted.items() if there.get(key) != value})

    def _write_attributes(self, attributes: Mapping[str, Any]) -> None:
        """In one transaction: Optuna and its dashboard commit each piece, and a reader can see half a figure."""
        row: Any = models.StudySystemAttributeModel
        study_id = self._study._study_id
        with self._session() as session:
            known = session.query(row).filter(row.study_id == study_id, row.key.in_(attributes))
            rows = {found.key: found for found in known}
            for key, value in storable(attributes).items():
                if key in rows:
                    rows[key].value_json = json.dumps(value)
                else:
                    session.add(row(study_id=study_id, key=key, value_json=json.dumps(value)))
            session.commit()


def _study_note(there: Mapping[str, Any], note: str, replaces: str) -> dict[str, Any]:
    """The attributes that make this the study's note, unless a person has written another."""
    keys = [key for place in range(len(there)) if (key := f"dashboard:note_str:{place}") in there]
    written = "".join(there[key] for key in keys)
    if written == note or (written and not written.startswith(replaces)):
        return {}
    version = int(there.get("dashboard:note_ver", 0)) + 1
    return {**dict.fromkeys(keys, ""), "dashboard:note_ver": version, "dashboard:note_str:0": note}


def _away(url: str) -> AbstractContextManager[None]:
    return guarded(url, optuna.exceptions.StorageInternalError)


@dataclass(frozen=True, kw_only=True)
class RecordedTrial:
    """A trial as Optuna's tables have it."""

    state: str
    value: float | None
    params: dict[str, Any]


def recorded_trials(url: str, study: str) -> dict[int, RecordedTrial]:
    """Trials by number of a study in Optuna's tables; empty when Optuna does not know it. Raises StoreAwayError."""
    storage = open_storage(url)
    try:
        with _away(url):
            try:
                found = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
            except KeyError:
                return {}
            return {
                trial.number: RecordedTrial(
                    state=trial.state.name,
                    value=trial.value if trial.state is OptunaState.COMPLETE else None,
                    params=trial.params,
                )
                for trial in found
            }
    finally:
        storage.remove_session()
        storage.engine.dispose()


def importances(url: str, study: str) -> dict[str, float] | None:
    """How much each sampled setting explains of what sets good trials apart; None where nothing can be computed.

    PED-ANOVA (Watanabe, Bansal & Hutter, PED-ANOVA, IJCAI 2023), over trials that finished; repeats of the finals are
    left out.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _away(url):
        storage = open_storage(url)
        try:
            found = optuna.load_study(study_name=study, storage=storage)
            direction, trials = found.direction, found.get_trials(deepcopy=False, states=[OptunaState.COMPLETE])
        except KeyError:
            return None
        finally:
            storage.remove_session()
            storage.engine.dispose()
    copied = optuna.create_study(direction=direction)
    copied.add_trials([trial for trial in trials if _REPEAT not in trial.system_attrs])
    with warnings.catch_warnings():
        # Optuna would call all settings equally important.
        warnings.filterwarnings("error", message="The number of trials is too small")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return optuna.importance.get_param_importances(copied, evaluator=evaluator)
        except (ValueError, RuntimeError, UserWarning):  # too few trials, or none that differ
            return None


def artifact_not_found(artifact: str) -> Exception:
    """What Optuna's dashboard hears of an artifact that is not there any more."""
    return optuna.artifacts.exceptions.ArtifactNotFound(artifact)


def first_suggestions(spec: StudySpec, count: int, starts: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The settings that a new study would try first, without touching a store."""
    search = Search(spec, None, starts=starts)
    suggestions: list[dict[str, Any]] = []
    while len(suggestions) < count and not search.is_exhausted:
        suggestion = search.ask()
        suggestions.append(suggestion.params)
    return suggestions


def _numbered(pattern: re.Pattern[str], attributes: Mapping[str, Any], numbers: Mapping[int, int]) -> Iterator[Any]:
    """Matches of the keys that name one of these trials, with its number and the attribute."""
    for key, value in attributes.items():
        match = pattern.fullmatch(key)
        if match and int(match[1]) in numbers:
            yield match, numbers[int(match[1])], value


def open_storage(url: str) -> RDBStorage:
    options = engine_options(parse_url(url))
    # Two first launches into one database can race to make Optuna's tables; the loser finds them at its second try.
    for attempt in range(3):
        try:
            with _away(url):
                storage = RDBStorage(url, engine_kwargs=options)
            break
        except StoreAwayError:
            if attempt == 2 or not url.startswith("sqlite"):
                raise
        except Exception as error:
            if attempt == 2:
                raise StoreError(
                    f"Optuna cannot use the store {hide_secrets(url)}: {hide_secrets(str(error))}"
                ) from error
        time.sleep(0.5 * (attempt + 1))
    set_limits(storage.engine)
    return storage


def _seed_after(seed: int, trials: int) -> int:
    """The study's seed, or one of its own for a study that goes on after so many trials."""
    return seed if trials == 0 else int(np.random.SeedSequence([seed, trials]).generate_state(1)[0])


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if dimension.integer:
        low, high = int(dimension.low), int(dimension.high)
        return IntDistribution(low, high, log=dimension.log, step=int(dimension.step or 1))
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def _suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> None:
    if isinstance(dimension, Choice):
        trial.suggest_categorical(name, dimension.values)
    elif dimension.integer:
        trial.suggest_int(
            name, int(dimension.low), int(dimension.high), step=int(dimension.step or 1), log=dimension.log
        )
    else:
        trial.suggest_float(name, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def _key(params: Mapping[str, Any]) -> str:
    """Equal for equal settings."""
    return json.dumps(params, sort_keys=True)


def _start_key(start: Mapping[str, Any]) -> str:
    return json.dumps(start, sort_keys=True)


def _make_pruner(spec: UnpromisingSpec, max_epochs: int) -> optuna.pruners.BasePruner:
    # Optuna warms up while step < n_warmup_steps, and our steps are epochs counted from 1.
    warmup = 1 + (math.ceil(max_epochs / 5) if spec.warmup_epochs is None else spec.warmup_epochs)
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "promote": optuna.pruners.NopPruner,
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(spec.startup_trials, warmup),
        "percentile": lambda: optuna.pruners.PercentilePruner(spec.percentile, spec.startup_trials, warmup),
        "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=spec.min_epochs, reduction_factor=spec.reduction_factor
        ),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(
            min_resource=spec.min_epochs,
            max_resource=max(max_epochs, spec.min_epochs),
            reduction_factor=spec.reduction_factor,
        ),
    }
    return pruners[spec.rule]()


def _mirrored(trial: FrozenTrial) -> dict[str, Any]:
    return {key: value for key, value in trial.system_attrs.items() if key.startswith(_MIRRORED_ATTRIBUTES)}


def _running(trial: FrozenTrial) -> FrozenTrial:
    """What the sampler sees of a trial that waits for its next attempt: one whose answer is to come."""
    if trial.state is not OptunaState.WAITING:
        return trial
    running = copy.copy(trial)
    running.state = OptunaState.RUNNING
    running.datetime_start = running.datetime_start or datetime.now()
    return running


def _untold(trial: FrozenTrial) -> FrozenTrial:
    """What the sampler sees of a trial of the finals: a failed one, which it learns nothing from."""
    return create_trial(
        state=OptunaState.FAIL, params=trial.params, distributions=trial.distributions, system_attrs=trial.system_attrs
    )
