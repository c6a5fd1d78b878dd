"""What the Optuna dashboard, unmodified, shows of a study beyond its numbers: notes, figures and artifacts.

A running study keeps them fresh, at a cost that is bounded: at most every EVERY_S seconds and SHARE of one core, in one
transaction each time. A note that a person has written is left alone.
"""

from __future__ import annotations

import io
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from hpsearch.errors import StoreAwayError, plain
from hpsearch.files import storage
from hpsearch.files.layout import run_folder
from hpsearch.files.storage import Folder, locate
from hpsearch.files.trial_log import log_file
from hpsearch.records import PRUNED, RANKED, UNFINISHED, Event, PointReported, TrialEnded
from hpsearch.reports.figures import FIGURES
from hpsearch.reports.study_data import StudyData, read_study
from hpsearch.reports.text import (
    curve_plot,
    leaderboard_markdown,
    leaderboard_notes,
    markdown,
    short,
    trial_commands,
    trial_facts,
)
from hpsearch.search.annotations import Annotations, Artifact, artifact_not_found
from hpsearch.search.study import Search
from hpsearch.store.rows import StudyRow, TrialRow, WholeTrial
from hpsearch.store.store import Store

EVERY_S = 20.0
"""Seconds between two looks at a study, at least."""
SHARE = 0.05
"""Of a core, at most."""
_LEAVE_S = 2.0
"""What the thread gets to end; a store that hangs keeps nobody."""
_TOP = 10
"""Rows of the leaderboard in a study's note."""
_FIGURES = ("curves", "leaderboard")
_FIGURE_BYTES = 100_000
"""The dashboard fetches a study's figures with each of its updates."""
_STUDY_NOTE = "## Leaderboard\n"
"""How a study's note begins that is ours to replace."""
_NAMESPACE = uuid.UUID("5e1d3c5a-8d0f-4e6b-9a55-6d1c5f7f3a10")


def artifact_folder(folder: str) -> Folder:
    """Where the artifacts of all studies below a run folder lie, named by their ids; the dashboard's --artifact-dir."""
    return locate(folder) / "artifacts"


def trial_note(study: StudyRow, trial: WholeTrial) -> str:
    """Markdown on a trial that has ended: verdict, evidence, scores, curve, and commands for the next steps.

    `trial` has its `points`, `scores` and `decisions`.
    """
    (_, outcome), *facts = trial_facts(trial)
    state, colon, why = outcome.partition(":")
    lines = [f"**{state}**{colon}{markdown(why)}", "", "| | |", "| --- | --- |"]
    if trial.state in PRUNED and trial.decisions:
        evidence = trial.decisions[-1].evidence
        facts.append(("evidence", ", ".join(f"{key} {short(it)}" for key, it in evidence.items() if it is not None)))
    lines += [*(f"| {name} | {markdown(value)} |" for name, value in facts), ""]
    if trial.points:
        lines += [*_code(curve_plot(trial.points, width=78, best=trial.best_evaluation)), ""]
    commands = trial_commands(study, trial)
    return "\n".join([*lines, *(line for what, command in commands for line in (f"{what}:", "", *_code(command), ""))])


def study_note(data: StudyData) -> str:
    """Markdown on a study: its leaderboard so far and what is to be said of it."""
    board = data.board
    top = replace(board, rows=board.rows[:_TOP])
    table = [leaderboard_markdown(top), ""] if top.rows else []
    said = [f"- {markdown(line)}" for line in leaderboard_notes(board)]
    if board.best is not None:
        said += ["", "The winner's model, as a folder that transformers loads:", ""]
        said += _code(f"hpsearch export {shlex.quote(data.name)}")
    return "\n".join([_STUDY_NOTE, *table, *said])


def figures(data: StudyData) -> dict[str, str]:
    """Figures of a study as plotly JSON, by an id for the dashboard; those that have nothing to show are left out."""
    found = {}
    for name in _FIGURES:
        drawn = FIGURES[name](data)
        if drawn is None or drawn.figure is None or not drawn.figure.data:
            continue
        figure = drawn.figure
        figure.update_layout(title={"text": f"{drawn.title} ({drawn.n})"}, margin={"t": 60}, height=None)
        content = figure.to_json()
        if len(content) > _FIGURE_BYTES:
            figure.data = [trace for trace in figure.data if trace.hoverinfo != "skip"]
            content = figure.to_json()
        found[f"hpsearch-{name}"] = content
    return found


def model_card(study: StudyRow, trial: WholeTrial) -> str:
    """Markdown that says what the checkpoint of a trial is, and how to load it."""
    data = study.data or {}
    settings = {**trial.settings["model"], **trial.settings["training"]}
    facts = [
        ("task", study.task),
        ("parameters", f"{trial.num_parameters:,}" if trial.num_parameters else "unknown"),
        ("data", ", ".join(f"{name} {value}" for name, value in data.items() if isinstance(value, str))),
        ("settings", ", ".join(f"{name}={short(it)}" for name, it in settings.items() if it not in (None, {}))),
        ("checkpoint", trial.checkpoint),
    ]
    title = f"# Trial {trial.number} of {markdown(study.name)}"
    rows = [f"| {name} | {markdown(value)} |" for name, value in facts]
    return "\n".join([title, "", trial_note(study, trial), "", "| | |", "| --- | --- |", *rows, ""])


