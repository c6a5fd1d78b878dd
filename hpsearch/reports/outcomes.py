"""Figures of what trials led to and cost: leaderboard, optimism of validation, timeline, device time."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go

from hpsearch.records import PRUNED
from hpsearch.reports.study_data import StudyData
from hpsearch.reports.text import score_text, short
from hpsearch.reports.theme import BLACK, BLUE, SKY, STATES, Drawn, escaped, hover
from hpsearch.store.rows import RankedTrial

_TOP = 25


def leaderboard_figure(data: StudyData) -> Drawn:
    rows = data.board.rows[:_TOP]
    figure = go.Figure()
    for is_tied, name, symbol in ((True, "not told from the winner", "circle"), (False, "worse", "circle-open")):
        part = [row for row in rows if (row.tie in ("1", "1=")) == is_tied]
        figure.add_scatter(
            x=[row.score for row in part],
            y=[f"trial {row.trial}" for row in part],
            mode="markers",
            name=name,
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [row.score_high - row.score for row in part],
                "arrayminus": [row.score - row.score_low for row in part],
            },
            marker={"symbol": symbol, "size": 10, "color": BLUE if is_tied else BLACK},
            customdata=[[row.tie, row.state, row.score_n] for row in part],
            hovertemplate="%{y}, rank %{customdata[0]}, %{customdata[1]}<br>%{x:.4g} on %{customdata[2]} test "
            "examples<extra></extra>",
        )
    figure.update_yaxes(categoryorder="array", categoryarray=[f"trial {row.trial}" for row in rows][::-1])
    metric = data.board.metric
    figure.update_layout(
        xaxis_title=f"test {metric.replace('_', ' ')} with its 95 % interval", height=160 + 22 * len(rows)
    )
    count = len(data.board.rows)
    return Drawn(
        title="Leaderboard",
        figure=figure,
        n=f"{len(rows)} of {count} ranked trials" if count > len(rows) else f"{count} ranked trials",
        says="Best on top; a filled dot is a trial that the test split cannot tell from the winner (paired bootstrap).",
    )


def timeline(data: StudyData) -> Drawn:
    rows = sorted(data.trials, key=lambda row: row.started_at)
    ends = [row.ended_at for row in rows if row.ended_at is not None]
    now = max([*ends, *(row.started_at for row in rows)], default=datetime.now(UTC))
    hosts = {row.host for row in rows if row.host is not None}
    only = hosts.pop() if len(hosts) == 1 else "unknown host"
    free: list[tuple[Any, str]] = []
    lanes = []
    for row in rows:
        # Which device of a host a trial had is not always known: the first lane of its host that is free.
        end, own = row.ended_at or now, row.host or only
        fitting = (place for place, (until, host) in enumerate(free) if until <= row.started_at and host == own)
        lane = next(fitting, len(free))
        free[lane : lane + 1] = [(end, own)]
        lanes.append(f"{escaped(own)} #{lane}")
    figure = go.Figure()
    took = [((row.ended_at or now) - row.started_at).total_seconds() for row in rows]
    for state, (colour, _) in STATES.items():
        part = [place for place, row in enumerate(rows) if row.state == state]
        if part:
            figure.add_bar(
                base=[rows[place].started_at.isoformat() for place in part],
                x=[1000 * took[place] for place in part],
                y=[lanes[place] for place in part],
                orientation="h",
                name=state,
                marker={"color": colour, "line": {"width": 1, "color": "#fff"}},
                text=[str(rows[place].number) for place in part],
                textposition="inside",
                customdata=[hover(rows[place]) for place in part],
                hovertemplate="%{customdata}<extra></extra>",
            )
    figure.update_layout(
        barmode="overlay",
        xaxis_type="date",
        xaxis_title="time (UTC)",
        height=180 + 26 * len(set(lanes)),
    )
    return Drawn(
        title="Trials over time",
        figure=figure,
        n=f"{len(rows)} trials",
        says="Gaps are devices that waited; a trial that was resumed spans its attempts.",
    )


def compute(data: StudyData) -> Drawn:
    """Device-hours by how trials ended, and what pruning spared: the epochs not run, at the pace of those run."""
    spent: dict[str, float] = {}
    spared: dict[str, float] = {}
    for row in data.ended:
        hours = (row.device_seconds or 0.0) / 3600
        spent[row.state] = spent.get(row.state, 0.0) + hours
        planned, run = row.settings["training"]["num_epochs"], row.last_epoch or 0.0
        if row.state in PRUNED and run > 0:
            spared[row.state] = spared.get(row.state, 0.0) + hours * max(0.0, planned / run - 1)
    states = [state for state in STATES if state in spent]
    figure = go.Figure()
    figure.add_bar(
        x=states,
        y=[spent[state] for state in states],
        name="spent",
        marker={"color": BLUE},
        hovertemplate="%{x}: %{y:.3f} device-hours spent<extra></extra>",
    )
    figure.add_bar(
        x=states,
        y=[spared.get(state, 0.0) for state in states],
        name="spared by pruning",
        marker={"color": SKY, "pattern": {"shape": "/"}},
        hovertemplate="%{x}: %{y:.3f} device-hours spared<extra></extra>",
    )
    figure.update_layout(barmode="stack", yaxis_title="device-hours")
    total, saved = sum(spent.values()), sum(spared.values())
    share = 100 * saved / (total + saved) if total + saved else 0.0
    return Drawn(
        title="Compute spent and spared",
        figure=figure,
        n=f"{len(data.ended)} finished trials",
        says=f"Pruning spared {share:.0f} % of what the planned epochs of these trials would have cost, estimated at "
        "each trial's own pace.",
    )


def optimism(data: StudyData) -> Drawn:
    """Validation against test of ranked trials, in the metric's unit."""
    is_perplexity = data.board.metric == "perplexity" and data.minimises
    rows = [row for row in data.board.rows if _shown_validation(row, is_perplexity) is not None]
    figure = go.Figure()
    xs = [value for row in rows if (value := _shown_validation(row, is_perplexity)) is not None]
    figure.add_scatter(
        x=xs,
        y=[row.score for row in rows],
        mode="markers",
        name="ranked trials",
        error_y={
            "type": "data",
            "symmetric": False,
            "thickness": 1,
            "array": [row.score_high - row.score for row in rows],
            "arrayminus": [row.score - row.score_low for row in rows],
        },
        marker={"color": BLUE, "size": 8},
        customdata=[row.trial for row in rows],
        hovertemplate="trial %{customdata}<br>validation %{x:.4g}, test %{y:.4g}<extra></extra>",
    )
    is_same_unit = is_perplexity or (not data.minimises and data.board.metric == data.study.objective)
    if rows and is_same_unit:
        ends = [min(xs), max(xs)]
        figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", line={"dash": "dash", "color": BLACK})
    unit = "validation perplexity" if is_perplexity else data.objective
    figure.update_layout(xaxis_title=unit, yaxis_title=f"test {data.board.metric.replace('_', ' ')}")
    return Drawn(
        title="Validation against test",
        figure=figure,
        n=f"{len(rows)} ranked trials",
        says="The search saw the validation split only: trials that look better there than on the test split had luck.",
    )


