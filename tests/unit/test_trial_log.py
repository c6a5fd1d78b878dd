"""The log of a trial: all attempts in one file, warnings of libraries included, and never the reason of a failure."""

from __future__ import annotations

import warnings
from pathlib import Path

from hpsearch.files.trial_log import LOGGER, log_file, read_log, trial_log


def test_attempts_follow_each_other_in_one_file(tmp_path: Path) -> None:
    file = log_file(tmp_path, 7)
    for attempt in (1, 2):
        with trial_log(file, attempt, own_process=False):
            LOGGER.info("step %d", attempt, extra={"facts": {"step": attempt}})
    LOGGER.info("of no trial")
    lines, _ = read_log(file)
    assert [(line["attempt"], line["message"], line["facts"]) for line in lines] == [
        (1, "step 1", {"step": 1}),
        (2, "step 2", {"step": 2}),
    ]


def test_warnings_of_libraries_are_kept(tmp_path: Path) -> None:
    file = log_file(tmp_path, 0)
    with trial_log(file, 1, own_process=True):
        warnings.warn("this kernel is slow", stacklevel=1)
    (line,), _ = read_log(file)
    assert (line["level"], line["logger"]) == ("warning", "py.warnings")
    assert "this kernel is slow" in line["message"]


def test_an_error_comes_with_its_traceback(tmp_path: Path) -> None:
    file = log_file(tmp_path, 0)
    with trial_log(file, 1, own_process=False):
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            LOGGER.exception("it broke")
    (line,), _ = read_log(file)
    assert line["traceback"].splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text('{"a": 1}\n{"b"')
    lines, position = read_log(file)
    assert lines == [{"a": 1}]
    with file.open("a") as stream:
        stream.write(': 2}\nnot JSON\n{"c": 3}\n')
    assert read_log(file, start=position)[0] == [{"b": 2}, {"c": 3}]


def test_a_trial_does_not_fail_for_its_log(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    with trial_log(log_file(tmp_path, 0), 1, own_process=False):
        LOGGER.info("said into the wind")
    assert read_log(tmp_path / "nowhere") == ([], 0)
