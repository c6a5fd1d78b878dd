"""What a person sees in a terminal, at several sizes."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from hpsearch.cli.live import watch_report
from hpsearch.cli.summaries import _classes
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
