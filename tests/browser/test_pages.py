"""Pages in a real browser, reports as files and the dashboard live: all is drawn, nothing of a study is run."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, Page

import hpsearch as package
from hpsearch.integrations.optuna_dashboard import trial_note
from hpsearch.server.app import open_dashboard
from hpsearch.store.store import opened_store
from tests.conftest import Run

pytestmark = pytest.mark.slow
IMAGE = "<img src=x onerror=alert(1)>"
HOSTILE = "</script><img src=x onerror=alert(1)><b>"


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Open a document as a file; in the end nothing may have gone wrong in it or left for the network."""
    troubles: list[str] = []
    pages: list[Page] = []

    def open_page(document: str, **look: Any) -> Page:
        file = tmp_path / f"page-{len(pages)}.html"
        file.write_text(document)
        page = browser.new_page(**look)
        pages.append(page)
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"ran: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else troubles.append(request.url)
            ),
        )
        page.goto(file.as_uri())
        page.evaluate("drawAll()")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert troubles == []


def traces(page: Page, title: str) -> list[dict[str, Any]]:
    """What plotly has drawn under a title: name, kind and numbers of each trace."""
    found = page.evaluate(
        """title => {
          const place = [...document.querySelectorAll(".drawn")].find(
            (place) => place.ariaLabel.startsWith(title + ":"));
          return place.data.map(({name, type, x, y, marker}) => ({name, type, x, y, symbol: marker && marker.symbol}));
        }""",
        title,
    )
    return list(found)


def test_every_figure_of_a_study_is_drawn_with_its_trials(study: package.Study, opened: Callable[..., Page]) -> None:
    page = opened(package.report(study.name, store=study.store))
    titles = page.locator("h3").all_text_contents()
    assert titles == [
        "Leaderboard", "Validation against test", "Training against validation loss", "Search progress",
        "Which settings matter", "Each setting against the result", "Learning rate against other settings",
        "Settings side by side", "Compute spent and spared", "Trials over time", "Every trial",
    ]  # fmt: skip
    assert page.locator(".drawn").count() == len(titles) - 1
    assert page.locator("table").last.locator("tbody tr").count() == len(study.trials())
    assert page.locator(".drawn svg.main-svg").count() >= len(titles)
    assert page.locator("figcaption").count() == len(titles), "each says what it means"
    trials = study.trials()
    overfit = [trial.number for trial in trials if trial.state == "overfit"]
    assert overfit, "this study is made to overfit"
    curves = {trace["name"]: trace for trace in traces(page, "Training against validation loss")}
    number = overfit[0]
    points = study.trial(number).points
    assert curves[f"trial {number} (overfit)"]["y"] == [point.valid_loss for point in points]
    assert curves[f"trial {number} training"]["y"] == [point.train_loss for point in points]
    best = trials[number].best_evaluation
    assert curves[f"trial {number} best"]["x"] == [points[best - 1].epoch]
    assert curves[f"trial {number} pruned"]["x"] == [points[-1].epoch], "where its verdict fell"
    board = [trace for trace in traces(page, "Leaderboard") if trace["x"]]
    assert sorted(x for trace in board for x in trace["x"]) == [row.score for row in study.board().rows]
    spent = {trace["name"]: trace for trace in traces(page, "Compute spent and spared")}
    assert sum(spent["spent"]["y"]) == pytest.approx(sum(trial.device_seconds for trial in trials) / 3600)
    assert sum(spent["spared by pruning"]["y"]) > 0
    assert "5 finished trials" in page.inner_text("body")
    assert "too few to tell" in page.inner_text("body")


def test_a_trial_can_be_hidden_and_asked_with_the_mouse(study: package.Study, opened: Callable[..., Page]) -> None:
    page = opened(package.report(study.name, store=study.store), viewport={"width": 1200, "height": 900})
    plot = page.locator(".drawn", has=page.locator("text=epoch")).first
    plot.scroll_into_view_if_needed()
    toggle = plot.locator(".legendtoggle").first
    toggle.click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.drawn')].some(p => p.data && p.data.some(t => t.visible === 'legendonly'))"
    )
    page.evaluate(
        "() => { const p = [...document.querySelectorAll('.drawn')].find(p => p.ariaLabel.startsWith('Leaderboard'));"
        " p.scrollIntoView(); Plotly.Fx.hover(p, [{curveNumber: 0, pointNumber: 0}]); }"
    )
    assert "rank 1" in page.locator(".hoverlayer").first.text_content()


