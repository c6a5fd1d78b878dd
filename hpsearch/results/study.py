"""A study in a store, as a person reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpsearch.errors import (
    EXIT_FINISHED,
)
from hpsearch.results.leaderboard import Choice, Comparison, Leaderboard, compare, frame, leaderboard
from hpsearch.spec.task import known_task
from hpsearch.store.rows import LeadingTrial, RankedTrial, TrialRow, WholeTrial
from hpsearch.store.store import opened_store

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study in a store, as a person reads it."""

    name: str
    store: str
    exit_code: int = EXIT_FINISHED
    """What the launch that returned it ended in; 0 for a study that was just opened."""
    stop_reason: str | None = None
    """Why the launch ended before the budget was used, if it did."""

    def board(self, *others: str, top: int | None = None, mixed: bool = False) -> Leaderboard:
        """Ranked trials, together with those of other studies in the same store. Raises UsageError."""
        with opened_store(self.store) as store:
            return leaderboard(store, self.name, *others, top=top, mixed=mixed)

    def compare(self, first: int, second: int) -> Comparison:
        """The paired test of two ranked trials. Raises UnknownStudyError, UsageError."""
        with opened_store(self.store) as store:
            return compare(store, self.name, first, second)

    def leaderboard(self, *, top: int | None = None) -> pd.DataFrame:
        """Ranked trials as a frame, best test score first; sampled settings are columns `param_NAME`."""
        return frame(self.board(top=top))

    @property
    def best(self) -> RankedTrial | LeadingTrial | None:
        """The trial with the best test score; while there is none, the one that leads on validation, if any."""
        return self.choose("test")

    def choose(self, by: Choice) -> RankedTrial | LeadingTrial | None:
        """The winner by its test score, or on validation; see `Leaderboard.chosen`."""
        return self.board(top=1).chosen(by)

    def trials(self) -> list[TrialRow]:
        """Every trial in any state, by number."""
        with opened_store(self.store) as store:
            return store.trials(store.study(self.name).id)

    def trial(self, number: int) -> WholeTrial:
        """One trial with its curve, scores, decisions and details. Raises UnknownStudyError."""
        with opened_store(self.store) as store:
            study = store.study(self.name)
            known_task(study.task)  # which knows the digits of its metrics
            return store.whole_trial(store.trial(study, number))
