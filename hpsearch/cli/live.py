"""A running study in a terminal: the progress of a launch, and `watch` from anywhere."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from hpsearch.cli.output import STATE_COLOURS, jsonable, new_table
from hpsearch.cli.summaries import status_report
from hpsearch.errors import plain
from hpsearch.records import (
    LIVE,
    PRUNED,
    UNFINISHED,
    DataProgress,
    Event,
    Listener,
    Note,
    PointReported,
    StudyOpened,
    TrialEnded,
    TrialStarted,
    TrialState,
)
from hpsearch.reports.text import (
    counts,
    curve_plot,
    ended_line,
    score_text,
    short,
)
from hpsearch.results.status import WatchedStudy

_CURVE_ROWS = 10
_DATA_LINE_EVERY_S = 15.0
_ROWS_BELOW_A_CURVE = 13
"""Of a screen that shows one: the report above it, its axis, the lines between."""


def watch_report(found: WatchedStudy, width: int, height: int) -> Group:
    """How far a study is and what runs, for a person who looks on; a running trial's curve, too, if there is room."""
    running = [trial for trial in found.trials if trial.state == TrialState.RUNNING]
    ends = ((trial.ended_at, trial.number, trial) for trial in found.trials if trial.state not in LIVE)
    ended = [trial for _, _, trial in sorted((end, number, trial) for end, number, trial in ends if end)]
    table = new_table("trial", "epoch", "train", "valid", "settings")
    for trial in running:
        point = trial.points[-1] if trial.points else None
        epochs = trial.settings["training"]["num_epochs"]
        values = [f"{point.epoch:.4g}/{epochs}", _loss(point.train_loss), _loss(point.valid_loss)] if point else []
        settings = ", ".join(f"{name}={short(value)}" for name, value in trial.params.items())
        table.add_row(str(trial.number), *(values or [f"0/{epochs}", "-", "-"]), plain(settings))
    parts: list[Any] = [Text(status_report(found)), Text("")]
    parts += [table, Text("")] if running else []
    last = [Text(ended_line(trial)[:width]) for trial in ended[-8:]]
    longest = max(running, key=lambda trial: len(trial.points), default=None)
    if longest and len(longest.points) > 1 and height >= _ROWS_BELOW_A_CURVE + _CURVE_ROWS + len(running) + len(last):
        parts += [Text(f"trial {longest.number}")]
        parts += [Text(curve_plot(longest.points, width=min(width, 100), height=_CURVE_ROWS)), Text("")]
    return Group(*parts, *last)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def watch_study(states: Iterator[WatchedStudy], console: Console) -> None:
    """Show how a study goes until it is finished: redrawn in a terminal, a line for each end of a trial elsewhere."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for found in states:
                live.update(watch_report(found, console.width, console.height), refresh=True)
        return
    told: set[tuple[int, int]] = set()
    for found in states:
        for trial in found.trials:
            key = (trial.number, trial.attempt)
            if trial.ended_at and trial.state not in LIVE and key not in told:
                told.add(key)
                console.print(Text(ended_line(trial)), soft_wrap=True)
    console.print(Text(status_report(found)), soft_wrap=True)


@contextmanager
def progress(console: Console, *, quiet: bool) -> Iterator[Listener]:
    """A listener that shows a launch: live on a terminal, one line per event elsewhere, nothing when quiet."""
    if quiet:
        yield lambda event: None
        return
    if not console.is_terminal or console.is_dumb_terminal:
        lines = _Lines(console)
        yield lines.hear
        return
    view = _LiveView(console)
    with Live(get_renderable=view.render, console=console, refresh_per_second=4, transient=True):
        yield view.hear


def json_lines(stream: IO[str]) -> Listener:
    """A listener that writes each event as one line of JSON."""

    def hear(event: Event) -> None:
        facts = {field.name: jsonable(getattr(event, field.name)) for field in fields(event)}
        # In one piece: data is told of from another thread.
        print(json.dumps({"event": event.kind, "trial": None, **facts}) + "\n", end="", file=stream, flush=True)

    return hear


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage, self._told = "", 0.0

    def hear(self, event: Event) -> None:
        if isinstance(event, PointReported) and not event.point.ends_epoch:
            return
        if isinstance(event, DataProgress):
            now = time.monotonic()
            if event.stage == self._stage and now - self._told < _DATA_LINE_EVERY_S:
                return
            self._stage, self._told = event.stage, now
        self._console.print(Text(describe(event)), soft_wrap=True)


def describe(event: Event) -> str:
    """One line on an event."""
    match event:
        case DataProgress():
            return _data_line(event)
        case StudyOpened():
            again = f", {event.finished} done before" if event.finished else ""
            again += f", {event.resumed} to be resumed" if event.resumed else ""
            return (
                f"study {event.name}: {event.budget} trials{again} on {event.where}; "
                f"{event.data['tokens']['train']:,} training tokens; store {event.store}"
            )
        case TrialStarted():
            params = ", ".join(f"{name}={short(value)}" for name, value in event.params.items())
            again = f", trial {event.repeat_of} with a new seed" if event.repeat_of is not None else ""
            again += f", attempt {event.attempt}" if event.attempt > 1 else ""
            verb = "started" if event.attempt == 1 else "resumes"
            return f"trial {event.trial} {verb}{again}: {plain(params)}"
        case PointReported():
            point = event.point
            return (
                f"trial {event.trial} epoch {point.epoch:g}/{event.epochs}: train {point.train_loss:.3f}, "
                f"valid {point.valid_loss:.3f}, {event.verdict}"
            )
        case TrialEnded():
            result = event.result
            ranking = next((score for score in result.scores if score.metric == event.metric), None)
            score = f", test {ranking.metric} {score_text(ranking.metric, ranking.value)}" if ranking else ""
            pruned = " (pruned)" if result.state in PRUNED else ""
            return f"trial {event.trial} {result.state}{pruned}: {plain(result.reason)}{score}"
        case Note():
            return plain(event.text)


def _data_line(event: DataProgress) -> str:
    of = f" of {event.total / 1e6:,.0f}" if event.total else ""
    line = f"data: {event.stage}"
    if event.done:
        line += f", {event.done / 1e6:,.0f}{of} MB"
    if event.done and event.seconds > 1:
        line += f", {event.done / 1e6 / event.seconds:.1f} MB/s"
    left = event.seconds_left
    if left is not None and event.seconds > 1:
        line += f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
    return line


@dataclass
class _Running:
    started: TrialStarted
    last: PointReported | None = None


class _LiveView:
    """The state of a launch, drawn again a few times a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._opening: StudyOpened | None = None
        self._data: DataProgress | None = None
        self._running: dict[int, _Running] = {}
        self._states: dict[str, int] = {}
        self._best: tuple[float, int] | None = None
        self._ended = 0
        self._started = time.monotonic()

    def hear(self, event: Event) -> None:
        match event:
            case DataProgress():
                self._data = event
            case StudyOpened():
                self._opening = event
                self._started = time.monotonic()
                self._say(event)
            case TrialStarted():
                self._running[event.trial] = _Running(event)
            case PointReported():
                self._running[event.trial].last = event
            case TrialEnded():
                self._end(event)
            case Note():
                self._say(event)

    def _end(self, event: TrialEnded) -> None:
        self._running.pop(event.trial, None)
        result = event.result
        if result.state in UNFINISHED:
            self._say(event)
            return
        self._states[result.state] = self._states.get(result.state, 0) + 1
        self._ended += 1
        if result.best_valid_loss is not None and result.scores:
            self._best = min(self._best or (math.inf, 0), (result.best_valid_loss, event.trial))
        self._say(event, style=STATE_COLOURS.get(result.state, ""))

    def _say(self, event: Event, *, style: str = "") -> None:
        self._console.print(Text(describe(event), style=style), highlight=False)

    def render(self) -> Group:
        if self._opening is None and self._data is not None:
            bar = ProgressBar(total=self._data.total or None, completed=self._data.done, width=40)
            return Group(Text(_data_line(self._data), style="bold"), bar)
        table = new_table("trial", "epoch", "train", "valid", "verdict", "settings")
        for trial, running in sorted(self._running.items()):
            point, epochs = running.last.point if running.last else None, running.started.epochs
            table.add_row(
                str(trial),
                f"{point.epoch:.2f}/{epochs}" if point else f"-/{epochs}",
                f"{point.train_loss:.3f}" if point else "-",
                f"{point.valid_loss:.3f}" if point else "-",
                running.last.verdict if running.last else "",
                plain(", ".join(f"{name}={short(value)}" for name, value in running.started.params.items())),
            )
        return Group(table, Text(self._summary(), style="bold"))

    def _summary(self) -> str:
        if self._opening is None:
            return "starting"
        parts = [counts({str(state): count for state, count in self._states.items()}) or "no trial has ended yet"]
        if self._best:
            parts.append(f"best validation loss {self._best[0]:.4f} (trial {self._best[1]})")
        left = self._opening.budget - self._opening.finished - self._ended
        if self._ended and left > 0:
            seconds = (time.monotonic() - self._started) / self._ended * left
            parts.append(f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left")
        return "; ".join(parts)
