"""What a person sees in a terminal: tables, a curve, the live progress of a launch. Owns rich.

Everything printed from a study is text, never markup, and control characters in it are shown as escapes.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import accumulate
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpsearch.errors import plain
from hpsearch.records import LIVE, PRUNED, UNFINISHED, Event, Listener, TrialState
from hpsearch.reports.text import (
    counts,
    curve_plot,
    ended_line,
    interval,
    score_text,
    short,
    trial_facts,
    valid_text,
)
from hpsearch.results.leaderboard import Leaderboard, param_names
from hpsearch.spec.settings import FIXED_BY_PRETRAINED, FOR_PRETRAINED
from hpsearch.store.store import Row

_COLOURS = {
    TrialState.COMPLETED: "green",
    TrialState.OVERFIT: "yellow",
    TrialState.PLATEAU: "yellow",
    TrialState.FAILED: "red",
    TrialState.INFEASIBLE: "red",
    TrialState.DIVERGED: "magenta",
    TrialState.UNPROMISING: "blue",
}


# Tables

_LEADERBOARD_WIDTH = 80
"""Columns of the leaderboard before the settings, with room for the longest state."""


def leaderboard_table(board: Leaderboard, width: int) -> Table:
    """The leaderboard; a terminal that is too narrow for a column per setting gets them in one."""
    names = param_names(board.rows)
    settings = [[short(row["params"].get(name)) for name in names] for row in board.rows]
    columns = sum(2 + max(len(cell) for cell in column) for column in zip(names, *settings, strict=True))
    if columns + _LEADERBOARD_WIDTH > width:
        settings = [[" ".join(f"{name}={short(value)}" for name, value in row["params"].items())] for row in board.rows]
        names = ["settings"]
    choice = board.validation_choice
    several = len(board.studies) > 1
    cells: list[dict[str, str | Text]] = [
        {
            "rank": row["tie"],
            **({"study": plain(row["study"])} if several else {}),
            "trial": str(row["trial"]),
            board.metric: Text(score_text(board.metric, row["score"]), style="bold"),
            "95 % interval": interval(row),
            f"valid {board.objective}": valid_text(board, row)
            + (" *" if choice and row["trial"] == choice["trial"] else ""),
            "epoch": f"{row['best_epoch']:.3g}/{row['last_epoch']:.3g}",
            "state": _state(row["state"]),
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


def finals_table(rows: Sequence[Row]) -> Table:
    """Settings that were run again with new seeds, best mean first."""
    metric = rows[0]["metric"]
    table = _table("trial", f"{metric} that chose it", "seeds", "mean of new seeds", "spread", "worse by", "settings")
    for row in rows:
        spread = row["standard_deviation"]
        table.add_row(
            str(row["trial"]),
            score_text(metric, row["chosen_score"]),
            str(row["seeds"]),
            score_text(metric, row["mean"]),
            "-" if spread is None else f"±{score_text(metric, spread)}",
            score_text(metric, row["sank"]),
            plain(", ".join(f"{name}={short(value)}" for name, value in row["params"].items())),
        )
    return table


def finals_note(rows: Sequence[Row]) -> str:
    """How the winner of the finals compares with the score that chose it."""
    best = rows[0]
    sank = best["sank"]
    moved = f"{score_text(best['metric'], abs(sank))} {'worse' if sank > 0 else 'better'} than the score that chose it"
    return (
        f"finals: trial {best['trial']}'s settings are best, {best['metric']} "
        f"{score_text(best['metric'], best['mean'])} on average over {best['seeds']} new seeds, {moved}"
    )


def comparison_table(found: dict[str, Any]) -> Table:
    """The paired test of two trials, a row a metric."""
    first, second = found["trials"]
    table = _table("metric", f"trial {first}", f"trial {second}", "difference", "95 % interval", "p", "better")
    for entry in found["metrics"]:
        name = entry["metric"]
        text = [
            score_text(name, value) for value in (*entry["scores"], entry["difference"], entry["low"], entry["high"])
        ]
        better = "cannot tell" if entry["better"] is None else f"trial {entry['better']}"
        table.add_row(name, text[0], text[1], text[2], f"{text[3]} to {text[4]}", f"{entry['p_value']:.4f}", better)
    return table


def studies_table(rows: Sequence[Row]) -> Table:
    table = _table("study", "task", "trials", "best", "launched", "driver")
    for row in rows:
        best, lease = row["best"], row["lease"]
        held = lease is not None and lease["beat"] >= 0
        table.add_row(
            plain(row["name"]),
            plain(row["task"]),
            f"{counts(row['states']) or 'none yet'} (of {row['budget_trials']})",
            f"{row['metric']} {score_text(row['metric'], best['score'])} (trial {best['trial']})" if best else "-",
            f"{row['created_at']:%Y-%m-%d %H:%M}",
            plain(lease["holder"]) if held else "-",
        )
    return table


def jobs_table(rows: Sequence[Any]) -> Table:
    table = _table("job", "study", "status", "started", "ended", "code", "store")
    for job in rows:
        times = [f"{at:%Y-%m-%d %H:%M}" if at else "-" for at in (job.started_at, job.ended_at)]
        code = "-" if job.exit_code is None else str(job.exit_code)
        table.add_row(plain(job.id), plain(job.study or "-"), job.status, *times, code, plain(job.store or "-"))
    return table


def log_line(line: dict[str, Any]) -> str:
    """One line of a trial's log for a person: time (UTC), attempt, what was said."""
    level = "" if line["level"] == "info" else f"{line['level']}: "
    said = f"{line['time'][:19].replace('T', ' ')}  {line['attempt']}  {level}{line['message']}"
    more = [f"    {text}" for text in line.get("traceback", "").splitlines()]
    return "\n".join(plain(text) for text in [said, *more])


