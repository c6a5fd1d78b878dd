"""Takes the README's pictures of the live pages of the studies in the store, into dashboards/screenshots/."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from hpsearch.api import store_url, studies
from hpsearch.server.app import open_dashboard
from tests.browser import CHROMIUM

FOLDER = Path(__file__).parents[2] / "dashboards" / "screenshots"
WIDTH = 1000


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    name, best = studies()[0].name, studies()[0].best.trial
    with open_dashboard(store_url(), port=0) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": 700})
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.screenshot(path=FOLDER / "studies.png")
        page.goto(f"http://127.0.0.1:{server.server_port}/study?name={name}")
        page.evaluate("drawAll()")
        page.wait_for_function("() => [...document.querySelectorAll('.drawn')].every((place) => place.data)")
        page.wait_for_timeout(1000)
        page.screenshot(path=FOLDER / "study.png")
        page.click("td a >> nth=0")
        page.wait_for_url("**/trial?*")
        page.evaluate("drawAll()")
        page.wait_for_timeout(1000)
        page.screenshot(path=FOLDER / "trial.png")
        page.goto(f"http://127.0.0.1:{server.server_port}/study?name={name}")
        page.evaluate("drawAll()")
        page.wait_for_timeout(1000)
        figure = page.locator("figure", has=page.locator("text=Training against validation loss"))
        figure.screenshot(path=FOLDER / "curves.png")
        page.goto(f"http://127.0.0.1:{server.server_port}/dashboard/studies/1/trials?numbers={best}")
        page.wait_for_selector("text=The same settings again")
        page.screenshot(path=FOLDER / "optuna.png")
        browser.close()
        server.shutdown()


if __name__ == "__main__":
    main()
