"""Studies, jobs and ranked trials as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from hpsearch.cli.output import new_table, state_text
from hpsearch.errors import plain
from hpsearch.reports.text import (
    counts,
    interval,
    score_text,
    short,
    valid_text,
)
from hpsearch.results.leaderboard import Comparison, Finalist, Leaderboard, param_names
from hpsearch.spec.task import known_task
from hpsearch.store.rows import StudySummary

_LEADERBOARD_WIDTH = 80
"""Columns of the leaderboard before the settings, with room for the longest state."""


def leaderboard_table(board: Leaderboard, width: int) -> Table:
    """The leaderboard; a terminal that is too narrow for a column per setting gets them in one."""
    names = param_names(board.rows)
    settings = [[short(row.params.get(name)) for name in names] for row in board.rows]
    columns = sum(2 + max(len(cell) for cell in column) for column in zip(names, *settings, strict=True))
    if columns + _LEADERBOARD_WIDTH > width:
        settings = [[" ".join(f"{name}={short(value)}" for name, value in row.params.items())] for row in board.rows]
        names = ["settings"]
    choice = board.validation_choice
    several = len(board.studies) > 1
    cells: list[dict[str, str | Text]] = [
        {
            "rank": row.tie,
            **({"study": plain(row.study)} if several else {}),
            "trial": str(row.trial),
            board.metric: Text(score_text(board.metric, row.score), style="bold"),
            "95 % interval": interval(row),
            f"valid {board.objective}": valid_text(board, row) + (" *" if choice and row.trial == choice.trial else ""),
            "epoch": f"{row.best_epoch:.3g}/{row.last_epoch:.3g}",
            "state": state_text(row.state),
        }
        for row in board.rows
    ]
    shown = [name for name in cells[0] if width >= 100 or name not in ("95 % interval", "epoch")]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in shown:
        table.add_column(name, no_wrap=True)
    for name in names:
        table.add_column(name, overflow="fold")
    for row_cells, row_settings in zip(cells, settings, strict=True):
        table.add_row(*(row_cells[name] for name in shown), *row_settings)
    return table


def finals_table(rows: Sequence[Finalist]) -> Table:
    """Settings that were run again with new seeds, best mean first."""
    metric = rows[0].metric
    table = new_table(
        "trial", f"{metric} that chose it", "seeds", "mean of new seeds", "spread", "worse by", "settings"
    )
    for row in rows:
        spread = row.standard_deviation
        table.add_row(
            str(row.trial),
            score_text(metric, row.chosen_score),
            str(row.seeds),
            score_text(metric, row.mean),
            "-" if spread is None else f"±{score_text(metric, spread)}",
            score_text(metric, row.dropped),
            plain(", ".join(f"{name}={short(value)}" for name, value in row.params.items())),
        )
    return table


def finals_note(rows: Sequence[Finalist]) -> str:
    """How the winner of the finals compares with the score that chose it."""
    best = rows[0]
    dropped = best.dropped
    moved = (
        f"{score_text(best.metric, abs(dropped))} {'worse' if dropped > 0 else 'better'} than the score that chose it"
    )
    return (
        f"finals: trial {best.trial}'s settings are best, {best.metric} "
        f"{score_text(best.metric, best.mean)} on average over {best.seeds} new seeds, {moved}"
    )


def comparison_table(found: Comparison) -> Table:
    """The paired test of two trials, a row a metric."""
    first, second = found.trials
    table = new_table("metric", f"trial {first}", f"trial {second}", "difference", "95 % interval", "p", "better")
    for entry in found.metrics:
        name = entry.metric
        text = [score_text(name, value) for value in (*entry.scores, entry.difference, entry.low, entry.high)]
        better = "cannot tell" if entry.better is None else f"trial {entry.better}"
        table.add_row(name, text[0], text[1], text[2], f"{text[3]} to {text[4]}", f"{entry.p_value:.4f}", better)
    return table


def studies_table(rows: Sequence[StudySummary]) -> Table:
    table = new_table("study", "task", "trials", "best", "launched", "driver")
    for row in rows:
        best, lease = row.best, row.lease
        known_task(row.task)  # which knows the digits of its metrics
        table.add_row(
            plain(row.name),
            plain(row.task),
            f"{counts(row.states) or 'none yet'} (of {row.budget_trials})",
            f"{row.metric} {score_text(row.metric, best.score)} (trial {best.trial})" if best else "-",
            f"{row.created_at:%Y-%m-%d %H:%M}",
            plain(lease.holder) if lease is not None and lease.is_held else "-",
        )
    return table


def jobs_table(rows: Sequence[Any]) -> Table:
    table = new_table("job", "study", "status", "started", "ended", "code", "store")
    for job in rows:
        times = [f"{at:%Y-%m-%d %H:%M}" if at else "-" for at in (job.started_at, job.ended_at)]
        code = "-" if job.exit_code is None else str(job.exit_code)
        table.add_row(plain(job.id), plain(job.study or "-"), job.status, *times, code, plain(job.store or "-"))
    return table
