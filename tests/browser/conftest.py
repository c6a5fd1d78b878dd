"""One browser for the tests of pages, and a study for them to show."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

import hpsearch as package
from tests.browser import CHROMIUM
from tests.conftest import TINY

OVERFITTING = """
training: {schedule: constant}
search:
  learning_rate: {min: 8e-3, max: 2e-2, scale: log}
  batch_size: 8
  num_layers: [1, 2]
  num_epochs: 30
prune: {unpromising: none}
"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium; `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [], timeout=120_000
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> package.Study:
    """Real trials on real text; a few of them overfit."""
    folder = tmp_path_factory.mktemp("study")
    head = TINY.split("training:")[0].replace("fraction: 0.08", "fraction: 0.02")
    file = folder / "study.yaml"
    file.write_text(
        f"{head}{OVERFITTING}budget: {{trials: 5}}\nresources: {{gpus_per_trial: 0}}\nbackend: inline\n"
        f"store: sqlite:///{folder}/studies.db\nfolder: {folder}/runs\n".replace("hidden_size: 32", "hidden_size: 64")
    )
    return package.launch(file)