def status_report(found: dict[str, Any]) -> str:
    """How far a study is, for a person."""
    best, left = found["best"], found["seconds_left"]
    ended = sum(count for state, count in found["states"].items() if state not in UNFINISHED)
    lines = [
        f"study   {found['study']} in {found['store']}",
        f"trials  {counts(found['states']) or 'none yet'}; {ended} of {found['budget']} have ended",
        f"best    {found['metric']} {score_text(found['metric'], best['score'])} (trial {best['trial']})"
        if best
        else "best    none can be ranked yet",
    ]
    if found["holder"]:
        lines.append(
            f"driver  {found['holder']} since {found['since']:%Y-%m-%d %H:%M:%S} UTC, "
            f"last sign of life {found['heartbeat_at']:%H:%M:%S}"
        )
    else:
        lines.append("driver  none: " + ("it is finished" if found["is_finished"] else "launch it to go on"))
    if left is not None:
        lines.append(f"left    about {left / 60:.0f} minutes" if left >= 90 else f"left    about {left:.0f} seconds")
    return "\n".join(plain(line) for line in lines)


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
    table = _table("trial", "epoch", "train", "valid", "settings")
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


def check_report(found: dict[str, Any]) -> str:
    """What `check` found, for a person."""
    study, data = found["study"], found["data"]
    size = "infinite (a range is continuous)" if found["space_size"] is None else f"{found['space_size']:,.0f}"
    lines = [
        f"study        {study['name']} ({study['task']})",
        f"searches     {', '.join(found['dimensions']) or 'nothing: every setting is fixed'}",
        f"space        {size} settings; {study['budget']['trials']} trials by {study['sampler']['name']}",
        f"fixed        {_fixed(found['fixed'], {})}",
        f"pruning      overfit {'on' if study['prune']['overfit'] else 'off'}, "
        f"unpromising by {study['prune']['unpromising']['rule']}; "
        f"{found['evaluations_per_epoch']} evaluations per epoch",
    ]
    for index, params in enumerate(found["first_settings"]):
        label = "first tries" if index == 0 else ""
        lines.append(f"{label:<12} {', '.join(f'{name}={short(value)}' for name, value in params.items())}")
    if data:
        lines += [
            f"data         {data['documents']['train']:,} / {data['documents']['validation']:,} / "
            f"{data['documents']['test']:,} documents for training / validation / test, "
            f"{data['duplicates']:,} duplicates dropped (fingerprint {data['fingerprint']})",
            f"tokens       {data['tokens']['train']:,} / {data['tokens']['validation']:,} / {data['tokens']['test']:,} "
            f"(vocabulary {data['vocab_size']:,})",
            f"leakage      {data['seen_ngrams']:.1%} of the validation split's word 5-grams stand in training"
            + (f", {data['seen_targets']:.1%} of the held-out targets" if data["seen_targets"] is not None else ""),
            f"cut          {_cut(found)}",
            f"to train     about {found['estimated_tokens']:,} tokens without pruning",
            *([f"classes      {_classes(data['label_counts'])}"] if data["labels"] else []),
            *(f"note         {text}" for text in found["notes"]),
        ]
    else:
        lines.append("data         from the hub, not fetched by check")
    resumed = found["resumes"]
    resumes = "nothing: a new study" if resumed is None else counts(resumed) or "a study without trials"
    store = "will be made" if found["store"] == "new" else "reachable"
    if found["store"] is None:
        store = resumes = "not contacted, since the study file alone names it: give it with --store or HPSEARCH_STORE"
    lines += [
        f"store        {store}",
        f"resumes      {resumes}",
        f"devices      {', '.join(found['devices'])}",
        f"computing    {_computing(found['computing'])}",
        *(f"warning      {warning}" for warning in found["computing"]["warnings"]),
    ]
    return "\n".join(plain(line) for line in lines)


