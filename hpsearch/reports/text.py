"""Text about studies and trials that terminals, notes and pages share: numbers, a curve, a leaderboard, an outcome."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Sequence
from typing import Any, TypeGuard

from hpsearch.errors import plain
from hpsearch.metrics.intervals import doubt
from hpsearch.metrics.statistics import METRICS
from hpsearch.records import PRUNED, RANKED, STOPPED, WHOLE
from hpsearch.results.leaderboard import Choice, Leaderboard, param_names
from hpsearch.store.rows import LeadingTrial, PointRow, RankedTrial, StudyRow, TrialRow, WholeTrial


def score_text(metric: str, value: float) -> str:
    """A score with the digits that a person compares."""
    digits = METRICS[metric].digits if metric in METRICS else 3  # of a task that is not here
    return f"{value:.{digits}f}"


def short(value: Any) -> str:
    """A setting or a figure in at most 4 significant digits, whole numbers whole."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value) if value is not None else "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}"


def counts(states: dict[str, int]) -> str:
    """`12 trials: 5 completed, 7 pruned (4 overfit, 3 unpromising)`; empty when there are none."""
    there = {state: count for state, count in states.items() if count}
    if not there:
        return ""
    pruned = {state: there.pop(state) for state in list(there) if state in PRUNED}
    parts = [f"{count} {state}" for state, count in there.items()]
    if pruned:
        detail = ", ".join(f"{count} {state}" for state, count in pruned.items())
        parts.append(f"{sum(pruned.values())} pruned ({detail})")
    total = sum(there.values()) + sum(pruned.values())
    return f"{total} trial{'s' if total != 1 else ''}: {', '.join(parts)}"


def trial_facts(trial: WholeTrial) -> list[tuple[str, str]]:
    """The outcome of a trial, by name, as text."""
    pruned = " (pruned)" if trial.state in PRUNED else ""
    facts = [("outcome", f"{trial.state}{pruned}: {trial.reason or 'in progress'}")]
    for score in trial.scores:
        value, low, high = (score_text(score.metric, it) for it in (score.value, score.low, score.high))
        facts.append((f"test {score.metric.replace('_', ' ')}", f"{value} (95 %: {low} to {high}, n={score.n})"))
    if trial.best_valid_loss is not None:
        at = "" if trial.best_epoch is None else f" at epoch {trial.best_epoch:.3g}"
        whole = f"; {trial.details[WHOLE]:.4f} on all of the validation split" if WHOLE in trial.details else ""
        facts.append(("best validation loss", f"{trial.best_valid_loss:.4f}{at}{whole}"))
    if trial.best_valid_score is not None:
        facts.append(("validation score", f"{trial.best_valid_score:.4f}, which chose the checkpoint"))
    if trial.repeat_of is not None:
        facts.append(("repeats", f"trial {trial.repeat_of}, from seed {trial.seed}"))
    where = f"{trial.host or 'an unknown host'} ({trial.device or 'unknown device'})"
    died = f", its worker died {trial.worker_deaths} times" if trial.worker_deaths else ""
    took = f"{trial.device_seconds or 0:.1f} device-seconds, attempt {trial.attempt}{died}"
    facts.append(("ran on", f"{where}, {took}"))
    return facts


def trial_commands(study: StudyRow, trial: WholeTrial) -> list[tuple[str, str]]:
    """What a person can do with a trial that has ended, and the commands for it."""
    commands = [("The same settings again", reproduction(study, trial))]
    this = f"{shlex.quote(study.name)} {trial.number}"
    if trial.state in RANKED:
        commands.append(("Its model, as a folder that transformers loads", f"hpsearch export {this}"))
    return [*commands, ("The whole story", f"hpsearch show {this}"), ("Its log", f"hpsearch logs {this}")]


def reproduction(study: StudyRow, trial: WholeTrial) -> str:
    """The command that runs the settings of a trial again, given its study file as STUDY.yaml."""
    # On record are other options, too, which are about the study and not about one trial.
    given = [override.removeprefix("--set ") for override in study.overrides if override.startswith("--set ")]
    overrides = [*given, *(f"search.{name}={json.dumps(it)}" for name, it in trial.params.items())]
    again = f"{study.name}-trial-{trial.number}"
    seed = [f"seed={trial.seed}"] if trial.seed is not None else []
    parts = ["hpsearch", "launch", "STUDY.yaml", "--name", again, "--trials", "1"]
    return shlex.join([*parts, *(f"--set={override}" for override in [*overrides, *seed])])


def ended_line(trial: TrialRow) -> str:
    """One line on a trial that has ended."""
    pruned = " (pruned)" if trial.state in PRUNED else ""
    return f"trial {trial.number} {trial.state}{pruned}: {plain(trial.reason or '')}"


