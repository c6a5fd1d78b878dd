"""Figures of training: loss curves, and what the best trial answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go

from hpsearch.records import PRUNED
from hpsearch.reports.study_data import StudyData
from hpsearch.reports.text import short
from hpsearch.reports.theme import CURVE_COLOURS, Drawn, escaped, hover
from hpsearch.spec.task import known_task
from hpsearch.store.rows import PointRow, WholeTrial

_CURVES = 8
"""Trials whose curves are drawn in colour; of the others the validation loss alone, in grey."""
_MOST_POINTS = 40_000
"""Points of grey curves in a figure; more are thinned out."""


def curves(data: StudyData) -> Drawn:
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
        xs += [point.epoch for point in kept] + [None]
        ys += [point.valid_loss for point in kept] + [None]
    if xs:
        figure.add_scattergl(
            x=xs,
            y=ys,
            mode="lines",
            name="other trials",
            line={"color": "rgba(128,128,128,0.35)", "width": 1},
            hoverinfo="skip",
        )
    rows = {row.number: row for row in data.trials}
    for place, number in enumerate(shown):
        points, row = data.points[number], rows[number]
        colour = CURVE_COLOURS[place % len(CURVE_COLOURS)]
        common = {"legendgroup": str(number), "x": [point.epoch for point in points]}
        figure.add_scatter(
            **common,
            y=[point.train_loss for point in points],
            mode="lines",
            showlegend=False,
            line={"color": colour, "dash": "dot", "width": 1.5},
            name=f"trial {number} training",
            hovertemplate=f"training, trial {number}<br>epoch %{{x:.2f}}: %{{y:.4f}}<extra></extra>",
        )
        figure.add_scatter(
            **common,
            y=[point.valid_loss for point in points],
            mode="lines",
            line={"color": colour, "width": 2},
            name=f"trial {number} ({row.state})",
            hovertemplate=f"validation, {hover(row)}<br>epoch %{{x:.2f}}: %{{y:.4f}}<extra></extra>",
        )
        best = row.best_evaluation
        if best is not None and best <= len(points):
            figure.add_scatter(
                x=[points[best - 1].epoch],
                y=[points[best - 1].valid_loss],
                mode="markers",
                showlegend=False,
                legendgroup=str(number),
                marker={"symbol": "star", "size": 12, "color": colour},
                name=f"trial {number} best",
                hovertemplate=f"best checkpoint of trial {number}<br>epoch %{{x:.2f}}: %{{y:.4f}}<extra></extra>",
            )
        if row.state in PRUNED:
            figure.add_scatter(
                x=[points[-1].epoch],
                y=[points[-1].valid_loss],
                mode="markers",
                showlegend=False,
                legendgroup=str(number),
                name=f"trial {number} pruned",
                marker={"symbol": "x", "size": 10, "color": colour},
                hovertemplate=f"pruned: {escaped(row.reason or row.state)}<extra></extra>",
            )
    task = known_task(data.study.task)
    unit = f" ({task.loss_unit})" if task else ""
    figure.update_layout(xaxis_title="epoch", yaxis_title=f"loss{unit}", hovermode="closest")
    low, high = _usual_range([point for number in data.points for point in data.points[number]])
    if high > low:
        figure.update_yaxes(range=[low, high])
    drawn = len([points for points in data.points.values() if points])
    return Drawn(
        title="Training against validation loss",
        figure=figure,
        n=f"{drawn} trials",
        says="Dotted is training, solid validation: where the dotted line keeps falling and the solid one rises, the "
        "run overfits. A star marks the best checkpoint, a cross where the run was pruned. Click a trial to hide it.",
    )


def _usual_range(points: Sequence[PointRow]) -> tuple[float, float]:
    """A range of losses that a few exploding runs do not stretch."""
    losses = [value for point in points for value in (point.train_loss, point.valid_loss) if value is not None]
    if not losses:
        return 0.0, 0.0
    low, high = float(np.min(losses)), float(np.quantile(losses, 0.99))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _curves_to_show(data: StudyData) -> list[int]:
    """The best trials and the clearest overfit ones, by number."""
    best = [row.trial for row in data.board.rows if data.points.get(row.trial)]
    overfit = [row.number for row in data.trials if row.state == "overfit" and data.points[row.number]]
    running = [row.number for row in data.trials if row.state == "running" and data.points[row.number]]
    rest = [number for number, points in data.points.items() if points]
    wanted = dict.fromkeys([*best[: _CURVES // 2], *overfit[: _CURVES // 4], *running, *best, *overfit, *rest])
    return sorted(list(wanted)[:_CURVES])


def trial_figures(data: StudyData, trial: WholeTrial) -> list[Drawn]:
    """Figures of one trial (a row of `Store.whole_trial`): its curve, and what its task kept of it."""
    number = trial.number
    alone = replace(data, trials=[trial], points={number: trial.points}, details=trial.details)
    found = [
        (curves(alone), "Training against validation loss"),
        (confusion(alone), "What it takes for what"),
        (samples(alone), "What it says"),
    ]
    drawn = [replace(figure, title=title) for figure, title in found if figure is not None]
    verdicts = [
        [
            str(one.evaluation),
            one.verdict,
            one.action,
            ", ".join(f"{name} {short(it)}" for name, it in one.evidence.items() if it is not None),
        ]
        for one in trial.decisions
    ]
    if verdicts:
        drawn.append(
            Drawn(
                title="Verdicts on its curve",
                n=f"{len(verdicts)} verdicts, each where it changed",
                table=(("evaluation", "verdict", "action", "evidence"), verdicts),
                says="What the overfitting rule saw after an evaluation, and what was done.",
            )
        )
    return drawn


def confusion(data: StudyData) -> Drawn | None:
    confusion = data.details.get("confusion")
    if not confusion:
        return None
    counts = np.array(confusion["counts"])
    labels = [escaped(label) for label in confusion["labels"]]
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure = go.Figure()
    figure.add_heatmap(
        x=labels,
        y=labels,
        z=shares.tolist(),
        colorscale="Cividis",
        reversescale=True,
        zmin=0,
        zmax=1,
        customdata=counts.tolist(),
        name="share",
        colorbar={"title": "share"},
        hovertemplate="%{y} taken for %{x}: %{customdata}<extra></extra>",
    )
    figure.update_layout(xaxis_title="predicted", yaxis_title="true", yaxis_autorange="reversed", height=520)
    return Drawn(
        title="What the best trial takes for what",
        figure=figure,
        n=f"{int(counts.sum())} test texts",
        says="Each row is a true label and adds up to one; what is off the diagonal is a mistake.",
    )


def samples(data: StudyData) -> Drawn | None:
    samples = data.details.get("samples")
    if not samples:
        return None
    rows = [[sample["source"], sample["output"], sample["reference"]] for sample in samples]
    return Drawn(
        title="What the best trial says",
        n=f"{len(rows)} test examples",
        table=(("source", "what it says", "reference"), rows),
        says="Examples of the test split at even distances, not chosen by how well they went.",
    )