def _computing(computing: dict[str, Any]) -> str:
    where = "GPU" if computing["device"] == "cuda" else "CPU"
    flags = ", ".join(computing["instructions"]) or "no vector instructions that are known"
    return (
        f"on the {where}, the model in {computing['model']}, Muon in {computing['muon']} ({computing['cpu']}: {flags})"
    )


def _cut(found: dict[str, Any]) -> str:
    cut = {split: count for split, count in found["truncated"].items() if count}
    counted = ", ".join(f"{count} {split}" for split, count in cut.items())
    return f"{counted} examples are longer than {found['fixed']['context_length']} tokens" if cut else "nothing"


def _classes(counts: dict[str, dict[str, int]], width: int = 100) -> str:
    """How many there are, and as many as fit on a line with the examples that have them, most frequent first."""
    total: Counter[str] = sum((Counter(split) for split in counts.values()), Counter())
    shown = [f"{label} {count:,}" for label, count in total.most_common()]
    fitting = max(1, sum(length <= width for length in accumulate(len(text) + 2 for text in shown)))
    return f"{len(shown)}: {', '.join(shown[:fitting])}{', ...' if fitting < len(shown) else ''}"


def trial_report(trial: Row, width: int) -> Group:
    """Settings, curve, verdict with its evidence, and test score of one trial."""
    facts = _table("", "", header=False)
    settings = {**trial["settings"]["model"], **trial["settings"]["training"]}
    rows: list[tuple[str, Any]] = [
        *trial_facts(trial),
        ("sampled", ", ".join(f"{name}={short(value)}" for name, value in trial["params"].items()) or "nothing"),
        ("fixed", _fixed(settings, trial["params"])),
    ]
    if trial["checkpoint"]:
        rows.append(("checkpoint", trial["checkpoint"]))
    for name, value in rows:
        facts.add_row(Text(name, style="dim"), plain(value))
    parts: list[Any] = [facts]
    points = trial["points"]
    if points:
        parts += [Text(), Text(curve_plot(points, width=min(width, 100), best=trial["best_evaluation"]))]
    parts += _details(trial["details"])
    for decision in trial["decisions"]:
        evidence = ", ".join(
            f"{key}={short(value)}" for key, value in decision["evidence"].items() if value is not None
        )
        line = f"evaluation {decision['evaluation']:>3}: {decision['verdict']} -> {decision['action']} ({evidence})"
        parts.append(Text(plain(line)))
    if trial["error"]:
        parts += [Text(), Text("\n".join(plain(line) for line in trial["error"].splitlines()), style="red")]
    return Group(*parts)


