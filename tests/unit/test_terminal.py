"""What a person sees in a terminal, at several sizes."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from hpsearch.cli.live import json_lines, progress, watch_report
from hpsearch.cli.summaries import _classes
from hpsearch.driver import plan
from hpsearch.records import DataProgress, Event
from hpsearch.results.status import WatchedStudy
from hpsearch.store.rows import PointRow, TrialWithCurve
from tests.rows import row


def trial(number: int, state: str, points: int = 0, **more: Any) -> TrialWithCurve:
    curve = [
        row(PointRow, evaluation=n, epoch=float(n), train_loss=4.0 / n, valid_loss=4.0 / n + n / 9)
        for n in range(1, points + 1)
    ]
    settings = {"model": {}, "training": {"num_epochs": 12}}
    known = {"number": number, "state": state, "points": curve, "settings": settings}
    return row(TrialWithCurve, **known, params={"learning_rate": 0.01}, **more)


@pytest.mark.parametrize(("width", "height", "is_drawn"), [(80, 24, False), (80, 40, True), (200, 60, True)])
def test_looking_on_draws_the_longest_running_curve_where_there_is_room(
    width: int, height: int, is_drawn: bool
) -> None:
    ended = trial(0, "overfit", reason="validation loss rises " * 20, ended_at=datetime.now(UTC))
    found = WatchedStudy(
        study="tiny", store="sqlite:///x.db", states={"running": 2, "overfit": 1}, budget=5, best=None,
        metric="perplexity", holder=None, since=None, heartbeat_at=None, is_finished=False, seconds_left=None,
        trials=[ended, trial(1, "running", 3), trial(2, "running", 9)],
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(watch_report(found, width, height))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    lines = said.splitlines()
    assert max(len(line) for line in lines) <= width
    assert len(lines) <= height
    assert "9/12" in said
    assert ("trial 2\n" in said and "o validation, . training loss" in said) == is_drawn


def test_classes_are_counted_on_a_line_most_frequent_first() -> None:
    assert _classes({"train": {"a": 3, "b": 9}, "test": {"a": 1, "b": 1_000}}) == "2: b 1,009, a 4"
    many = _classes({"train": {f"label {number}": 1_000 - number for number in range(400)}})
    assert many.startswith("400: label 0 1,000, label 1 999, ")
    assert many.endswith(", ...")
    assert len(many) <= 110


def at(stage: str, done: int, seconds: float, total: int = 200_000_000) -> DataProgress:
    return DataProgress(stage=stage, done=done, total=total, seconds=seconds)


def test_the_progress_of_data_is_a_line_for_each_stage_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=200)
    with progress(console, quiet=False) as listen:
        listen(at("reading train", 50_000_000, 10.0))
        listen(at("reading train", 60_000_000, 12.0))
        listen(at("hashing", 1_000_000, 0.5, total=0))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "data: reading train, 50 of 200 MB, 5.0 MB/s, about 30 s left",
        "data: hashing, 1 MB",
    ]


def test_the_progress_of_data_is_a_bar_in_a_terminal_and_an_event_in_json() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with progress(console, quiet=False) as listen:
        listen(at("tokenizing train", 100_000_000, 600.0))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "data: tokenizing train, 100 of 200 MB, 0.2 MB/s, about 10 min left" in shown
    assert "\u2501" in shown
    stream = io.StringIO()
    json_lines(stream)(at("tokenizing train", 100_000_000, 600.0))
    assert json.loads(stream.getvalue()) == {
        "event": "data", "trial": None, "stage": "tokenizing train", "done": 100_000_000, "total": 200_000_000,
        "seconds": 600.0,
    }  # fmt: skip


def test_data_is_told_of_once_a_second_and_not_at_all_when_it_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])
    heard: list[Event] = []
    report = plan.data_reports(heard.append)
    for _ in range(30):
        report("reading train", 1, 10)
        now[0] += 0.01
    assert not heard
    for step in range(300):
        report("tokenizing train", step, 300)
        now[0] += 0.01
    assert [event.done for event in heard if isinstance(event, DataProgress)] == [70, 170, 270]
