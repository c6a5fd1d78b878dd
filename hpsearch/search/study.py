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
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from hpsearch.pruning.rungs import LEVELS, Rungs
from hpsearch.records import TrialState
from hpsearch.search.annotations import Annotations
from hpsearch.search.attributes import REPEAT, RUNG, SEED, START, as_running, as_untold, mirrored
from hpsearch.search.distributions import distribution_of, suggest
from hpsearch.search.optuna_internals import SearchStorage, SearchStudy
from hpsearch.search.pruners import make_pruner
from hpsearch.search.record import Record
from hpsearch.search.samplers import make_sampler
from hpsearch.spec.study import StudySpec

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


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Settings to try next, under their trial number."""

    number: int
    params: dict[str, Any]
    attributes: dict[str, Any]
    """What `adopt` must be given beside them."""


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
        names = {"loss": f"loss ({spec.definition.loss_unit})", "bleu": "BLEU", "f1": "F1"}
        value_name = f"validation {names.get(spec.objective, spec.objective)}"
        self._record = Record(store_url, spec.name, direction, value_name, lease) if store_url else None
        if self._record:
            self._record.widen({name: distribution_of(there) for name, there in spec.space.dimensions.items()})
        history = self._record.history() if self._record else []
        self.unfinished = [trial.number for trial in history if not trial.state.is_finished()]
        """Trials that Optuna believes to be running or waiting: those that an earlier launch did not end."""
        self._repeats = {trial.number for trial in history if REPEAT in trial.system_attrs}
        self._sign = 1.0 if spec.objective == "loss" else -1.0
        rule = spec.prune.unpromising
        self._rungs = (
            Rungs(rule.reduction_factor, spec.seed, first=spec.sampler.startup_trials)
            if rule.rule == "promote"
            else None
        )
        self._paused: set[int] = set()
        self._refused: dict[int, str] = {}
        self._memory = SearchStorage()
        optuna.create_study(study_name=spec.name, storage=self._memory, direction=direction)
        self._brain = SearchStudy(
            spec.name,
            self._memory,
            sampler=make_sampler(spec, _seed_after(spec.seed, len(history)), self._memory, self._expected),
            pruner=make_pruner(spec.prune.unpromising, spec.max_epochs, spec.evaluations_per_epoch),
        )
        self._study_id = self._memory.get_study_id_from_name(spec.name)
        tried = {trial.system_attrs.get(START) for trial in history}
        self._starts = deque(start for start in starts if _start_key(start) not in tried)
        for trial in history:
            if trial.state is not OptunaState.FAIL and trial.number not in self._repeats:
                self._tried.add(_key(trial.params))
            self._brain.add_trial(as_untold(trial) if trial.number in self._repeats else as_running(trial))
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
            self._memory.set_trial_system_attr(self._id(trial.number), START, _start_key(given))
        for name, dimension in self._space.dimensions.items():
            if self._space.is_active(name, trial.params):
                suggest(trial, name, dimension)
        return trial.number

    def _withdraw(self, number: int) -> None:
        """Take back the last proposal, as if it had not been made."""
        self._memory.withdraw(self._id(number))

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
        return Suggestion(number=number, params=self.params(number), attributes=mirrored(self._trial(number)))

    def params(self, number: int) -> dict[str, Any]:
        """The settings of a trial."""
        return dict(self._trial(number).params)

    def repeated(self, number: int) -> tuple[int, int] | None:
        """Of a trial of the finals: the trial that it repeats, and its seed."""
        attributes = self._trial(number).system_attrs
        return (attributes[REPEAT], attributes[SEED]) if REPEAT in attributes else None

    def repeat(self, number: int, *, seed: int) -> Suggestion:
        """The settings of a trial once more; recorded, but hidden from the sampler, to which it is not a new point."""
        return self._add(self.params(number), {REPEAT: number, SEED: seed})

    def adopt(self, params: dict[str, Any], attributes: dict[str, Any]) -> None:
        """Record a trial that was begun but is not on record; it becomes the next one."""
        self.unfinished.append(self._add(params, attributes).number)

    def _add(self, params: dict[str, Any], attributes: dict[str, Any]) -> Suggestion:
        distributions = {name: distribution_of(self._space.dimensions[name]) for name in params}
        running: dict[str, Any] = {"state": OptunaState.RUNNING, "system_attrs": attributes}
        self._brain.add_trial(create_trial(params=params, distributions=distributions, **running))
        suggestion = self._begin(self.size - 1)
        if REPEAT in attributes:
            self._repeats.add(suggestion.number)
            self._memory.set_trial_state_values(self._id(suggestion.number), OptunaState.FAIL)
        return suggestion

    def refuse(self, number: int, why: str) -> None:
        """From here on, a trial is on record as failed, whatever it is told. For the thread that writes."""
        self._refused[number] = why

    def report(self, number: int, *, step: int, value: float) -> bool:
        """Record the objective at an evaluation; True when the trial is unpromising and should stop.

        Steps count the evaluations that a run has in an epoch, so that equal steps are equal parts of equal runs.
        """
        if self._record:
            record = self._record
            self._write(lambda: record.report(number, step, value))
        if number in self._repeats:
            return False
        self._memory.set_trial_intermediate_value(self._id(number), step, value)
        return bool(self._brain.pruner.prune(self._brain, self._trial(number)))

    def at_rung(self, number: int, rung: int, value: float) -> bool:
        """Record the best objective so far at a rung (see `rungs`); False when the trial should pause."""
        assert self._rungs is not None
        if self._record:
            record, name = self._record, f"{RUNG}{rung}"
            self._write(lambda: record.set_attribute(number, name, value))
        self._rungs.reach(number, rung, self._sign * value)
        return self._rungs.is_promoted(number)

    def pause(self, number: int) -> None:
        """Note that a trial is paused at its rung."""
        self._paused.add(number)

    def promote(self) -> int | None:
        """Pop the paused trial to promote now, if there is one."""
        number = self._rungs.next(self._paused) if self._rungs else None
        self._paused.discard(-1 if number is None else number)
        return number

    def promote_leader(self, *, anyway: bool) -> int | None:
        """Pop a paused trial that leads its rung; with `anyway`, the best one."""
        assert self._rungs is not None
        leading = [number for number in self._paused if anyway or self._rungs.standing(number)[0] == 1]
        if not leading:
            return None
        number = self._rungs.leading(leading)
        self._paused.discard(number)
        return number

    def resume(self, number: int) -> None:
        """Note that a paused trial runs again, whatever its rank."""
        self._paused.discard(number)

    def worst(self) -> int:
        """The worst paused trial."""
        assert self._rungs is not None
        return self._rungs.worst(self._paused)

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
            # What `Study.tell` does, but a pruned trial without a value stays without one.
            self._brain.sampler.after_trial(self._brain, self._trial(number), optuna_state, values)
            self._memory.set_trial_state_values(self._id(number), optuna_state, values)

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
            rungs = {key: rung for key, rung in mirrored(self._trial(number)).items() if key.startswith("completed_")}

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
        """Restore what the record says of a trial's rungs."""
        for rung in range(LEVELS):
            if (value := trial.system_attrs.get(f"{RUNG}{rung}")) is not None:
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

    def _id(self, number: int) -> int:
        return self._memory.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _trials(self) -> list[FrozenTrial]:
        return self._brain.get_trials(deepcopy=False)

    def _trial(self, number: int) -> FrozenTrial:
        return self._trials()[number]


def first_suggestions(spec: StudySpec, count: int, starts: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The settings that a new study would try first, without touching a store."""
    search = Search(spec, None, starts=starts)
    suggestions: list[dict[str, Any]] = []
    while len(suggestions) < count and not search.is_exhausted:
        suggestion = search.ask()
        suggestions.append(suggestion.params)
    return suggestions


def _seed_after(seed: int, trials: int) -> int:
    """The study's seed, or another one for a study that is resumed after this many trials."""
    return seed if trials == 0 else int(np.random.SeedSequence([seed, trials]).generate_state(1)[0])


def _key(params: Mapping[str, Any]) -> str:
    """Equal for equal settings."""
    return json.dumps(params, sort_keys=True)


def _start_key(start: Mapping[str, Any]) -> str:
    return json.dumps(start, sort_keys=True)
