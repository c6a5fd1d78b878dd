"""A running study in a terminal: the progress of a launch, and `watch` from anywhere."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hpsearch.cli.output import STATE_COLOURS, jsonable, new_table
from hpsearch.cli.summaries import status_report
from hpsearch.errors import plain
from hpsearch.records import LIVE, PRUNED, UNFINISHED, Event, Listener, TrialState
from hpsearch.reports.text import (
    counts,
    curve_plot,
    ended_line,
    score_text,
    short,
)

_CURVE_ROWS = 10
_ROWS_BELOW_A_CURVE = 13
"""Of a screen that shows one: the report above it, its axis, the lines between."""


def watch_report(found: dict[str, Any], width: int, height: int) -> Group:
    """How far a study is and what runs, for a person who looks on; a running trial's curve, too, if there is room."""
    running = [trial for trial in found["trials"] if trial["state"] == TrialState.RUNNING]
    ended = sorted(
        (trial for trial in found["trials"] if trial["ended_at"] and trial["state"] not in LIVE),
        key=lambda trial: trial["ended_at"],
    )
    table = new_table("trial", "epoch", "train", "valid", "settings")
    for trial in running:
        point, epochs = (trial["points"] or [None])[-1], trial["settings"]["training"]["num_epochs"]
        values = (
            [f"{point['epoch']:.4g}/{epochs}", _loss(point["train_loss"]), _loss(point["valid_loss"])] if point else []
        )
        settings = ", ".join(f"{name}={short(value)}" for name, value in trial["params"].items())
        table.add_row(str(trial["number"]), *(values or [f"0/{epochs}", "-", "-"]), plain(settings))
    parts: list[Any] = [Text(status_report(found)), Text("")]
    parts += [table, Text("")] if running else []
    last = [Text(ended_line(trial)[:width]) for trial in ended[-8:]]
    longest = max(running, key=lambda trial: len(trial["points"]), default=None)
    if (
        longest
        and len(longest["points"]) > 1
        and height >= _ROWS_BELOW_A_CURVE + _CURVE_ROWS + len(running) + len(last)
    ):
        parts += [Text(f"trial {longest['number']}")]
        parts += [Text(curve_plot(longest["points"], width=min(width, 100), height=_CURVE_ROWS)), Text("")]
    return Group(*parts, *last)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def watch_study(states: Iterator[dict[str, Any]], console: Console) -> None:
    """Show how a study goes until it is finished: redrawn in a terminal, a line for each end of a trial elsewhere."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for found in states:
                live.update(watch_report(found, console.width, console.height), refresh=True)
        return
    told: set[tuple[int, int]] = set()
    for found in states:
        for trial in found["trials"]:
            key = (trial["number"], trial["attempt"])
            if trial["ended_at"] and trial["state"] not in LIVE and key not in told:
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
        facts = {key: jsonable(value) for key, value in event.facts.items()}
        print(json.dumps({"event": event.kind, "trial": event.trial, **facts}), file=stream, flush=True)

    return hear


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console

    def hear(self, event: Event) -> None:
        if event.kind == "point":
            point = event.facts["point"]
            if not point.ends_epoch:
                return
        self._console.print(Text(describe(event)), soft_wrap=True)


def describe(event: Event) -> str:
    """One line on an event."""
    facts = event.facts
    if event.kind == "study":
        data = facts["data"]
        again = f", {facts['finished']} done before" if facts["finished"] else ""
        again += f", {facts['resumed']} to be resumed" if facts["resumed"] else ""
        return (
            f"study {facts['name']}: {facts['budget']} trials{again} on {facts['where']}; "
            f"{data['tokens']['train']:,} training tokens; store {facts['store']}"
        )
    if event.kind == "trial_started":
        params = ", ".join(f"{name}={short(value)}" for name, value in facts["params"].items())
        again = f", trial {facts['repeat_of']} with a new seed" if facts["repeat_of"] is not None else ""
        again += f", attempt {facts['attempt']}" if facts["attempt"] > 1 else ""
        verb = "started" if facts["attempt"] == 1 else "resumes"
        return f"trial {event.trial} {verb}{again}: {plain(params)}"
    if event.kind == "point":
        point = facts["point"]
        return (
            f"trial {event.trial} epoch {point.epoch:g}/{facts['epochs']}: train {point.train_loss:.3f}, "
            f"valid {point.valid_loss:.3f}, {facts['verdict']}"
        )
    if event.kind == "trial_ended":
        result = facts["result"]
        first = result.scores[0] if result.scores else None
        score = f", test {first.metric} {score_text(first.metric, first.value)}" if first else ""
        pruned = " (pruned)" if result.state in PRUNED else ""
        return f"trial {event.trial} {result.state}{pruned}: {plain(result.reason)}{score}"
    return plain(facts.get("text", event.kind))


class _LiveView:
    """The state of a launch, drawn again a few times a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._opening: dict[str, Any] = {}
        self._running: dict[int, dict[str, Any]] = {}
        self._states: dict[str, int] = {}
        self._best: tuple[float, int] | None = None
        self._ended = 0
        self._started = time.monotonic()

    def hear(self, event: Event) -> None:
        facts = event.facts
        if event.kind == "study":
            self._opening = facts
            self._started = time.monotonic()
        elif event.kind == "trial_started":
            assert event.trial is not None
            self._running[event.trial] = {**facts, "point": None, "verdict": ""}
        elif event.kind == "point":
            assert event.trial is not None
            self._running[event.trial].update(facts)
            return
        elif event.kind == "trial_ended":
            assert event.trial is not None
            self._running.pop(event.trial, None)
            result = facts["result"]
            if result.state in UNFINISHED:
                self._console.print(Text(describe(event)), highlight=False)
                return
            self._states[result.state] = self._states.get(result.state, 0) + 1
            self._ended += 1
            if result.best_valid_loss is not None and result.scores:
                self._best = min(self._best or (math.inf, 0), (result.best_valid_loss, event.trial))
            self._console.print(Text(describe(event), style=STATE_COLOURS.get(result.state, "")), highlight=False)
            return
        if event.kind in ("study", "note"):
            self._console.print(Text(describe(event)), highlight=False)

    def render(self) -> Group:
        table = new_table("trial", "epoch", "train", "valid", "verdict", "settings")
        for trial, facts in sorted(self._running.items()):
            point = facts["point"]
            table.add_row(
                str(trial),
                f"{point.epoch:.2f}/{facts['epochs']}" if point else f"-/{facts['epochs']}",
                f"{point.train_loss:.3f}" if point else "-",
                f"{point.valid_loss:.3f}" if point else "-",
                facts["verdict"],
                plain(", ".join(f"{name}={short(value)}" for name, value in facts.get("params", {}).items())),
            )
        return Group(table, Text(self._summary(), style="bold"))

    def _summary(self) -> str:
        if not self._opening:
            return "starting"
        parts = [counts({str(state): count for state, count in self._states.items()}) or "no trial has ended yet"]
        if self._best:
            parts.append(f"best validation loss {self._best[0]:.4f} (trial {self._best[1]})")
        left = self._opening["budget"] - self._opening["finished"] - self._ended
        if self._ended and left > 0:
            seconds = (time.monotonic() - self._started) / self._ended * left
            parts.append(f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left")
        return "; ".join(parts)