def _shown_validation(row: RankedTrial, is_perplexity: bool) -> float | None:
    if row.valid_score is not None and not is_perplexity:
        return float(row.valid_score)
    loss = row.valid_loss
    if loss is None:
        return None
    return math.exp(min(loss, 700.0)) if is_perplexity else float(loss)


def every_trial(data: StudyData) -> Drawn:
    scores = {row.trial: row for row in data.board.rows}
    metric = data.board.metric.replace("_", " ")
    rows = []
    for row in data.trials:
        value, score = data.value(row), scores.get(row.number)
        last = next((f"{point.epoch:.4g}" for point in data.points[row.number][-1:]), "0")
        rows.append(
            [
                str(row.number),
                row.state + (" (pruned)" if row.state in PRUNED else ""),
                score_text(data.board.metric, score.score) if score else "-",
                "-" if value is None else f"{value:.4f}",
                last,
                ", ".join(f"{name} {short(it)}" for name, it in row.params.items()),
                row.reason or "",
            ]
        )
    return Drawn(
        title="Every trial",
        n=f"{len(rows)} trials",
        lists_trials=True,
        table=(("trial", "state", f"test {metric}", data.objective, "epochs", "settings", "why it ended"), rows),
        says="Pruned are the trials that were ended before their last epoch, each with its reason.",
    )
