"""How figures look: colours, shapes and axes that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hpsearch.reports.study_data import StudyData
from hpsearch.reports.text import short
from hpsearch.store.rows import TrialRow

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#777777",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#B8A800",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)


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


CURVE_COLOURS = (BLUE, ORANGE, GREEN, PINK, RED, SKY, YELLOW, BLACK)


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


def hover(row: TrialRow) -> str:
    """What the mouse tells of a trial. Plotly reads a little HTML in hovers, so that text is escaped."""
    settings = "<br>".join(f"{escaped(name)} {escaped(short(value))}" for name, value in row.params.items())
    return f"trial {row.number}: {row.state}<br>{settings}"


def escaped(text: Any) -> str:
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def axis(values: pd.Series[Any], *, is_log: bool) -> tuple[list[float], list[float] | None, list[str] | None]:
    """Values as numbers with their ticks: choices by place, logarithmic ranges by their logarithm."""
    if not is_numeric(values):
        names = sorted({str(value) for value in values})
        return [float(names.index(str(value))) for value in values], list(map(float, range(len(names)))), names
    numbers = values.astype(float)
    if is_log:
        ticks = np.linspace(np.log10(numbers.min()), np.log10(numbers.max()), 5)
        return np.log10(numbers).tolist(), ticks.tolist(), [f"{10**tick:.2g}" for tick in ticks]
    return numbers.tolist(), None, None


def is_numeric(values: pd.Series[Any]) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def log_axis(values: pd.Series[Any], *, is_log: bool) -> dict[str, Any]:
    """A logarithmic axis whose every tick is a whole number to read."""
    if not is_log:
        return {}
    low, high = float(values.min()), float(values.max())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    near = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    return {"type": "log", "tickvals": near, "ticktext": [f"{tick:g}" for tick in near]}


def value_axis(data: StudyData, values: Sequence[float]) -> dict[str, Any]:
    """Colours of the objective, the best dark."""
    low, high = float(np.min(values)), float(np.quantile(values, 0.9 if data.minimises else 1.0))
    if not data.minimises:
        low = float(np.quantile(values, 0.1))
    return {"colorscale": "Cividis", "reversescale": not data.minimises, "cmin": low, "cmax": max(high, low + 1e-9)}
