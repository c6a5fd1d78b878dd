"""What a study looks like: figures by name, from its rows to plotly. Owns plotly.

Every figure says how much it was drawn from and, in a sentence, what it means. Colours are those of Okabe and Ito
(2008), which people who cannot tell red from green can tell apart; states differ by shape as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpsearch.records import PRUNED, UNFINISHED
from hpsearch.reports.text import score_text, short
from hpsearch.results.leaderboard import Leaderboard, leaderboard, param_names
from hpsearch.spec.space import Range, Space
from hpsearch.spec.study import recorded_space
from hpsearch.store.store import Row, Store

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#777777", "#E69F00", "#56B4E9", "#009E73", "#B8A800", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
STATES: dict[str, tuple[str, str]] = {
    "completed": (GREEN, "circle"),
    "overfit": (ORANGE, "diamond"),
    "plateau": (YELLOW, "square"),
    "unpromising": (SKY, "triangle-down"),
    "diverged": (PINK, "x"),
    "infeasible": (RED, "cross"),
    "failed": (RED, "x-thin-open"),
    "interrupted": (BLACK, "circle-open"),
    "running": (BLUE, "star"),
    "paused": (BLUE, "star-open"),
}
_CURVES = 8
"""Trials whose curves are drawn in colour; of the others the validation loss alone, in grey."""
_CURVE_COLOURS = (BLUE, ORANGE, GREEN, PINK, RED, SKY, YELLOW, BLACK)
_MOST_POINTS = 40_000
"""Points of grey curves in a figure; more are thinned out."""
_TOP = 25
FEW_TRIALS = 20
"""Below so many finished trials an importance is a guess."""


@dataclass(frozen=True)
class StudyData:
    """One study as rows, read once for all its figures."""

    study: Row
    trials: list[Row]
    points: dict[int, list[Row]]
    """Curves by trial number."""
    board: Leaderboard
    details: dict[str, Any]
    """What the task kept of the best trial."""
    importances: dict[str, float] | None
    """Of the sampled settings, if there are trials enough to compute any."""

    @property
    def name(self) -> str:
        return str(self.study["name"])

    @property
    def objective(self) -> str:
        return "best validation loss" if self.study["objective"] == "loss" else f"validation {self.study['objective']}"

    @property
    def minimises(self) -> bool:
        return bool(self.study["objective"] == "loss")

    def value(self, trial: Row) -> float | None:
        """What the search sees of a trial."""
        value = trial["best_valid_loss" if self.minimises else "best_valid_score"]
        return None if value is None else float(value)

    @cached_property
    def ended(self) -> list[Row]:
        """Trials that have ended, in the order of their ends."""
        return sorted((row for row in self.trials if row["state"] not in UNFINISHED), key=lambda row: row["ended_at"])

    @cached_property
    def settings(self) -> pd.DataFrame:
        """Sampled settings and value of the trials that have one, a row each."""
        rows = [
            {**row["params"], "trial": row["number"], "state": row["state"], "value": self.value(row)}
            for row in self.trials
            if self.value(row) is not None
        ]
        return pd.DataFrame(rows)

    @property
    def params(self) -> list[str]:
        return param_names(self.trials)

    def is_log(self, setting: str) -> bool:
        """Whether the study searched a setting by its logarithm."""
        dimension = self.space.dimensions.get(setting)
        return isinstance(dimension, Range) and dimension.log

    @cached_property
    def space(self) -> Space:
        return recorded_space(self.study["spec"])


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure, or a table, with what is to be said of it."""

    title: str
    says: str
    """What it means, in one sentence."""
    n: str
    """What it was drawn from."""
    figure: go.Figure | None = None
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    """Heads and rows, as text."""
    lists_trials: bool = False
    """Whether the first cell of each row is the number of a trial."""
    warning: str | None = None


