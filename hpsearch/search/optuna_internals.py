"""Private parts of Optuna, each with the version it was read from. `tests/unit/test_internals.py` asks for their shape.

- `InMemoryStorage` (5.0): its lock and its lists of trials, to take a proposal back.
- `storages._rdb.models` (5.0): the tables of `RDBStorage`, for what its methods refuse to write.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from hpsearch.store.schema.tables import storable

View = Callable[[list[FrozenTrial]], list[FrozenTrial]]


class SearchStorage(InMemoryStorage):
    """The trials of a search. Samplers can be shown others than there are, and the last proposal can be taken back."""

    def __init__(self) -> None:
        super().__init__()
        self._view: View | None = None

    @contextmanager
    def seen_as(self, view: View) -> Iterator[None]:
        """While this lasts, everybody who asks for the trials is given what the view makes of them."""
        self._view = view
        try:
            yield
        finally:
            self._view = None

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[OptunaState] | None = None
    ) -> list[FrozenTrial]:
        if self._view is None:
            return super().get_all_trials(study_id, deepcopy=deepcopy, states=states)
        trials = self._view(super().get_all_trials(study_id, deepcopy=False))
        chosen = trials if states is None else [trial for trial in trials if trial.state in states]
        return copy.deepcopy(chosen) if deepcopy else chosen

    def withdraw(self, trial_id: int) -> None:
        """Take back the newest trial, as if it had not been asked for."""
        with self._lock:
            study_id, number = self._trial_id_to_study_id_and_number.pop(trial_id)
            trials = self._studies[study_id].trials
            assert number == len(trials) - 1
            trials.pop()
            self._max_trial_id -= 1


class SearchStudy(optuna.Study):
    """A study whose sampler may say that it has nothing more to try (GridSampler does), which `ask` finds by itself."""

    def stop(self) -> None:
        """Optuna's own raises an error outside of `optimize`."""


def ids_of(trials: Iterable[FrozenTrial]) -> dict[int, int]:
    """Ids of trials in their storage, by number."""
    return {trial.number: trial._trial_id for trial in trials}


@contextmanager
def session(storage: RDBStorage) -> Iterator[Any]:
    """A session that is given back whatever happens: a later one would find the error of this."""
    try:
        yield storage.scoped_session()
    finally:
        storage.remove_session()


def widen(storage: RDBStorage, study_id: int, distributions: Mapping[str, BaseDistribution]) -> None:
    """Record past trials as drawn from these distributions, which hold all their values: a study was extended."""
    with session(storage) as opened:
        rows: Any = (
            opened.query(models.TrialParamModel).join(models.TrialModel).filter(models.TrialModel.study_id == study_id)
        )
        for name, distribution in distributions.items():
            wanted = distribution_to_json(distribution)
            of_name = models.TrialParamModel.param_name == name
            for row in rows.filter(of_name, models.TrialParamModel.distribution_json != wanted):
                value = json_to_distribution(row.distribution_json).to_external_repr(row.param_value)
                row.param_value = distribution.to_internal_repr(value)
                row.distribution_json = wanted
        opened.commit()


def reopen(storage: RDBStorage, trial_id: int) -> None:
    """Put a trial that has ended back into the queue."""
    row: Any = models.TrialModel
    with session(storage) as opened:
        changed = {"state": OptunaState.WAITING, "datetime_complete": None}
        opened.query(row).filter(row.trial_id == trial_id).update(changed, synchronize_session=False)
        opened.commit()


def write_study_attributes(storage: RDBStorage, study_id: int, attributes: Mapping[str, Any]) -> None:
    """In one transaction: Optuna and its dashboard commit each piece, and a reader can see half a figure."""
    row: Any = models.StudySystemAttributeModel
    with session(storage) as opened:
        known = opened.query(row).filter(row.study_id == study_id, row.key.in_(attributes))
        rows = {found.key: found for found in known}
        for key, value in storable(attributes).items():
            if key in rows:
                rows[key].value_json = json.dumps(value)
            else:
                opened.add(row(study_id=study_id, key=key, value_json=json.dumps(value)))
        opened.commit()
