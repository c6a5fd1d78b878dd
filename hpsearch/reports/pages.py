"""Pages of figures as HTML that needs nothing but a browser: one file, no request to anywhere. Owns jinja2.

Which figures a page has stands in `dashboards/*.yaml`. Whatever comes from a study is escaped: as text by the template,
within a figure's JSON by escapes that no HTML parser takes for markup.
"""

from __future__ import annotations

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
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from pydantic import Field, ValidationError, field_validator

from hpsearch.errors import Problem, UsageError
from hpsearch.records import UNFINISHED
from hpsearch.reports.curves import trial_figures
from hpsearch.reports.figures import COMPARISONS, FIGURES
from hpsearch.reports.study_data import StudyData
from hpsearch.reports.text import short, trial_commands, trial_facts
from hpsearch.reports.theme import Drawn
from hpsearch.results.leaderboard import count_states
from hpsearch.spec.parsing.space import readable
from hpsearch.spec.parsing.yaml_file import read_study_file
from hpsearch.spec.settings import Strict
from hpsearch.store.rows import StudySummary, WholeTrial

_PLACES = (Path(__file__).parents[2] / "dashboards", Path(sys.prefix) / "share" / "hpsearch" / "dashboards")
"""In a checkout, and where a wheel puts them."""
_TEMPLATE = Path(__file__).with_name("page.html")
REFRESH_MS = 5000
"""How often a live page asks for newer numbers, while somebody looks at it."""


class PageSection(Strict):
    """Figures below a heading."""

    title: str
    figures: list[str]

    @field_validator("figures")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        known = (*FIGURES, *COMPARISONS)
        for name in names:
            if name not in known:
                raise ValueError(f"there is no figure {name!r}; there are {', '.join(known)}")
        return names


class Page(Strict):
    """What a file of `dashboards/` says."""

    title: str
    sections: list[PageSection] = Field(min_length=1)


@dataclass
class _Section:
    id: str
    title: str
    facts: list[tuple[str, Any]] = field(default_factory=list)
    """Names and values; a value can be a link, `{text, href}`."""
    figures: list[dict[str, Any]] = field(default_factory=list)


def read_page(name: str) -> Page:
    """A page by name, or by the path of a file of one's own. Raises UsageError, SpecError."""
    standard = [place / f"{name}.yaml" for place in _PLACES]
    file = next((file for file in (*standard, Path(name)) if file.is_file()), None)
    if file is None:
        raise UsageError(f"there is no page {name}: neither a file of {_PLACES[0]} nor the path of one")
    document = read_study_file(file)
    try:
        return Page.model_validate(document.content)
    except ValidationError as error:
        problems = [Problem(path=found["loc"], message=readable(found)) for found in error.errors()]
        raise document.error(problems) from None


def render(page: Page, studies: Sequence[StudyData], *, is_live: bool = False) -> str:
    """The page as one HTML document, some 5 MB of it plotly's own code.

    One that `is_live` takes that code from its server, and its numbers every few seconds.
    """
    sections = []
    if len(studies) == 1:
        sections.append(_Section(id="study", title="Study", facts=_facts(studies[0])))
    for title, names in ((section.title, section.figures) for section in page.sections):
        compared = [figure for name in names if name in COMPARISONS and (figure := COMPARISONS[name](studies))]
        if compared:
            sections.append(_section(len(sections), title, compared))
        of_one = [name for name in names if name in FIGURES]
        for data in studies if of_one else ():
            figures = [figure for name in of_one if (figure := FIGURES[name](data))]
            shown = title if len(studies) == 1 else data.name
            section = _section(len(sections), shown, figures, links_from=data.name if is_live else None)
            if len(studies) > 1:
                section.facts = _facts(data)
            sections.append(section)
    return _document(f"{page.title}: {' + '.join(data.name for data in studies)}", sections, is_live=is_live)


