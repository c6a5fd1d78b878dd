"""The fault suite's table, printed once at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Row, Study, table

ROWS: list[Row] = []


@pytest.fixture
def survive() -> Callable[[Row], None]:
    """Note a line of the table, and hold it to what we promise: nothing lost and nothing wrong."""

    def note(row: Row) -> None:
        ROWS.append(row)
        assert not row.wrong
        assert row.lost == 0

    return note


@pytest.fixture
def suffer(tmp_path: Path) -> Iterator[Callable[..., Study]]:
    """Make studies that are ended with the test."""
    made: list[Study] = []

    def make(**settings: Any) -> Study:
        made.append(Study(folder=tmp_path / f"study-{len(made)}", **settings))
        return made[-1]

    yield make
    for study in made:
        study.end()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        terminalreporter.write_line("")
        terminalreporter.write_line(table(ROWS))
