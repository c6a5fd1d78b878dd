"""Pages of figures as HTML that needs nothing but a browser: one file, no request to anywhere. Owns jinja2.

Which figures a page has stands in `dashboards/*.yaml`. Whatever comes from a study is escaped: as text by the template,
within a figure's JSON by escapes that no HTML parser takes for markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import plotly.io
from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hpsearch.errors import UsageError
from hpsearch.figures import COMPARISONS, FIGURES, Drawn, StudyData
from hpsearch.ranking import count_states
from hpsearch.study_file import read_study_file

_PLACES = (Path(__file__).parents[1] / "dashboards", Path(sys.prefix) / "share" / "hpsearch" / "dashboards")
"""In a checkout, and where a wheel puts them."""
_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a file of `dashboards/` says."""

    title: str
    sections: list[tuple[str, list[str]]]
    """Titles with names of figures."""


@dataclass
class _Section:
    id: str
    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)


def read_page(name: str) -> Page:
    """A page by name, or by the path of a file of one's own. Raises UsageError."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else _standard_page(name)
    if not file.is_file():
        raise UsageError(f"there is no page {file}; expected a file of {_PLACES[0]}, or the path of one")
    content = read_study_file(file).content
    known = {**FIGURES, **COMPARISONS}
    problems = [f"unknown key '{key}'" for key in content if key not in ("title", "sections")]
    sections = []
    given = content.get("sections")
    if not isinstance(given, list) or not given:
        problems.append("expected 'sections', a list")
    for place, section in enumerate(given if isinstance(given, list) else []):
        if not isinstance(section, dict) or set(section) != {"title", "figures"}:
            problems.append(f"sections[{place}]: expected title and figures")
            continue
        names = section["figures"] if isinstance(section["figures"], list) else []
        unknown = [str(figure) for figure in names if figure not in known]
        problems += [f"sections[{place}]: there is no figure {figure!r}" for figure in unknown]
        sections.append((str(section["title"]), [str(figure) for figure in names]))
    if problems:
        raise UsageError(f"{file}: {'; '.join(problems)}; figures are {', '.join(known)}")
    return Page(title=str(content.get("title", file.stem)), sections=sections)


def _standard_page(name: str) -> Path:
    return next(
        (place / f"{name}.yaml" for place in _PLACES if (place / f"{name}.yaml").is_file()), _PLACES[0] / f"{name}.yaml"
    )


def render(page: Page, studies: Sequence[StudyData]) -> str:
    """The page as one HTML document, some 5 MB of it plotly's own code."""
    sections = []
    if len(studies) == 1:
        sections.append(_Section(id="study", title="Study", facts=_facts(studies[0])))
    for title, names in page.sections:
        compared = [figure for name in names if name in COMPARISONS and (figure := COMPARISONS[name](studies))]
        if compared:
            sections.append(_section(len(sections), title, compared))
        of_one = [name for name in names if name in FIGURES]
        for data in studies if of_one else ():
            figures = [figure for name in of_one if (figure := FIGURES[name](data))]
            shown = title if len(studies) == 1 else data.name
            section = _section(len(sections), shown, figures)
            if len(studies) > 1:
                section.facts = _facts(data)
            sections.append(section)
    title = " + ".join(data.name for data in studies)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    document: str = _template().render(
        title=f"{page.title}: {title}", subtitle=f"hpsearch report of {written}", sections=sections, plotly=_plotly()
    )
    return document


def _section(number: int, title: str, figures: Sequence[Drawn]) -> _Section:
    section = _Section(id=f"s{number}", title=title)
    for place, drawn in enumerate(figures):
        section.figures.append(
            {
                "id": f"f{number}-{place}",
                "title": drawn.title,
                "says": drawn.says,
                "n": drawn.n,
                "table": drawn.table,
                "warning": drawn.warning,
                "json": _json(drawn) if drawn.figure is not None else None,
            }
        )
    return section


def _json(drawn: Drawn) -> Markup:
    assert drawn.figure is not None
    figure = drawn.figure
    figure.update_layout(
        template="none",
        margin={"l": 70, "r": 20, "t": figure.layout.margin.t or 30, "b": 50},
        legend={"orientation": "h", "y": -0.2},
    )
    if figure.layout.height is None:
        figure.update_layout(height=450)
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    content = json.loads(plotly.io.to_json(figure, validate=False))
    text = json.dumps({"data": content["data"], "layout": content["layout"]}, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _facts(data: StudyData) -> list[tuple[str, str]]:
    """What the study is and how it went, in words."""
    states = count_states(data.trials)
    best = data.board.best
    facts = [
        ("task", str(data.study["task"]).replace("_", " ")),
        (
            "trials",
            ", ".join(f"{count} {state}" for state, count in states.items()) + f" of {data.study['budget_trials']}",
        ),
        ("objective", data.objective),
    ]
    if best is not None:
        score = f"{best['score']:.4g} ({best['score_low']:.4g} to {best['score_high']:.4g})"
        facts += [
            ("best", f"trial {best['trial']}, test {data.board.metric.replace('_', ' ')} {score}"),
            ("its settings", ", ".join(f"{name} {value}" for name, value in best["params"].items())),
        ]
    seconds = sum(row["device_seconds"] or 0.0 for row in data.trials)
    facts.append(("compute", f"{seconds / 3600:.2f} device-hours"))
    return facts


@cache
def _template() -> Any:
    return Environment(autoescape=True).from_string(_TEMPLATE.read_text())


@cache
def _plotly() -> Markup:
    # It stands within a script element, which nothing but this ends.
    return Markup(get_plotlyjs().replace("</script", "<\\/script"))