def leaderboard_notes(board: Leaderboard) -> list[str]:
    """What stands under the table."""
    leading = [_leading_line(board, board.leading)] if board.leading else []
    if board.best is None:
        none = f"no trial of '{board.study}' can be ranked yet ({counts(board.states) or 'none has ended'})"
        return [none, *leading]
    notes = [*([board.note] if board.note else []), *leading]
    if stopped := [row for row in board.rows if row.state in STOPPED]:
        numbers = ", ".join(str(row.trial) for row in stopped)
        one = len(stopped) == 1
        notes.append(
            f"stopped early: {'trial' if one else 'trials'} {numbers}, scored at the best checkpoint so far; the next "
            f"launch resumes {'it' if one else 'them'}"
        )
    choice = board.validation_choice
    if choice is not None:
        same = choice.trial == board.best.trial
        notes.append(
            f"* validation would have chosen trial {choice.trial}"
            + (", the winner" if same else f", ranked {choice.test_rank} on the test split")
        )
    if any(row.tie == "1=" for row in board.rows):
        notes.append(
            "1= cannot be told from the winner on this test split (paired bootstrap, corrected for the choice)"
        )
    best = board.best
    if (why := doubt(board.metric, best.score_n, best.score_low, best.score_high)) is not None:
        notes.append(why)
    return [
        *notes,
        f"{board.metric}: on the test split; epoch: best/last, the best one's checkpoint is scored",
        f"{counts(board.states)}",
    ]


def choice_notes(board: Leaderboard, by: Choice) -> list[str]:
    """What a person who takes the winner by one criterion should know of the other."""
    chosen, choice = board.chosen(by), board.leading or board.validation_choice
    if chosen is None:
        return []
    if isinstance(chosen, LeadingTrial) and board.best is None:
        return [_leading_line(board, chosen)]
    if choice is None or board.best is None or choice.trial == board.best.trial:
        return []
    if by == "validation":
        return [f"chosen on validation; by its test score the winner is trial {board.best.trial} (--by test)"]
    return [f"chosen by its test score; validation would have chosen trial {choice.trial} (--by validation)"]


def _leading_line(board: Leaderboard, row: LeadingTrial) -> str:
    value = f"{row.value:.4f}" if board.objective == "loss" else score_text(board.objective, row.value)
    return (
        f"trial {row.trial} ({row.state}) leads on validation with a {board.objective} of {value} at epoch "
        f"{row.epoch:.3g}, and has no test score yet"
    )


def leaderboard_markdown(board: Leaderboard) -> str:
    names = param_names(board.rows)
    valid = f"valid {board.objective}"
    headers = ["rank", "trial", f"test {board.metric}", "95 % interval", valid, "best epoch", "state", *names]
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    for row in board.rows:
        cells = [
            row.tie,
            row.trial,
            score_text(board.metric, row.score),
            interval(row),
            valid_text(board, row),
            f"{row.best_epoch:.3g}",
            row.state,
            *(short(row.params.get(name)) for name in names),
        ]
        lines.append("| " + " | ".join(markdown(cell) for cell in cells) + " |")
    return "\n".join(lines)


def markdown(value: Any) -> str:
    """Text for a cell of a Markdown table: no mark-up, neither Markdown's nor HTML's, which Markdown lets through."""
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(plain(value), quote=False))


def curve_plot(points: Sequence[PointRow], *, width: int = 80, height: int = 14, best: int | None = None) -> str:
    """Training (`.`) and validation (`o`) loss against epochs as text; `*` marks the best checkpoint."""
    finite = [value for point in points for value in (point.train_loss, point.valid_loss) if is_finite(value)]
    if not finite:
        return "no finite loss to draw"
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    columns = max(10, width - 10)
    first, last = points[0].epoch, points[-1].epoch
    grid = [[" "] * columns for _ in range(height)]
    for sign in (".", "o"):
        for point in points:
            value = point.train_loss if sign == "." else point.valid_loss
            if not is_finite(value):
                continue
            column = round((point.epoch - first) / ((last - first) or 1.0) * (columns - 1))
            line = round((high - value) / span * (height - 1))
            grid[line][column] = "*" if sign == "o" and point.evaluation == best else sign
    lines = []
    for index, row in enumerate(grid):
        label = high - span * index / (height - 1)
        lines.append(f"{label:8.3f} |{''.join(row).rstrip()}")
    left, right = f"{first:.3g}", f"epoch {last:.3g}"
    lines.append(" " * 9 + "+" + "-" * columns)
    lines.append(" " * 10 + left + right.rjust(max(0, columns - len(left))))
    lines.append(" " * 10 + "o validation, . training loss, * best checkpoint")
    return "\n".join(lines)


def valid_text(board: Leaderboard, row: RankedTrial) -> str:
    if board.objective == "loss" or row.valid_score is None:
        return f"{row.valid_loss:.4f}"
    return score_text(board.objective, row.valid_score)


def interval(row: RankedTrial) -> str:
    return f"{score_text(row.metric, row.score_low)}-{score_text(row.metric, row.score_high)}"


def is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
