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
from urllib.parse import urlencode

import plotly.io
from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hpsearch.errors import UsageError
from hpsearch.figures import COMPARISONS, FIGURES, Drawn, StudyData
from hpsearch.leases import is_held
from hpsearch.ranking import count_states
from hpsearch.store import Row
from hpsearch.study_file import read_study_file
from hpsearch.trial import LIVE, TrialState

_PLACES = (Path(__file__).parents[1] / "dashboards", Path(sys.prefix) / "share" / "hpsearch" / "dashboards")
"""In a checkout, and where a wheel puts them."""
UNFINISHED = {state.value for state in (*LIVE, TrialState.INTERRUPTED)}
_TEMPLATE = Path(__file__).with_name("page.html")


REFRESH_MS = 5000
"""How often a live page asks for newer numbers, while somebody looks at it."""


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


def render(page: Page, studies: Sequence[StudyData], *, is_live: bool = False) -> str:
    """The page as one HTML document, some 5 MB of it plotly's own code.

    One that `is_live` takes that code from its server, and its numbers every few seconds.
    """
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
    return _document(f"{page.title}: {' + '.join(data.name for data in studies)}", sections, is_live=is_live)


def render_index(studies: Sequence[Row]) -> str:
    """All studies of a store (rows of `Store.studies`) with links to their live pages."""
    rows = []
    for study in studies:
        best, lease = study["best"], study["lease"]
        ended = sum(count for state, count in study["states"].items() if state not in UNFINISHED)
        rows.append(
            [
                {"text": study["name"], "href": f"/study?{urlencode({'name': study['name']})}"},
                str(study["task"]).replace("_", " "),
                f"{ended} of {study['budget_trials']}",
                ", ".join(f"{count} {state}" for state, count in sorted(study["states"].items())) or "none yet",
                f"{study['metric'].replace('_', ' ')} {best['score']:.4g} (trial {best['trial']})" if best else "-",
                lease["holder"] if is_held(lease) else "-",
            ]
        )
    heads = ("study", "task", "trials ended", "states", "best on the test split", "driver")
    section = _Section(id="studies", title="Studies")
    section.figures.append({"table": (heads, rows)})
    return _document("hpsearch", [section], is_live=True)


def plotly_script() -> str:
    """What live pages load once."""
    return str(_plotly())


def _document(title: str, sections: Sequence[_Section], *, is_live: bool) -> str:
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    document: str = _template().render(
        title=title,
        subtitle=f"as of {written}",
        sections=sections,
        plotly="" if is_live else _plotly(),
        is_live=is_live,
        refresh_ms=REFRESH_MS,
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
            ("its settings", ", ".join(f"{name} {_short(value)}" for name, value in best["params"].items())),
        ]
    seconds = sum(row["device_seconds"] or 0.0 for row in data.trials)
    facts.append(("compute", f"{seconds / 3600:.2f} device-hours"))
    return facts


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@cache
def _template() -> Any:
    return Environment(autoescape=True).from_string(_TEMPLATE.read_text())


@cache
def _plotly() -> Markup:
    # It stands within a script element, which nothing but this ends.
    return Markup(get_plotlyjs().replace("</script", "<\\/script"))