def test_it_is_readable_in_light_and_dark(study: package.Study, opened: Callable[..., Page]) -> None:
    document = package.report(study.name, store=study.store)
    for scheme, is_bright in (("light", False), ("dark", True)):
        page = opened(document, color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.querySelector('.xtitle')).fill")
        channels = [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        assert (min(channels) > 150) == is_bright, colour
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]


def test_nothing_that_a_study_says_is_run(study: package.Study, opened: Callable[..., Page], tmp_path: Path) -> None:
    file = tmp_path / "hostile.db"
    shutil.copy(study.store.removeprefix("sqlite:///"), file)
    with sqlite3.connect(file) as database:
        for identity, params in database.execute("SELECT id, params FROM hpsearch_trials").fetchall():
            hostile = json.dumps({**json.loads(params), f"config.{HOSTILE}": HOSTILE})
            database.execute(
                "UPDATE hpsearch_trials SET params = ?, reason = ? WHERE id = ?", (hostile, HOSTILE, identity)
            )
        database.execute("UPDATE hpsearch_studies SET name = ?", (HOSTILE,))
    page = opened(package.report(HOSTILE, store=f"sqlite:///{file}"))
    assert HOSTILE in page.inner_text("h1")
    assert page.locator("img[src='x']").count() == 0
    assert page.locator(".drawn svg.main-svg").count() >= 9


def test_a_study_with_one_trial_and_one_with_none_are_drawn(tiny: Path, opened: Callable[..., Page]) -> None:
    one = package.launch(tiny, trials=1)
    page = opened(package.report(one.name, store=one.store))
    assert "1 ranked trials" in page.inner_text("body")
    with sqlite3.connect(one.store.removeprefix("sqlite:///")) as database:
        for table in ("points", "scores", "decisions", "details", "examples"):
            database.execute(f"DELETE FROM hpsearch_{table}")
        database.execute("DELETE FROM hpsearch_trials")
    page = opened(package.report(one.name, store=one.store))
    assert "0 trials" in page.inner_text("body")
    assert page.locator(".drawn").count() >= 8


def test_studies_side_by_side(tiny: Path, opened: Callable[..., Page]) -> None:
    first = package.launch(tiny, trials=2)
    package.launch(tiny, trials=2, name="other", overrides=["seed=5"])
    page = opened(package.report("tiny", "other", store=first.store))
    assert [trace["name"] for trace in traces(page, "Studies side by side")] == ["tiny", "other"]
    assert page.locator("h2").all_text_contents() == ["Side by side", "tiny", "other"]


def test_the_command_writes_one_file_and_says_what_is_wrong(tiny: Path, tmp_path: Path, hpsearch: Run) -> None:
    study = package.launch(tiny, trials=1)
    done = hpsearch("report", "tiny", "--store", study.store)
    assert done.returncode == 0
    assert "wrote tiny.html" in done.stderr
    assert (tmp_path / "tiny.html").read_text().startswith("<!doctype html>")
    page = tmp_path / "mine.yaml"
    page.write_text("title: Mine\nsections: [{title: Only, figures: [curves]}]\n")
    done = hpsearch("report", "tiny", "--store", study.store, "--page", str(page), "-o", "-")
    assert done.stdout.count('<div class="drawn"') == 1
    page.write_text("title: Mine\nsections: [{title: Only, figures: [curvse]}]\n")
    done = hpsearch("report", "tiny", "--store", study.store, "--page", str(page))
    assert done.returncode == 2
    assert "there is no figure 'curvse'" in done.stderr
    done = hpsearch("report", "nope", "--store", study.store)
    assert done.returncode == 2
    assert "nope" in done.stderr
    assert "Traceback" not in done.stderr


# The dashboard


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[[str, str], Page]]:
    """Open a path of the dashboard of a store; in the end nothing may have gone wrong in a page."""
    troubles: list[str] = []
    pages: list[Page] = []
    servers = []

    def open_path(store: str, path: str) -> Page:
        opened = open_dashboard(store, port=0)
        server = opened.__enter__()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append((opened, server))
        page = browser.new_page()
        pages.append(page)
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"ran: {dialog.message}"), dialog.dismiss()))
        page.goto(f"http://127.0.0.1:{server.server_port}{path}")
        return page

    yield open_path
    for page in pages:
        page.close()
    for opened, server in servers:
        server.shutdown()
        opened.__exit__(None, None, None)
    assert troubles == []