def _details(details: dict[str, Any]) -> Iterator[Any]:
    """Decoded samples beside their references, and the confusion matrix, of the tasks that have them."""
    for sample in details.get("samples", ()):
        yield Text()
        for name in ("source", "reference", "output"):
            yield Text(f"{name:<10} {plain(sample[name])}")
    if confusion := details.get("confusion"):
        yield Text()
        yield _confusion(confusion["labels"], confusion["counts"])


_MOST_CLASSES = 12
"""Of a matrix that a terminal shows; of more, it lists the worst confusions."""
_MOST_CONFUSIONS = 15


def _confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Any:
    names = [plain(label) for label in labels]
    if len(names) <= _MOST_CLASSES:
        table = _table("true, predicted as", *(name[:6] for name in names))
        for name, row in zip(names, counts, strict=True):
            table.add_row(name, *(str(count) if count else "." for count in row))
        return table
    wrong = [
        (count, sum(row), name, names[column])
        for index, (name, row) in enumerate(zip(names, counts, strict=True))
        for column, count in enumerate(row)
        if count and column != index
    ]
    table = _table("most confused", "predicted as", "times", "of")
    for count, total, name, other in sorted(wrong, key=lambda one: -one[0])[:_MOST_CONFUSIONS]:
        table.add_row(name, other, str(count), str(total))
    more = len(wrong) - _MOST_CONFUSIONS
    note = f"{more} more pairs of {len(names)} classes: see the report" if more > 0 else f"of {len(names)} classes"
    return Group(table, Text(note if wrong else f"none of {len(names)} classes was taken for another", style="dim"))


# Progress of a launch


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
        facts = {key: _jsonable(value) for key, value in event.facts.items()}
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
        again += f", {facts['resumed']} to be taken up again" if facts["resumed"] else ""
        return (
            f"study {facts['name']}: {facts['budget']} trials{again} on {facts['where']}; "
            f"{data['tokens']['train']:,} training tokens; store {facts['store']}"
        )
    if event.kind == "trial_started":
        params = ", ".join(f"{name}={short(value)}" for name, value in facts["params"].items())
        again = f", trial {facts['repeat_of']} with a new seed" if facts["repeat_of"] is not None else ""
        again += f", attempt {facts['attempt']}" if facts["attempt"] > 1 else ""
        verb = "started" if facts["attempt"] == 1 else "goes on"
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
            self._console.print(Text(describe(event), style=_COLOURS.get(result.state, "")), highlight=False)
            return
        if event.kind in ("study", "note"):
            self._console.print(Text(describe(event)), highlight=False)

    def render(self) -> Group:
        table = _table("trial", "epoch", "train", "valid", "verdict", "settings")
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


def _table(*columns: str, header: bool = True) -> Table:
    table = Table(box=None, show_header=header, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS.get(TrialState(state), ""))


def _fixed(settings: dict[str, Any], params: dict[str, Any]) -> str:
    meaningless = FIXED_BY_PRETRAINED if settings.get("pretrained") else FOR_PRETRAINED
    return ", ".join(
        f"{name}={short(value)}"
        for name, value in settings.items()
        if name not in params and name not in meaningless and value is not None and value != {}
    )


def _jsonable(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        fields = {key: getattr(value, key) for key in value.__dataclass_fields__}
        return {key: _jsonable(field) for key, field in fields.items() if not isinstance(field, bytes)}
    if isinstance(value, dict):
        return {key: _jsonable(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(child) for child in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any) -> str:
    """Any result of a reading command as JSON: times in ISO 8601, what is no number as null."""
    return json.dumps(_jsonable(value), indent=2)
