"""The dashboard in a real browser while a study runs: it changes by itself, and keeps what a person has chosen."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.commands import HPSEARCH
from tests.conftest import TINY

pytestmark = pytest.mark.slow


@contextmanager
def process(*arguments: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [*HPSEARCH, *arguments], cwd=folder, env={**os.environ, "COLUMNS": "160"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield started
    finally:
        started.terminate()
        started.communicate(timeout=60)


def test_a_page_of_a_running_study_changes_by_itself(browser: Browser, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/studies.db"
    (tmp_path / "study.yaml").write_text(f"{TINY}store: {store}\nfolder: {tmp_path}/runs\n")
    long = ["--set=budget.trials=60", "--set=prune.overfit=false", "--set=prune.unpromising=none"]
    with process("launch", "study.yaml", "--quiet", *long, folder=tmp_path) as launched:
        while not (tmp_path / "studies.db").exists() or not list(tmp_path.glob("runs/tiny-*/logs/trial-00002*")):
            assert launched.poll() is None, launched.stderr and launched.stderr.read()
        with process("dashboard", "--port", "0", "--store", store, folder=tmp_path) as served:
            assert served.stderr is not None
            address = served.stderr.readline().split()[0].rstrip("/").removesuffix("/dashboard")
            page = browser.new_page()
            troubles: list[str] = []
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
            page.goto(address)
            page.click("text=tiny")
            page.wait_for_function("() => document.querySelector('.drawn')?.data")
            page.evaluate("drawAll(); window.untouched = true")
            ended = "() => +document.body.innerText.match(/([0-9]+) finished trials with a value/)[1]"
            hidden = (
                "() => [...document.querySelectorAll('.drawn')].flatMap(p => p.data)"
                ".filter(trace => trace.visible === 'legendonly').map(trace => trace.name)"
            )
            page.locator(".drawn", has=page.locator("text=finished trials")).locator(".legendtoggle").last.click()
            page.wait_for_function(f"() => ({hidden})().length > 0")
            before, chosen = page.evaluate(ended), page.evaluate(hidden)
            drawn = (
                "() => [...document.querySelectorAll('.drawn')].find(p => p.ariaLabel.startsWith('Search progress'))"
                ".data.at(-1).x.length"
            )
            page.wait_for_function(f"before => ({ended})() > before", arg=before, timeout=90_000)
            page.wait_for_function(f"before => ({drawn})() > before", arg=before, timeout=30_000)
            assert page.evaluate("window.untouched"), "without being loaded again"
            assert page.evaluate(hidden) == chosen, "what a person has hidden stays so"
            assert troubles == []
            page.goto(f"{address}/optuna/")
            page.wait_for_selector("text=tiny", timeout=60_000)