def read_study(store: Store, name: str, importances: dict[str, float] | None = None) -> StudyData:
    """Everything that the figures of a study are drawn from. Raises UnknownStudyError."""
    study = store.study(name)
    trials = [row for row in store.trials(study["id"]) if row["repeat_of"] is None]
    curves = store.study_points(study["id"])
    board = leaderboard(store, name)
    best = next((row for row in trials if board.best and row["number"] == board.best["trial"]), None)
    return StudyData(
        study=study,
        trials=trials,
        points={row["number"]: curves.get(row["id"], []) for row in trials},
        board=board,
        details=store.details(best["id"]) if best else {},
        importances=importances,
    )


def _hover(row: Row) -> str:
    """What the mouse tells of a trial. Plotly reads a little HTML in hovers, so that text is escaped."""
    settings = "<br>".join(f"{_escaped(name)} {_escaped(short(value))}" for name, value in row["params"].items())
    return f"trial {row['number']}: {row['state']}<br>{settings}"


def _escaped(text: Any) -> str:
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _curves(data: StudyData) -> Drawn:
    figure = go.Figure()
    shown = _curves_to_show(data)
    grey = [number for number in data.points if number not in shown and data.points[number]]
    total = sum(len(data.points[number]) for number in grey)
    step = max(1, math.ceil(total / _MOST_POINTS))
    xs: list[float | None] = []
    ys: list[float | None] = []
    for number in grey:
        points = data.points[number]
        kept = points[::step] if (len(points) - 1) % step == 0 else [*points[::step], points[-1]]
        xs += [point["epoch"] for point in kept] + [None]
        ys += [point["valid_loss"] for point in kept] + [None]
    if xs:
        figure.add_scattergl(
            x=xs, y=ys, mode="lines", name="other trials", line={"color": "rgba(128,128,128,0.35)", "width": 1},
            hoverinfo="skip",
        )  # fmt: skip
    rows = {row["number"]: row for row in data.trials}
    for place, number in enumerate(shown):
        points, row = data.points[number], rows[number]
        colour = _CURVE_COLOURS[place % len(_CURVE_COLOURS)]
        common = {"legendgroup": str(number), "x": [point["epoch"] for point in points]}
        figure.add_scatter(
            **common, y=[point["train_loss"] for point in points], mode="lines", showlegend=False,
            line={"color": colour, "dash": "dot", "width": 1.5}, name=f"trial {number} training",
            hovertemplate=f"training, trial {number}<br>epoch %{{x:.2f}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            **common, y=[point["valid_loss"] for point in points], mode="lines",
            line={"color": colour, "width": 2}, name=f"trial {number} ({row['state']})",
            hovertemplate=f"validation, {_hover(row)}<br>epoch %{{x:.2f}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        best = row["best_evaluation"]
        if best is not None and best <= len(points):
            figure.add_scatter(
                x=[points[best - 1]["epoch"]], y=[points[best - 1]["valid_loss"]], mode="markers", showlegend=False,
                legendgroup=str(number), marker={"symbol": "star", "size": 12, "color": colour},
                name=f"trial {number} best",
                hovertemplate=f"best checkpoint of trial {number}<br>epoch %{{x:.2f}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
        if row["state"] in PRUNED:
            figure.add_scatter(
                x=[points[-1]["epoch"]], y=[points[-1]["valid_loss"]], mode="markers", showlegend=False,
                legendgroup=str(number), name=f"trial {number} pruned",
                marker={"symbol": "x", "size": 10, "color": colour},
                hovertemplate=f"pruned: {_escaped(row['reason'] or row['state'])}<extra></extra>",
            )  # fmt: skip
    figure.update_layout(xaxis_title="epoch", yaxis_title="loss (nats per token)", hovermode="closest")
    if data.study["task"] == "classification":
        figure.update_yaxes(title="loss (nats per text)")
    low, high = _usual_range([point for number in data.points for point in data.points[number]])
    if high > low:
        figure.update_yaxes(range=[low, high])
    drawn = len([points for points in data.points.values() if points])
    return Drawn(
        title="Training against validation loss", figure=figure, n=f"{drawn} trials",
        says="Dotted is training, solid validation: where the dotted line goes on falling and the solid one rises, the "
        "run overfits. A star marks the best checkpoint, a cross where the run was pruned. Click a trial to hide it.",
    )  # fmt: skip


def _usual_range(points: Sequence[Row]) -> tuple[float, float]:
    """A range of losses that a few exploding runs do not stretch."""
    losses = [point[key] for point in points for key in ("train_loss", "valid_loss") if point[key] is not None]
    if not losses:
        return 0.0, 0.0
    low, high = float(np.min(losses)), float(np.quantile(losses, 0.99))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _curves_to_show(data: StudyData) -> list[int]:
    """The best trials and the clearest overfit ones, by number."""
    best = [row["trial"] for row in data.board.rows if data.points.get(row["trial"])]
    overfit = [row["number"] for row in data.trials if row["state"] == "overfit" and data.points[row["number"]]]
    running = [row["number"] for row in data.trials if row["state"] == "running" and data.points[row["number"]]]
    rest = [number for number, points in data.points.items() if points]
    wanted = dict.fromkeys([*best[: _CURVES // 2], *overfit[: _CURVES // 4], *running, *best, *overfit, *rest])
    return sorted(list(wanted)[:_CURVES])


def _board(data: StudyData) -> Drawn:
    rows = data.board.rows[:_TOP]
    figure = go.Figure()
    for is_tied, name, symbol in ((True, "not told from the winner", "circle"), (False, "worse", "circle-open")):
        part = [row for row in rows if (row["tie"] in ("1", "1=")) == is_tied]
        figure.add_scatter(
            x=[row["score"] for row in part], y=[f"trial {row['trial']}" for row in part], mode="markers", name=name,
            error_x={
                "type": "data", "symmetric": False,
                "array": [row["score_high"] - row["score"] for row in part],
                "arrayminus": [row["score"] - row["score_low"] for row in part],
            },
            marker={"symbol": symbol, "size": 10, "color": BLUE if is_tied else BLACK},
            customdata=[[row["tie"], row["state"], row["score_n"]] for row in part],
            hovertemplate="%{y}, rank %{customdata[0]}, %{customdata[1]}<br>%{x:.4g} on %{customdata[2]} test "
            "examples<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(categoryorder="array", categoryarray=[f"trial {row['trial']}" for row in rows][::-1])
    metric = data.board.metric
    figure.update_layout(
        xaxis_title=f"test {metric.replace('_', ' ')} with its 95 % interval", height=160 + 22 * len(rows)
    )
    count = len(data.board.rows)
    return Drawn(
        title="Leaderboard", figure=figure,
        n=f"{len(rows)} of {count} ranked trials" if count > len(rows) else f"{count} ranked trials",
        says="Best on top; a filled dot is a trial that the test split cannot tell from the winner (paired bootstrap).",
    )  # fmt: skip


def _progress(data: StudyData) -> Drawn:
    rows = [row for row in data.ended if data.value(row) is not None]
    values = [data.value(row) for row in rows]
    best = _best_so_far(data, rows)
    hours = np.cumsum([row["device_seconds"] or 0.0 for row in data.ended]) / 3600
    spent = {row["number"]: hour for row, hour in zip(data.ended, hours, strict=True)}
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    for column, xs in ((1, list(range(1, len(rows) + 1))), (2, [spent[row["number"]] for row in rows])):
        for state, (colour, symbol) in STATES.items():
            part = [place for place, row in enumerate(rows) if row["state"] == state]
            if part:
                figure.add_scatter(
                    x=[xs[place] for place in part], y=[values[place] for place in part], mode="markers", name=state,
                    legendgroup=state, showlegend=column == 1, marker={"color": colour, "symbol": symbol, "size": 8},
                    text=[_hover(rows[place]) for place in part], hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
                    row=1, col=column,
                )  # fmt: skip
        figure.add_scatter(
            x=xs, y=best, mode="lines", line={"shape": "hv", "color": BLUE, "width": 2}, name="best so far",
            legendgroup="best", showlegend=column == 1, row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(title="finished trials", row=1, col=1)
    figure.update_xaxes(title="device-hours", row=1, col=2)
    figure.update_yaxes(title=data.objective, row=1, col=1)
    return Drawn(
        title="Search progress", figure=figure, n=f"{len(rows)} finished trials with a value",
        says="Where the line is flat, further trials have not paid for themselves.",
    )  # fmt: skip


def _best_so_far(data: StudyData, rows: Sequence[Row]) -> list[float]:
    values = np.array([data.value(row) for row in rows], dtype=np.float64)
    best: list[float] = (np.minimum if data.minimises else np.maximum).accumulate(values).tolist()
    return best


def _importances(data: StudyData) -> Drawn:
    found = sorted((data.importances or {}).items(), key=lambda item: item[1])
    figure = go.Figure()
    figure.add_bar(
        x=[value for _, value in found], y=[name for name, _ in found], orientation="h", marker={"color": BLUE},
        name="importance", hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(xaxis_title="share of importance", xaxis_range=[0, 1], height=160 + 28 * max(1, len(found)))
    finished = len(data.settings)
    warning = f"{finished} trials are too few to tell; take it as a hint" if found and finished < FEW_TRIALS else None
    if not found:
        warning = "there are not enough finished trials that differ to compute any"
    return Drawn(
        title="Which settings matter", figure=figure, n=f"{finished} finished trials",
        warning=warning,
        says="How much of what sets good trials apart each setting explains alone (PED-ANOVA, Watanabe et al. 2023).",
    )  # fmt: skip


def _axis(values: pd.Series[Any], *, is_log: bool) -> tuple[list[float], list[float] | None, list[str] | None]:
    """Values as numbers with their ticks: choices by place, logarithmic ranges by their logarithm."""
    if not _is_number(values):
        names = sorted({str(value) for value in values})
        return [float(names.index(str(value))) for value in values], list(map(float, range(len(names)))), names
    numbers = values.astype(float)
    if is_log:
        ticks = np.linspace(np.log10(numbers.min()), np.log10(numbers.max()), 5)
        return np.log10(numbers).tolist(), ticks.tolist(), [f"{10**tick:.2g}" for tick in ticks]
    return numbers.tolist(), None, None


def _is_number(values: pd.Series[Any]) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _log_axis(values: pd.Series[Any], *, is_log: bool) -> dict[str, Any]:
    """A logarithmic axis whose every tick is a whole number to read."""
    if not is_log:
        return {}
    low, high = float(values.min()), float(values.max())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    near = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    return {"type": "log", "tickvals": near, "ticktext": [f"{tick:g}" for tick in near]}


def _scale(data: StudyData, values: Sequence[float]) -> dict[str, Any]:
    """Colours of the objective, the best dark."""
    low, high = float(np.min(values)), float(np.quantile(values, 0.9 if data.minimises else 1.0))
    if not data.minimises:
        low = float(np.quantile(values, 0.1))
    return {"colorscale": "Cividis", "reversescale": not data.minimises, "cmin": low, "cmax": max(high, low + 1e-9)}


def _parallel(data: StudyData) -> Drawn:
    frame = data.settings
    figure = go.Figure()
    complete = frame.dropna(subset=data.params) if len(frame) else frame
    if len(complete):
        dimensions = []
        for name in data.params:
            values, ticks, labels = _axis(complete[name], is_log=data.is_log(name))
            dimensions.append({"label": name, "values": values, "tickvals": ticks, "ticktext": labels})
        dimensions.append({"label": data.objective, "values": complete["value"].tolist()})
        line = {"color": complete["value"].tolist(), "showscale": True, **_scale(data, complete["value"].tolist())}
        figure.add_parcoords(dimensions=dimensions, line=line, name="trials")
        figure.update_layout(margin_t=60)
    return Drawn(
        title="Settings side by side", figure=figure, n=f"{len(complete)} trials with all settings",
        says="A line is a trial, dark ones are good: drag along an axis to see only the trials through that part.",
    )  # fmt: skip


def _slices(data: StudyData) -> Drawn:
    frame = data.settings
    names = [name for name in data.params if len(frame) and frame[name].notna().any()]
    columns = min(3, max(1, len(names)))
    figure = make_subplots(
        rows=max(1, math.ceil(len(names) / columns)), cols=columns, shared_yaxes=True, vertical_spacing=0.16,
        horizontal_spacing=0.05,
    )  # fmt: skip
    for place, name in enumerate(names):
        row, column = place // columns + 1, place % columns + 1
        part = frame[frame[name].notna()]
        is_number = _is_number(part[name])
        for state, (colour, symbol) in STATES.items():
            chosen = part[part["state"] == state]
            if len(chosen):
                figure.add_scatter(
                    x=chosen[name].tolist() if is_number else [str(value) for value in chosen[name]],
                    y=chosen["value"].tolist(), mode="markers", name=state, legendgroup=state, showlegend=place == 0,
                    marker={"color": colour, "symbol": symbol, "size": 7}, customdata=chosen["trial"].tolist(),
                    hovertemplate="trial %{customdata}<br>%{x}: %{y:.4f}<extra></extra>", row=row, col=column,
                )  # fmt: skip
        is_log = is_number and data.is_log(name)
        figure.update_xaxes(title=name, **_log_axis(part[name], is_log=is_log), row=row, col=column)
        if column == 1:
            figure.update_yaxes(title=data.objective, row=row, col=column)
    figure.update_layout(height=120 + 260 * max(1, math.ceil(len(names) / columns)))
    return Drawn(
        title="Each setting against the result", figure=figure, n=f"{len(frame)} trials with a value",
        says="A setting whose good trials crowd at one end of its range asks for a wider range.",
    )  # fmt: skip


def _contours(data: StudyData) -> Drawn:
    """The learning rate (or the most important number) against the other numbers."""
    frame = data.settings
    numeric = [name for name in data.params if len(frame) and _is_number(frame[name]) and frame[name].nunique() > 1]
    first = "learning_rate" if "learning_rate" in numeric else (numeric[0] if numeric else "")
    others = [name for name in numeric if name != first][:3]
    figure = make_subplots(rows=1, cols=max(1, len(others)), shared_yaxes=True, horizontal_spacing=0.05)
    for place, name in enumerate(others):
        part = frame[frame[first].notna() & frame[name].notna()]
        common = {"row": 1, "col": place + 1}
        colours = _scale(data, part["value"].tolist())
        if len(part) >= 10 and min(part[name].nunique(), part[first].nunique()) > 2:
            figure.add_contour(**_grid(data, part, name, first, colours), **common)
        figure.add_scatter(
            x=part[name].tolist(), y=part[first].tolist(), mode="markers", name="trials", showlegend=False,
            marker={"color": part["value"].tolist(), "size": 8, "line": {"width": 1, "color": "#fff"}, **colours},
            customdata=part[["trial", "value"]].to_numpy().tolist(),
            hovertemplate="trial %{customdata[0]}: %{customdata[1]:.4f}<extra></extra>", **common,
        )  # fmt: skip
        for update, setting in ((figure.update_xaxes, name), (figure.update_yaxes, first)):
            title = setting if update == figure.update_xaxes or place == 0 else None
            update(title=title, **_log_axis(part[setting], is_log=data.is_log(setting)), **common)
    return Drawn(
        title=f"{first or 'Settings'} against other settings".replace("_", " ").capitalize(),
        figure=figure, n=f"{len(frame)} trials with a value",
        says=f"Dark is good ({data.objective}); between the trials the colours are interpolated, not measured.",
    )  # fmt: skip


def _grid(data: StudyData, part: pd.DataFrame, x: str, y: str, colours: dict[str, Any]) -> dict[str, Any]:
    """A contour through scattered trials, by linear interpolation where there are trials around."""
    from scipy.interpolate import LinearNDInterpolator
    from scipy.spatial import QhullError

    def forth(name: str) -> Any:
        values = part[name].astype(float)
        return np.log10(values) if data.is_log(name) else values

    def back(name: str, values: Any) -> Any:
        return 10**values if data.is_log(name) else values

    xs, ys = forth(x).to_numpy(), forth(y).to_numpy()
    grid_x, grid_y = np.linspace(xs.min(), xs.max(), 30), np.linspace(ys.min(), ys.max(), 30)
    try:
        between = LinearNDInterpolator(np.column_stack([xs, ys]), part["value"].to_numpy(), rescale=True)
        z = between(*np.meshgrid(grid_x, grid_y))
    except QhullError:  # all on a line
        z = np.full((30, 30), np.nan)
    return {
        "x": back(x, grid_x).tolist(), "y": back(y, grid_y).tolist(),
        "z": [[None if math.isnan(value) else value for value in row] for row in z.tolist()],
        "colorscale": colours["colorscale"], "reversescale": colours["reversescale"], "zmin": colours["cmin"],
        "zmax": colours["cmax"], "opacity": 0.6, "showscale": False, "hoverinfo": "skip", "line": {"width": 0},
    }  # fmt: skip


def _timeline(data: StudyData) -> Drawn:
    rows = sorted((row for row in data.trials if row["started_at"] is not None), key=lambda row: row["started_at"])
    ends = [row["ended_at"] for row in rows if row["ended_at"] is not None]
    now = max([*ends, *(row["started_at"] for row in rows)], default=None)
    hosts = {row["host"] for row in rows} - {None}
    only = hosts.pop() if len(hosts) == 1 else "unknown host"
    free: list[tuple[Any, str]] = []
    lanes = []
    for row in rows:
        # Which device of a host a trial had is not always known: the first lane of its host that is free.
        end, own = row["ended_at"] or now, row["host"] or only
        fitting = (place for place, (until, host) in enumerate(free) if until <= row["started_at"] and host == own)
        lane = next(fitting, len(free))
        free[lane : lane + 1] = [(end, own)]
        lanes.append(f"{_escaped(own)} #{lane}")
    figure = go.Figure()
    took = [((row["ended_at"] or now) - row["started_at"]).total_seconds() for row in rows]
    for state, (colour, _) in STATES.items():
        part = [place for place, row in enumerate(rows) if row["state"] == state]
        if part:
            figure.add_bar(
                base=[rows[place]["started_at"].isoformat() for place in part],
                x=[1000 * took[place] for place in part],
                y=[lanes[place] for place in part], orientation="h", name=state,
                marker={"color": colour, "line": {"width": 1, "color": "#fff"}},
                text=[str(rows[place]["number"]) for place in part], textposition="inside",
                customdata=[_hover(rows[place]) for place in part], hovertemplate="%{customdata}<extra></extra>",
            )  # fmt: skip
    figure.update_layout(
        barmode="overlay", xaxis_type="date", xaxis_title="time (UTC)", height=180 + 26 * len(set(lanes)),
    )  # fmt: skip
    return Drawn(
        title="Trials over time", figure=figure, n=f"{len(rows)} trials",
        says="Gaps are devices that waited; a trial that was taken up again spans its attempts.",
    )  # fmt: skip


def _compute(data: StudyData) -> Drawn:
    """Device-hours by how trials ended, and what pruning spared: the epochs not run, at the pace of those run."""
    spent: dict[str, float] = {}
    spared: dict[str, float] = {}
    for row in data.ended:
        hours = (row["device_seconds"] or 0.0) / 3600
        spent[row["state"]] = spent.get(row["state"], 0.0) + hours
        planned, run = row["settings"]["training"]["num_epochs"], row["last_epoch"] or 0.0
        if row["state"] in PRUNED and run > 0:
            spared[row["state"]] = spared.get(row["state"], 0.0) + hours * max(0.0, planned / run - 1)
    states = [state for state in STATES if state in spent]
    figure = go.Figure()
    figure.add_bar(
        x=states, y=[spent[state] for state in states], name="spent", marker={"color": BLUE},
        hovertemplate="%{x}: %{y:.3f} device-hours spent<extra></extra>",
    )  # fmt: skip
    figure.add_bar(
        x=states, y=[spared.get(state, 0.0) for state in states], name="spared by pruning",
        marker={"color": SKY, "pattern": {"shape": "/"}},
        hovertemplate="%{x}: %{y:.3f} device-hours spared<extra></extra>",
    )  # fmt: skip
    figure.update_layout(barmode="stack", yaxis_title="device-hours")
    total, saved = sum(spent.values()), sum(spared.values())
    share = 100 * saved / (total + saved) if total + saved else 0.0
    return Drawn(
        title="Compute spent and spared", figure=figure, n=f"{len(data.ended)} finished trials",
        says=f"Pruning spared {share:.0f} % of what the planned epochs of these trials would have cost, reckoned at "
        "each trial's own pace.",
    )  # fmt: skip


def _optimism(data: StudyData) -> Drawn:
    """Validation against test of ranked trials, in the metric's unit."""
    is_perplexity = data.board.metric == "perplexity" and data.minimises
    rows = [row for row in data.board.rows if _shown_validation(row, is_perplexity) is not None]
    figure = go.Figure()
    xs = [value for row in rows if (value := _shown_validation(row, is_perplexity)) is not None]
    figure.add_scatter(
        x=xs, y=[row["score"] for row in rows], mode="markers", name="ranked trials",
        error_y={
            "type": "data", "symmetric": False, "thickness": 1,
            "array": [row["score_high"] - row["score"] for row in rows],
            "arrayminus": [row["score"] - row["score_low"] for row in rows],
        },
        marker={"color": BLUE, "size": 8}, customdata=[row["trial"] for row in rows],
        hovertemplate="trial %{customdata}<br>validation %{x:.4g}, test %{y:.4g}<extra></extra>",
    )  # fmt: skip
    is_same_unit = is_perplexity or (not data.minimises and data.board.metric == data.study["objective"])
    if rows and is_same_unit:
        ends = [min(xs), max(xs)]
        figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", line={"dash": "dash", "color": BLACK})
    unit = "validation perplexity" if is_perplexity else data.objective
    figure.update_layout(xaxis_title=unit, yaxis_title=f"test {data.board.metric.replace('_', ' ')}")
    return Drawn(
        title="Validation against test", figure=figure, n=f"{len(rows)} ranked trials",
        says="The search saw the validation split only: trials that look better there than on the test split had luck.",
    )  # fmt: skip


def _shown_validation(row: Row, is_perplexity: bool) -> float | None:
    if row["valid_score"] is not None and not is_perplexity:
        return float(row["valid_score"])
    loss = row["valid_loss"]
    if loss is None:
        return None
    return math.exp(min(loss, 700.0)) if is_perplexity else float(loss)


def _trials(data: StudyData) -> Drawn:
    scores = {row["trial"]: row for row in data.board.rows}
    metric = data.board.metric.replace("_", " ")
    rows = []
    for row in data.trials:
        value, score = data.value(row), scores.get(row["number"])
        last = next((f"{point['epoch']:.4g}" for point in data.points[row["number"]][-1:]), "0")
        rows.append(
            [
                str(row["number"]),
                row["state"] + (" (pruned)" if row["state"] in PRUNED else ""),
                score_text(data.board.metric, score["score"]) if score else "-",
                "-" if value is None else f"{value:.4f}",
                last,
                ", ".join(f"{name} {short(it)}" for name, it in row["params"].items()),
                row["reason"] or "",
            ]
        )
    return Drawn(
        title="Every trial", n=f"{len(rows)} trials", lists_trials=True,
        table=(("trial", "state", f"test {metric}", data.objective, "epochs", "settings", "why it ended"), rows),
        says="Pruned are the trials that were ended before their last epoch, each with its reason.",
    )  # fmt: skip


def trial_figures(data: StudyData, trial: Row) -> list[Drawn]:
    """Figures of one trial (a row of `Store.whole_trial`): its curve, and what its task kept of it."""
    number = trial["number"]
    alone = replace(data, trials=[trial], points={number: trial["points"]}, details=trial["details"])
    found = [
        (_curves(alone), "Training against validation loss"),
        (_confusion(alone), "What it takes for what"),
        (_samples(alone), "What it says"),
    ]
    drawn = [replace(figure, title=title) for figure, title in found if figure is not None]
    verdicts = [
        [
            str(one["evaluation"]), one["verdict"], one["action"],
            ", ".join(f"{name} {short(it)}" for name, it in one["evidence"].items() if it is not None),
        ]
        for one in trial["decisions"]
    ]  # fmt: skip
    if verdicts:
        drawn.append(
            Drawn(
                title="Verdicts on its curve", n=f"{len(verdicts)} verdicts, each where it changed",
                table=(("evaluation", "verdict", "action", "evidence"), verdicts),
                says="What the overfitting rule saw after an evaluation, and what was done.",
            )
        )  # fmt: skip
    return drawn


def _confusion(data: StudyData) -> Drawn | None:
    confusion = data.details.get("confusion")
    if not confusion:
        return None
    counts = np.array(confusion["counts"])
    labels = [_escaped(label) for label in confusion["labels"]]
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure = go.Figure()
    figure.add_heatmap(
        x=labels, y=labels, z=shares.tolist(), colorscale="Cividis", reversescale=True, zmin=0, zmax=1,
        customdata=counts.tolist(), name="share", colorbar={"title": "share"},
        hovertemplate="%{y} taken for %{x}: %{customdata}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(xaxis_title="predicted", yaxis_title="true", yaxis_autorange="reversed", height=520)
    return Drawn(
        title="What the best trial takes for what", figure=figure,
        n=f"{int(counts.sum())} test texts",
        says="Each row is a true label and adds up to one; what is off the diagonal is a mistake.",
    )  # fmt: skip


def _samples(data: StudyData) -> Drawn | None:
    samples = data.details.get("samples")
    if not samples:
        return None
    rows = [[sample["source"], sample["output"], sample["reference"]] for sample in samples]
    return Drawn(
        title="What the best trial says", n=f"{len(rows)} test sentences",
        table=(("source", "its translation", "reference"), rows),
        says="Sentences of the test split at even distances, not chosen by how well they went.",
    )  # fmt: skip


def _comparison(studies: Sequence[StudyData]) -> Drawn | None:
    if len(studies) < 2:
        return None
    figure = go.Figure()
    for place, data in enumerate(studies):
        rows = [row for row in data.ended if data.value(row) is not None]
        hours = np.cumsum([row["device_seconds"] or 0.0 for row in rows]) / 3600
        figure.add_scatter(
            x=hours.tolist(), y=_best_so_far(data, rows), mode="lines+markers", name=_escaped(data.name),
            line={"shape": "hv", "color": _CURVE_COLOURS[place % len(_CURVE_COLOURS)]},
            marker={"symbol": list(STATES.values())[place % 6][1], "size": 7},
        )  # fmt: skip
    figure.update_layout(xaxis_title="device-hours", yaxis_title=studies[0].objective)
    return Drawn(
        title="Studies side by side", figure=figure, n=f"{len(studies)} studies",
        says="Best so far against what it cost; losses compare only where tokenizer and data are the same.",
    )  # fmt: skip


FIGURES: dict[str, Callable[[StudyData], Drawn | None]] = {
    "curves": _curves,
    "leaderboard": _board,
    "progress": _progress,
    "importances": _importances,
    "parallel": _parallel,
    "slices": _slices,
    "contours": _contours,
    "timeline": _timeline,
    "compute": _compute,
    "optimism": _optimism,
    "confusion": _confusion,
    "samples": _samples,
    "trials": _trials,
}
"""Figures of one study. Those that a task has nothing for are None."""
COMPARISONS: dict[str, Callable[[Sequence[StudyData]], Drawn | None]] = {"comparison": _comparison}
"""Figures of several studies; None for one."""