class StudyArtifacts:
    """The artifacts of all studies of a store, as Optuna's dashboard reads them; their folders may differ.

    What a person uploads goes to the first study's folder. See `optuna.artifacts`.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def open_reader(self, artifact_id: str) -> BinaryIO:
        return io.BytesIO(self._find(artifact_id)[1])

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        folder = self._folders()[0]
        storage.make(folder)
        storage.write(folder / artifact_id, content_body.read())

    def remove(self, artifact_id: str) -> None:
        storage.unlink(self._find(artifact_id)[0])

    def _find(self, artifact_id: str) -> tuple[Folder, bytes]:
        for folder in self._folders():
            if (content := storage.read(folder / artifact_id)) is not None:
                return folder / artifact_id, content
        raise artifact_not_found(artifact_id)

    def _folders(self) -> list[Folder]:
        store = Store(self._url)
        try:
            placements = [study.placement for study in store.studies()]
        finally:
            store.close()
        return [artifact_folder(name) for name in dict.fromkeys(there["folder"] for there in placements if there)]


def samples(details: dict[str, Any]) -> str | None:
    """Decoded samples of a trial beside their references, as text; None where the task has none."""
    parts = [
        "\n".join(f"{name:<10} {plain(sample[name])}" for name in ("source", "reference", "output") if name in sample)
        for sample in details.get("samples", ())
    ]
    return "\n\n".join(parts) + "\n" if parts else None


@dataclass
class _Known:
    """What the record holds already."""

    notes: set[int]
    """Trials that have one."""
    artifacts: dict[int, set[str]]
    """Names of files by trial."""


class Annotator:
    """Keeps a running study's notes, figures and artifacts fresh, in a thread of its own.

    What it draws is read from the store; what it writes goes through `put`, behind the study's own writes.
    """

    def __init__(
        self,
        url: str,
        study: StudyRow,
        search: Search,
        put: Callable[[Callable[[], None]], None],
        note: Callable[[str], None],
    ) -> None:
        self._url = url
        self._note = note
        self._name = study.name
        self._search = search
        self._put = put
        self._known: _Known | None = None
        self._has_told = False
        self._dirty = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="hpsearch-annotations", daemon=True)
        self._thread.start()

    def hear(self, event: Event) -> None:
        """A listener of the launch."""
        if isinstance(event, PointReported | TrialEnded):
            self._dirty.set()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(_LEAVE_S)

    def finish(self) -> None:
        """Annotate what is on record by now, and end."""
        self._closed.set()
        self._thread.join()
        self._annotate()

    def _work(self) -> None:
        pause = EVERY_S
        while not self._closed.wait(pause):
            if not self._dirty.is_set():
                pause = 1.0
                continue
            self._dirty.clear()
            began = time.thread_time()
            self._annotate()
            pause = max(EVERY_S, (time.thread_time() - began) / SHARE)

    def _annotate(self) -> None:
        try:
            self._draw()
        except Exception as error:
            # A study does not end for its pictures: the next look, or the next launch, finds what this one has left.
            self._known = None
            if not isinstance(error, StoreAwayError) and not self._has_told:
                self._has_told = True
                self._note(f"what the Optuna dashboard shows beside the numbers was not written: {error}")

    def _draw(self) -> None:
        store = Store(self._url)
        try:
            data = read_study(store, self._name)
            if self._known is None:
                noted, artifacts = self._search.annotated()
                self._known = _Known(noted, artifacts)
            known = self._known
            rows = {row.number: row for row in store.trials(data.study.id)}
            notes = {
                trial: trial_note(data.study, store.whole_trial(row))
                for trial, row in rows.items()
                if row.state not in UNFINISHED and trial not in known.notes
            }
            kept = {trial: row for trial, row in rows.items() if row.checkpoint and row.state in RANKED}
            added = [
                artifact
                for trial, row in kept.items()
                if trial not in known.artifacts
                for artifact in self._artifacts(store, data.study, row)
            ]
            gone = known.artifacts.keys() - kept.keys()
        finally:
            store.close()
        drawn, said = figures(data), study_note(data)
        search = self._search
        annotations = Annotations(
            notes=notes, study_note=said, replaces=_STUDY_NOTE, figures=drawn, artifacts=added, without=gone
        )
        self._put(lambda: search.annotate(annotations))
        known.notes |= notes.keys()
        for trial in gone:
            for name in known.artifacts.pop(trial):
                storage.unlink(self._place(data.study, trial, name))
        for artifact in added:
            known.artifacts.setdefault(artifact.trial, set()).add(artifact.name)

    def _artifacts(self, store: Store, study: StudyRow, row: TrialRow) -> Sequence[Artifact]:
        """Files about a trial whose checkpoint is kept, written where the dashboard finds them by their ids."""
        trial = store.whole_trial(row)
        run = run_folder(study.placement["folder"], study)
        contents = {
            "model-card.md": model_card(study, trial).encode(),
            "samples.txt": (samples(trial.details) or "").encode(),
            "log.jsonl": storage.read(log_file(run, row.number)) or b"",
        }
        made = []
        for name, content in contents.items():
            if not content:
                continue
            place = self._place(study, row.number, name)
            storage.make(place.parent)
            storage.write(place, content)
            kind = {"md": "text/markdown", "txt": "text/plain", "jsonl": "application/jsonl"}[name.rpartition(".")[2]]
            made.append(Artifact(trial=row.number, name=name, id=place.name, kind=kind))
        return made

    def _place(self, study: StudyRow, number: int, name: str) -> Folder:
        # The same for every launch of the study, so that a file is written over and not beside.
        identity = uuid.uuid5(_NAMESPACE, f"{study.spec['name']}/{study.created_at}/{number}/{name}")
        return artifact_folder(study.placement["folder"]) / str(identity)


def _code(text: str) -> list[str]:
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence, *(plain(line) for line in text.splitlines()), fence]
