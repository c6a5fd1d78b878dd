"""Figures of the search: progress, importances, and where good settings lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpsearch.reports.study_data import StudyData
from hpsearch.reports.theme import (
    BLUE,
    CURVE_COLOURS,
    STATES,
    Drawn,
    axis,
    escaped,
    hover,
    is_numeric,
    log_axis,
    value_axis,
)
from hpsearch.store.rows import TrialRow

FEW_TRIALS = 20
"""Below so many finished trials an importance is a guess."""


def progress(data: StudyData) -> Drawn:
    rows = [row for row in data.ended if data.value(row) is not None]
    values = [data.value(row) for row in rows]
    best = _best_so_far(data, rows)
    hours = np.cumsum([row.device_seconds or 0.0 for row in data.ended]) / 3600
    spent = {row.number: hour for row, hour in zip(data.ended, hours, strict=True)}
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    for column, xs in ((1, list(range(1, len(rows) + 1))), (2, [spent[row.number] for row in rows])):
        for state, (colour, symbol) in STATES.items():
            part = [place for place, row in enumerate(rows) if row.state == state]
            if part:
                figure.add_scatter(
                    x=[xs[place] for place in part],
                    y=[values[place] for place in part],
                    mode="markers",
                    name=state,
                    legendgroup=state,
                    showlegend=column == 1,
                    marker={"color": colour, "symbol": symbol, "size": 8},
                    text=[hover(rows[place]) for place in part],
                    hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
                    row=1,
                    col=column,
                )
        figure.add_scatter(
            x=xs,
            y=best,
            mode="lines",
            line={"shape": "hv", "color": BLUE, "width": 2},
            name="best so far",
            legendgroup="best",
            showlegend=column == 1,
            row=1,
            col=column,
        )
    figure.update_xaxes(title="finished trials", row=1, col=1)
    figure.update_xaxes(title="device-hours", row=1, col=2)
    figure.update_yaxes(title=data.objective, row=1, col=1)
    return Drawn(
        title="Search progress",
        figure=figure,
        n=f"{len(rows)} finished trials with a value",
        says="Where the line is flat, further trials have not paid for themselves.",
    )


def _best_so_far(data: StudyData, rows: Sequence[TrialRow]) -> list[float]:
    values = np.array([data.value(row) for row in rows], dtype=np.float64)
    best: list[float] = (np.minimum if data.minimises else np.maximum).accumulate(values).tolist()
    return best


def importances(data: StudyData) -> Drawn:
    found = sorted((data.importances or {}).items(), key=lambda item: item[1])
    figure = go.Figure()
    figure.add_bar(
        x=[value for _, value in found],
        y=[name for name, _ in found],
        orientation="h",
        marker={"color": BLUE},
        name="importance",
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )
    figure.update_layout(xaxis_title="share of importance", xaxis_range=[0, 1], height=160 + 28 * max(1, len(found)))
    finished = len(data.settings)
    warning = f"{finished} trials are too few to tell; take it as a hint" if found and finished < FEW_TRIALS else None
    if not found:
        warning = "there are not enough finished trials that differ to compute any"
    return Drawn(
        title="Which settings matter",
        figure=figure,
        n=f"{finished} finished trials",
        warning=warning,
        says="How much of what sets good trials apart each setting explains alone (PED-ANOVA, Watanabe et al. 2023).",
    )


def parallel(data: StudyData) -> Drawn:
    frame = data.settings
    figure = go.Figure()
    complete = frame.dropna(subset=data.params) if len(frame) else frame
    if len(complete):
        dimensions = []
        for name in data.params:
            values, ticks, labels = axis(complete[name], is_log=data.is_log(name))
            dimensions.append({"label": name, "values": values, "tickvals": ticks, "ticktext": labels})
        dimensions.append({"label": data.objective, "values": complete["value"].tolist()})
        line = {"color": complete["value"].tolist(), "showscale": True, **value_axis(data, complete["value"].tolist())}
        figure.add_parcoords(dimensions=dimensions, line=line, name="trials")
        figure.update_layout(margin_t=60)
    return Drawn(
        title="Settings side by side",
        figure=figure,
        n=f"{len(complete)} trials with all settings",
        says="A line is a trial, dark ones are good: drag along an axis to see only the trials through that part.",
    )


def slices(data: StudyData) -> Drawn:
    frame = data.settings
    names = [name for name in data.params if len(frame) and frame[name].notna().any()]
    columns = min(3, max(1, len(names)))
    figure = make_subplots(
        rows=max(1, math.ceil(len(names) / columns)),
        cols=columns,
        shared_yaxes=True,
        vertical_spacing=0.16,
        horizontal_spacing=0.05,
    )
    for place, name in enumerate(names):
        row, column = place // columns + 1, place % columns + 1
        part = frame[frame[name].notna()]
        is_number = is_numeric(part[name])
        for state, (colour, symbol) in STATES.items():
            chosen = part[part["state"] == state]
            if len(chosen):
                figure.add_scatter(
                    x=chosen[name].tolist() if is_number else [str(value) for value in chosen[name]],
                    y=chosen["value"].tolist(),
                    mode="markers",
                    name=state,
                    legendgroup=state,
                    showlegend=place == 0,
                    marker={"color": colour, "symbol": symbol, "size": 7},
                    customdata=chosen["trial"].tolist(),
                    hovertemplate="trial %{customdata}<br>%{x}: %{y:.4f}<extra></extra>",
                    row=row,
                    col=column,
                )
        is_log = is_number and data.is_log(name)
        figure.update_xaxes(title=name, **log_axis(part[name], is_log=is_log), row=row, col=column)
        if column == 1:
            figure.update_yaxes(title=data.objective, row=row, col=column)
    figure.update_layout(height=120 + 260 * max(1, math.ceil(len(names) / columns)))
    return Drawn(
        title="Each setting against the result",
        figure=figure,
        n=f"{len(frame)} trials with a value",
        says="A setting whose good trials crowd at one end of its range asks for a wider range.",
    )


def contours(data: StudyData) -> Drawn:
    """The learning rate (or the most important number) against the other numbers."""
    frame = data.settings
    numeric = [name for name in data.params if len(frame) and is_numeric(frame[name]) and frame[name].nunique() > 1]
    first = "learning_rate" if "learning_rate" in numeric else (numeric[0] if numeric else "")
    others = [name for name in numeric if name != first][:3]
    figure = make_subplots(rows=1, cols=max(1, len(others)), shared_yaxes=True, horizontal_spacing=0.05)
    for place, name in enumerate(others):
        part = frame[frame[first].notna() & frame[name].notna()]
        common = {"row": 1, "col": place + 1}
        colours = value_axis(data, part["value"].tolist())
        if len(part) >= 10 and min(part[name].nunique(), part[first].nunique()) > 2:
            figure.add_contour(**_grid(data, part, name, first, colours), **common)
        figure.add_scatter(
            x=part[name].tolist(),
            y=part[first].tolist(),
            mode="markers",
            name="trials",
            showlegend=False,
            marker={"color": part["value"].tolist(), "size": 8, "line": {"width": 1, "color": "#fff"}, **colours},
            customdata=part[["trial", "value"]].to_numpy().tolist(),
            hovertemplate="trial %{customdata[0]}: %{customdata[1]:.4f}<extra></extra>",
            **common,
        )
        for update, setting in ((figure.update_xaxes, name), (figure.update_yaxes, first)):
            title = setting if update == figure.update_xaxes or place == 0 else None
            update(title=title, **log_axis(part[setting], is_log=data.is_log(setting)), **common)
    return Drawn(
        title=f"{first or 'Settings'} against other settings".replace("_", " ").capitalize(),
        figure=figure,
        n=f"{len(frame)} trials with a value",
        says=f"Dark is good ({data.objective}); between the trials the colours are interpolated, not measured.",
    )


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
        "x": back(x, grid_x).tolist(),
        "y": back(y, grid_y).tolist(),
        "z": [[None if math.isnan(value) else value for value in row] for row in z.tolist()],
        "colorscale": colours["colorscale"],
        "reversescale": colours["reversescale"],
        "zmin": colours["cmin"],
        "zmax": colours["cmax"],
        "opacity": 0.6,
        "showscale": False,
        "hoverinfo": "skip",
        "line": {"width": 0},
    }


def comparison(studies: Sequence[StudyData]) -> Drawn | None:
    if len(studies) < 2:
        return None
    figure = go.Figure()
    for place, data in enumerate(studies):
        rows = [row for row in data.ended if data.value(row) is not None]
        hours = np.cumsum([row.device_seconds or 0.0 for row in rows]) / 3600
        figure.add_scatter(
            x=hours.tolist(),
            y=_best_so_far(data, rows),
            mode="lines+markers",
            name=escaped(data.name),
            line={"shape": "hv", "color": CURVE_COLOURS[place % len(CURVE_COLOURS)]},
            marker={"symbol": list(STATES.values())[place % 6][1], "size": 7},
        )
    figure.update_layout(xaxis_title="device-hours", yaxis_title=studies[0].objective)
    return Drawn(
        title="Studies side by side",
        figure=figure,
        n=f"{len(studies)} studies",
        says="Best so far against what it cost; losses compare only where tokenizer and data are the same.",
    )
