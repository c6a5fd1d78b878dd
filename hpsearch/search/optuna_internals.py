"""Private parts of Optuna, each with the version it was read from."""

from __future__ import annotations

from optuna.storages import InMemoryStorage


class RetractableStorage(InMemoryStorage):
    """The trials that the sampler sees. The last one can be taken back, as it cannot in Optuna's own (5.0)."""

    def withdraw(self, trial_id: int) -> None:
        with self._lock:
            study_id, number = self._trial_id_to_study_id_and_number.pop(trial_id)
            trials = self._studies[study_id].trials
            assert number == len(trials) - 1
            trials.pop()
            self._max_trial_id -= 1
