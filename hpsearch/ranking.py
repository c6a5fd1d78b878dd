"""Who is best, by the test metric, and whom validation would have chosen. Imports neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpsearch.store import Row, Store

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """The ranked trials of a study, best test score first."""

    study: str
    task: str
    metric: str
    rows: list[Row]
    states: dict[str, int]

    @property
    def best(self) -> Row | None:
        return self.rows[0] if self.rows else None

    @property
    def validation_choice(self) -> Row | None:
        """The trial that the lowest validation loss would have chosen; it is the winner's rival to look at."""
        return min(self.rows, key=lambda row: (row["valid_loss"], row["trial"]), default=None)

    def to_json(self) -> dict[str, Any]:
        choice = self.validation_choice
        return {
            "schema_version": 1,
            "study": self.study,
            "task": self.task,
            "metric": self.metric,
            "states": self.states,
            "validation_would_choose": choice["trial"] if choice else None,
            "trials": self.rows,
        }


def leaderboard(store: Store, study: str, *, top: int | None = None) -> Leaderboard:
    """The leaderboard of a study; `top` keeps the best so many. Raises UnknownStudyError."""
    row = store.study(study)
    ranked = store.leaderboard(study)
    states: dict[str, int] = {}
    for trial in store.trials(row["id"]):
        states[trial["state"]] = states.get(trial["state"], 0) + 1
    choice = min(ranked, key=lambda entry: (entry["valid_loss"], entry["trial"]), default=None)
    shown = ranked[:top]
    # The rival is always there to be seen, wherever its test score put it.
    if choice is not None and choice not in shown:
        shown = [*shown, choice]
    return Leaderboard(study=study, task=row["task"], metric=row["metric"], rows=shown, states=states)


def frame(board: Leaderboard) -> pd.DataFrame:
    """One row a ranked trial; the sampled settings are columns `param_NAME`."""
    import pandas as pd

    return pd.DataFrame(flat_rows(board))


def flat_rows(board: Leaderboard) -> list[Row]:
    """The rows with `params` spread into `param_NAME`, the same keys in each, all-empty columns left out."""
    names = param_names(board.rows)
    flat = [
        {**{key: value for key, value in row.items() if key not in ("params", "study", "task")}}
        | {f"param_{name}": row["params"].get(name) for name in names}
        for row in board.rows
    ]
    empty = {key for key in (flat[0] if flat else {}) if all(row[key] is None for row in flat)}
    return [{key: value for key, value in row.items() if key not in empty} for row in flat]


def param_names(rows: Sequence[Row]) -> list[str]:
    """Names of all sampled settings, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["params"]))
