"""A study as Optuna's own tables hold it: written behind the search, read when a study is resumed."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
)
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from hpsearch.errors import StoreAwayError, StoreError
from hpsearch.search import optuna_internals
from hpsearch.search.annotations import ARTIFACT, NOTE, Annotations, numbered, study_note
from hpsearch.search.attributes import mirrored
from hpsearch.spec.redaction import hide_secrets
from hpsearch.store.addresses import parse_url
from hpsearch.store.engines import engine_options, guarded, set_limits
from hpsearch.store.fence import fence
from hpsearch.store.schema.tables import storable


class Record:
    """The study as Optuna's own tables hold it. Every write may be done twice; raises StoreAwayError."""

    def __init__(
        self, url: str, name: str, direction: StudyDirection, value_name: str, lease: tuple[int, int] | None
    ) -> None:
        self.storage = open_storage(url)
        if lease is not None:
            fence(self.storage.engine, *lease)
        with away(url):
            self._study = optuna.create_study(
                study_name=name, storage=self.storage, direction=direction, load_if_exists=True
            )
            self._study.set_metric_names([value_name])
            self._study_id = self.storage.get_study_id_from_name(name)
        self._url = url
        self._ids: dict[int, int] = {}

    def history(self) -> list[FrozenTrial]:
        with away(self._url):
            trials = self._study.get_trials(deepcopy=False)
        self._ids = optuna_internals.ids_of(trials)
        return trials

    def widen(self, distributions: dict[str, BaseDistribution]) -> None:
        """Record past trials as drawn from these distributions, which hold all their values: a study was extended."""
        with away(self._url):
            optuna_internals.widen(self.storage, self._study_id, distributions)

    def begin(self, trial: FrozenTrial) -> None:
        with away(self._url):
            try:
                # A commit whose answer was lost has made the trial already.
                trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
            except KeyError:
                template = create_trial(
                    state=OptunaState.RUNNING,
                    params=trial.params,
                    distributions=trial.distributions,
                    system_attrs=mirrored(trial),
                )
                trial_id = self.storage.create_new_trial(self._study_id, template)
            self._ids[trial.number] = trial_id

    def report(self, number: int, step: int, value: float) -> None:
        with away(self._url):
            self.storage.set_trial_intermediate_value(self._ids[number], step, value)

    def reopen(self, number: int) -> None:
        """Optuna lets nobody change a trial that has ended; its tables (of 5.0) do."""
        with away(self._url):
            optuna_internals.reopen(self.storage, self._ids[number])

    def set_attribute(self, number: int, name: str, value: float) -> None:
        # A commit whose answer was lost may have ended the trial already.
        with away(self._url), suppress(optuna.exceptions.UpdateFinishedTrialError):
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
        with away(self._url), suppress(optuna.exceptions.UpdateFinishedTrialError):
            for key, note in storable(notes).items():
                self.storage.set_trial_user_attr(trial_id, key, note)
            for key, attribute in attributes.items():
                self.storage.set_trial_system_attr(trial_id, key, attribute)
            self.storage.set_trial_state_values(trial_id, state, values)

    def annotated(self) -> tuple[set[int], dict[int, set[str]]]:
        with away(self._url):
            attributes = self.storage.get_study_system_attrs(self._study_id)
        artifacts: dict[int, set[str]] = {}
        numbers = self._numbers()
        for _, number, value in numbered(ARTIFACT, attributes, numbers):
            if (there := json.loads(value)) is not None:
                artifacts.setdefault(number, set()).add(there["filename"])
        return {number for _, number, _ in numbered(NOTE, attributes, numbers)}, artifacts

    def _numbers(self) -> dict[int, int]:
        """Numbers of trials by their ids. Another thread may be adding one."""
        return {trial_id: number for number, trial_id in dict(self._ids).items()}

    def annotate(self, annotations: Annotations) -> None:
        with away(self._url):
            there = self.storage.get_study_system_attrs(self._study_id)
            wanted = study_note(there, annotations.study_note, annotations.replaces)
            # A trial that Optuna's tables have lost, as `doctor` would find, has no place for a note.
            for number in annotations.notes.keys() & self._ids.keys():
                key = f"dashboard:{self._ids[number]}:note"
                wanted |= {f"{key}_ver": 1, f"{key}_str:0": annotations.notes[number]}
            wanted |= {f"dashboard:plot_data:{name}:0": content for name, content in annotations.figures.items()}
            for file in annotations.artifacts:
                if file.trial in self._ids:
                    about = {"artifact_id": file.id, "filename": file.name, "mimetype": file.kind, "encoding": None}
                    wanted[f"dashboard:artifacts:{self._ids[file.trial]}:{file.id}"] = json.dumps(about)
            for match, number, _ in numbered(ARTIFACT, there, self._numbers()):
                if number in annotations.without:
                    wanted[match[0]] = "null"
            changed = {key: value for key, value in wanted.items() if there.get(key) != value}
            optuna_internals.write_study_attributes(self.storage, self._study_id, changed)


def away(url: str) -> AbstractContextManager[None]:
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
        with away(url):
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


def open_storage(url: str) -> RDBStorage:
    options = engine_options(parse_url(url))
    # Two first launches into one database can race to make Optuna's tables; the loser finds them at its second try.
    for attempt in range(3):
        try:
            with away(url):
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