def test_a_trial_has_a_page_that_its_study_leads_to(study: package.Study, visit: Callable[..., Page]) -> None:
    page = visit(study.store, "/")
    page.click(f'td a >> text="{study.name}"')
    overfit = next(trial for trial in study.trials() if trial.state == "overfit")
    page.click(f'td a >> text="{overfit.number}"')
    page.wait_for_url("**/trial?*")
    assert page.inner_text("h1") == f"Trial {overfit.number} of {study.name}"
    text = page.inner_text("main")
    assert overfit.reason in text
    assert "overfitting" in text
    assert f"hpsearch export {study.name} {overfit.number}" in text
    page.evaluate("drawAll()")
    drawn = page.evaluate("document.querySelector('.drawn').data.map(trace => ({name: trace.name, y: trace.y}))")
    points = study.trial(overfit.number).points
    assert [trace["y"] for trace in drawn if trace["name"].endswith("training")] == [[one.train_loss for one in points]]
    assert [trace["y"] for trace in drawn if trace["name"].endswith("pruned")] == [[points[-1].valid_loss]]
    page.click(f'td a >> text="{study.name}"')
    page.wait_for_url("**/study?*")


def test_a_trial_that_is_not_there_is_not_found(study: package.Study, visit: Callable[..., Page]) -> None:
    page = visit(study.store, "/healthz")
    answer = page.request.get(page.url.replace("/healthz", f"/trial?study={study.name}&number=99"))
    assert answer.status == 404
    assert "has no trial 99" in answer.text()


def test_the_optuna_dashboard_shows_our_curves_notes_and_artifacts(
    study: package.Study, visit: Callable[..., Page]
) -> None:
    page = visit(study.store, "/dashboard/studies/1")
    page.wait_for_selector("text=Training against validation loss")
    page.wait_for_selector("text=test perplexity with its 95 % interval")
    assert page.locator("text=(overfit)").count() >= 1
    overfit = next(trial for trial in study.trials() if trial.state == "overfit")
    page.goto(f"{page.url.rpartition('/dashboard')[0]}/dashboard/studies/1/trials?numbers={overfit.number}")
    page.wait_for_selector(f"text={overfit.reason}")
    page.wait_for_selector("text=o validation, . training loss")
    best = study.board().rows[0].trial
    page.goto(f"{page.url.rpartition('/dashboard')[0]}/dashboard/studies/1/trials?numbers={best}")
    page.wait_for_selector("text=model-card.md")
    page.goto(f"{page.url.rpartition('/dashboard')[0]}/dashboard/studies/1/note")
    page.wait_for_selector("text=validation would have chosen")
    assert page.locator("table tbody tr").count() == len(study.board().rows)


def test_nothing_of_a_study_runs_in_the_optuna_dashboard_or_our_pages(
    study: package.Study, visit: Callable[..., Page], tmp_path: Path
) -> None:
    file = tmp_path / "hostile.db"
    shutil.copy(study.store.removeprefix("sqlite:///"), file)
    evil = f"{IMAGE}</script>[x](javascript:alert(1))"
    trial = replace(study.trial(0), reason=evil, host=evil, params={evil: evil})
    with opened_store(study.store) as store:
        note = json.dumps(trial_note(replace(store.study(study.name), name=evil, overrides=[]), trial))
    with sqlite3.connect(file) as database:
        database.execute("UPDATE studies SET study_name = ?", (evil,))
        database.execute("UPDATE trial_user_attributes SET value_json = ?", (json.dumps(evil),))
        database.execute("UPDATE study_system_attributes SET value_json = ? WHERE key LIKE '%:note_str:0'", (note,))
        database.execute("UPDATE hpsearch_studies SET name = ?", (evil,))
        database.execute("UPDATE hpsearch_trials SET reason = ?, error = ?, host = ?", (evil, evil, evil))
    page = visit(f"sqlite:///{file}", "/dashboard/studies/1/trials?numbers=0")
    page.wait_for_selector("text=The whole story")
    home = page.url.rpartition("/dashboard")[0]
    for path in ("/dashboard/studies/1/note", "/dashboard", f"/trial?{urlencode({'study': evil, 'number': 0})}", "/"):
        page.goto(f"{home}{path}")
        page.wait_for_selector(f"text={IMAGE}")
        assert page.locator("img[src='x'], a[href^='javascript']").count() == 0