def render_index(studies: Sequence[StudySummary]) -> str:
    """All studies of a store (rows of `Store.studies`) with links to their live pages."""
    rows = []
    for study in studies:
        best, lease = study.best, study.lease
        ended = sum(count for state, count in study.states.items() if state not in UNFINISHED)
        rows.append(
            [
                {"text": study.name, "href": f"/study?{urlencode({'name': study.name})}"},
                str(study.task).replace("_", " "),
                f"{ended} of {study.budget_trials}",
                ", ".join(f"{count} {state}" for state, count in sorted(study.states.items())) or "none yet",
                f"{study.metric.replace('_', ' ')} {best.score:.4g} (trial {best.trial})" if best else "-",
                lease.holder if lease is not None and lease.is_held else "-",
            ]
        )
    heads = ("study", "task", "trials ended", "states", "best on the test split", "driver")
    section = _Section(id="studies", title="Studies")
    section.figures.append({"table": (heads, rows)})
    return _document("hpsearch", [section], is_live=True)


def render_trial(data: StudyData, trial: WholeTrial) -> str:
    """The live page of one trial (a row of `Store.whole_trial`)."""
    name, number = data.name, trial.number
    link = {"text": name, "href": f"/study?{urlencode({'name': name})}"}
    facts = _Section(id="trial", title="Trial", facts=[("study", link), *_trial_facts(data, trial)])
    sections = [facts, _section(1, "Training", trial_figures(data, trial))]
    if trial.error:
        sections.append(_Section(id="error", title="Error", facts=[("traceback", trial.error)]))
    sections.append(_Section(id="on", title="Next steps", facts=trial_commands(data.study, trial)))
    return _document(f"Trial {number} of {name}", sections, is_live=True)


def _trial_link(study: str, number: str) -> dict[str, str]:
    return {"text": number, "href": f"/trial?{urlencode({'study': study, 'number': number})}"}


def _trial_facts(data: StudyData, trial: WholeTrial) -> list[tuple[str, Any]]:
    settings = {**trial.settings["model"], **trial.settings["training"]}
    fixed = {name: value for name, value in settings.items() if name not in trial.params and value not in (None, {})}
    rank = next((row.tie for row in data.board.rows if row.trial == trial.number), None)
    return [
        *trial_facts(trial),
        *([("rank", rank)] if rank else []),
        ("sampled", ", ".join(f"{name} {short(value)}" for name, value in trial.params.items()) or "nothing"),
        ("fixed", ", ".join(f"{name} {short(value)}" for name, value in fixed.items())),
        ("checkpoint", trial.checkpoint or "none is kept"),
    ]


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


def _section(number: int, title: str, figures: Sequence[Drawn], *, links_from: str | None = None) -> _Section:
    """A section; trials that a table lists are links to their pages when the study is named that they are of."""
    section = _Section(id=f"s{number}", title=title)
    for place, drawn in enumerate(figures):
        table: Any = drawn.table
        if drawn.table is not None and drawn.lists_trials and links_from is not None:
            heads, rows = drawn.table
            table = heads, [[_trial_link(links_from, row[0]), *row[1:]] for row in rows]
        section.figures.append(
            {
                "id": f"f{number}-{place}",
                "title": drawn.title,
                "says": drawn.says,
                "n": drawn.n,
                "table": table,
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
    return htmlsafe_json_dumps(figure, dumps=plotly.io.to_json, validate=False)


def _facts(data: StudyData) -> list[tuple[str, str]]:
    """What the study is and how it went, in words."""
    states = count_states(data.trials)
    best = data.board.best
    facts = [
        ("task", str(data.study.task).replace("_", " ")),
        (
            "trials",
            ", ".join(f"{count} {state}" for state, count in states.items()) + f" of {data.study.budget_trials}",
        ),
        ("objective", data.objective),
    ]
    if best is not None:
        score = f"{best.score:.4g} ({best.score_low:.4g} to {best.score_high:.4g})"
        facts += [
            ("best", f"trial {best.trial}, test {data.board.metric.replace('_', ' ')} {score}"),
            ("its settings", ", ".join(f"{name} {short(value)}" for name, value in best.params.items())),
        ]
    seconds = sum(row.device_seconds or 0.0 for row in data.trials)
    facts.append(("compute", f"{seconds / 3600:.2f} device-hours"))
    return facts


@cache
def _template() -> Any:
    return Environment(autoescape=True).from_string(_TEMPLATE.read_text())


@cache
def _plotly() -> Markup:
    # It stands within a script element, which nothing but this ends.
    return Markup(get_plotlyjs().replace("</script", "<\\/script"))
