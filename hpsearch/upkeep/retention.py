"""Where a study's files lie, and which of its checkpoints stay.

What stays: the best checkpoint of the top ranked trials, and whatever a trial that has not ended can resume from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from hpsearch.files import storage
from hpsearch.files.layout import TRIAL, run_folder, trial_folders, trial_of
from hpsearch.files.storage import Folder, locate
from hpsearch.records import RANKED, UNFINISHED, TrialConfig, TrialResult, TrialState
from hpsearch.store.rows import StudyRow
from hpsearch.store.store import Store


def begun(attempts: Iterable[Folder]) -> TrialConfig | None:
    """What the newest of some attempts at a trial was begun with, as its worker has noted it."""
    for folder in attempts:
        if (content := storage.read(folder / TRIAL)) is not None:
            with suppress(ValueError):  # of another version of hpsearch, or cut short
                return TrialConfig.model_validate_json(content)
    return None


class CheckpointKeeper:
    """Collects the checkpoints of a running study that nobody needs any more."""

    def __init__(
        self, store: Store, study: StudyRow, keep: int, run: Folder, *, remove: Callable[[Folder], None]
    ) -> None:
        """Recover the study's checkpoints, and `remove` what a launch that was killed had begun to."""
        self._store = store
        self._remove = remove
        self._metric = study.metric
        self._sign = -1.0 if study.higher_is_better else 1.0
        self._keep = keep
        scores = store.study_scores(study.id)
        rows = {row.number: row for row in store.trials(study.id)}
        self._kept = sorted(
            (
                self._sign * scores[row.number][self._metric].value,
                _valid_merit(row.best_valid_loss, row.best_valid_score),
                row.number,
                row.id,
                row.checkpoint,
            )
            for row in rows.values()
            if row.checkpoint is not None and row.repeat_of is None and row.number in scores
        )
        for _, folder in trial_folders(run):
            number = trial_of(folder)
            row = None if number is None else rows.get(number)
            if row and row.state not in UNFINISHED and str(folder) != row.checkpoint:
                self._remove(folder)
        self._collect_below_the_top()

    def trial_ended(self, row_id: int, number: int, result: TrialResult, run: Folder, *, is_repeat: bool) -> None:
        """Remove what the end of a trial has made needless. Its end is on record by now.

        The finals measure settings that have a checkpoint already: theirs are not kept.
        """
        for _, folder in trial_folders(run, number):
            if str(folder) != result.checkpoint:
                self._remove(folder)
        score = next((score.value for score in result.scores if score.metric == self._metric), None)
        if result.checkpoint is None or score is None:
            return
        if is_repeat:
            self._collect(row_id, result.checkpoint)
            return
        merit = _valid_merit(result.best_valid_loss, result.best_valid_score)
        self._kept = sorted([*self._kept, (self._sign * score, merit, number, row_id, result.checkpoint)])
        self._collect_below_the_top()

    def _collect_below_the_top(self) -> None:
        for *_, old_id, checkpoint in self._kept[self._keep :]:
            self._collect(old_id, checkpoint)
        del self._kept[self._keep :]

    def _collect(self, row_id: int, checkpoint: str) -> None:
        self._store.forget_checkpoint(row_id)
        self._remove(locate(checkpoint))


def _valid_merit(loss: float | None, score: float | None) -> float:
    """What orders trials with equal test scores; lower is better."""
    return -score if score is not None else 0.0 if loss is None else loss


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A folder that nobody needs, and why."""

    folder: Folder
    why: str
    size: int
    """Bytes."""
    row_id: int | None = None
    """Row whose checkpoint it is."""


def find_garbage(store: Store, study: StudyRow, *, keep: int) -> list[Garbage]:
    """What can be removed of a study's files: checkpoints below the top, and folders that no row refers to."""
    rows = {row.number: row for row in store.trials(study.id)}
    top = {row.trial for row in store.leaderboard(study.name, top=keep)}
    found = []
    for _, folder in sorted(
        trial_folders(run_folder(study.placement["folder"], study)), key=lambda found: str(found[1])
    ):
        number = trial_of(folder)
        assert number is not None
        row = rows.get(number)
        state = TrialState(row.state) if row else None
        size = storage.size(folder)
        if row is None or state is None:
            found.append(Garbage(folder=folder, why="no trial of the store has this number", size=size))
        elif state in UNFINISHED:
            continue
        elif str(folder) != row.checkpoint:
            why = f"trial {number} has ended ({state}), and this is not its checkpoint"
            found.append(Garbage(folder=folder, why=why, size=size))
        elif number not in top and row.repeat_of is None and state in RANKED:
            why = f"trial {number} is not among the best {keep}"
            found.append(Garbage(folder=folder, why=why, size=size, row_id=row.id))
    return found


def collect(store: Store, garbage: list[Garbage], *, remove: Callable[[Folder], None]) -> None:
    for piece in garbage:
        if piece.row_id is not None:
            store.forget_checkpoint(piece.row_id)
        remove(piece.folder)
