"""The dashboard as a server of its own: it shows a real study, and refuses what it should."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import psutil
import pytest

from hpsearch.server.app import Guard
from tests.commands import HPSEARCH
from tests.conftest import Run

pytestmark = pytest.mark.slow
TOKEN = "a-token-of-some-length"
Ask = Callable[..., tuple[int, dict[str, str], bytes]]


@contextmanager
def serving(folder: Path, *arguments: str, token: str = "") -> Iterator[Ask]:
    process = subprocess.Popen(
        [*HPSEARCH, "dashboard", "--port=0", "--store", f"sqlite:///{folder}/studies.db", *arguments],
        env={**os.environ, "HPSEARCH_DASHBOARD_TOKEN": token}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("http://"), said + process.stderr.read()
        assert TOKEN not in said
        port = int(said.split(":")[2].split("/")[0])

        def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            body = "{}" if method in ("POST", "PUT") else None
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Content-Type": "application/json", **named})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

        ask.port, ask.pid = port, process.pid  # type: ignore[attr-defined]
        yield ask
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a finished study in it."""
    import hpsearch
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "study.yaml").write_text(f"{TINY}store: sqlite:///{folder}/studies.db\nfolder: {folder}/runs\n")
    hpsearch.launch(folder / "study.yaml", trials=2)
    return folder


def test_it_shows_the_study_and_changes_nothing(folder: Path) -> None:
    with serving(folder) as ask:
        status, headers, body = ask("/api/studies")
        assert status == 200
        (study,) = json.loads(body)["study_summaries"]
        assert study["study_name"] == "tiny"
        assert headers["x-frame-options"] == "DENY"
        assert b"<html" in ask("/dashboard")[2].lower()
        assert ask("/healthz")[0] == 200
        assert ask(f"/api/studies/{study['study_id']}", "DELETE")[0] == 403
        assert ask("/api/studies", "POST")[0] == 403
        assert len(json.loads(ask("/api/studies")[2])["study_summaries"]) == 1


def test_its_own_pages_stand_beside_the_optuna_dashboard(folder: Path) -> None:
    with serving(folder) as ask:
        status, headers, body = ask("/")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert b'<a href="/study?name=tiny">tiny</a>' in body
        assert b"2 of 2" in body
        status, _, body = ask("/study?name=tiny")
        assert status == 200
        assert body.count(b'<div class="drawn"') == 10
        assert len(body) < 500_000, "plotly comes by itself, once"
        status, headers, body = ask("/plotly.js")
        assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8")
        assert ask("/optuna/")[:2][0] == 302
        status, _, body = ask("/study?name=%3Cscript%3E")
        assert (status, body) == (404, body)
        assert b"no study" in body


def test_it_answers_to_its_own_names_only(folder: Path) -> None:
    with serving(folder, "--allow-name", "gpu-box") as ask:
        assert ask("/api/studies", Host="evil.example")[0] == 400
        assert ask("/api/studies", Host="127.0.0.1.evil.example:8080")[0] == 400
        assert ask("/api/studies", Host="GPU-box:8080")[0] == 200


def test_a_token_is_asked_for_and_kept_as_a_cookie(folder: Path) -> None:
    with serving(folder, "--host", "0.0.0.0", token=TOKEN) as ask:
        assert ask("/api/studies")[0] == 401
        assert ask("/api/studies", Authorization="Bearer wrong")[0] == 401
        assert ask("/api/studies", Authorization=f"Bearer {TOKEN}")[0] == 200
        assert ask("/?token=wrong")[0] == 401
        status, headers, _ = ask(f"/?token={TOKEN}")
        assert (status, headers["location"]) == (302, "/")
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie
        assert ask("/api/studies", Cookie=cookie.split(";")[0])[0] == 200
        assert ask("/api/studies", Cookie="hpsearch_dashboard=" + "0" * 64)[0] == 401
        assert ask("/healthz")[0] == 200, "whoever watches the service has no token"


def test_writing_is_for_its_own_pages(folder: Path) -> None:
    with serving(folder, "--write") as ask:
        study_id = json.loads(ask("/api/studies")[2])["study_summaries"][0]["study_id"]
        path = f"/api/studies/{study_id}/note"
        assert ask(path, "PUT", Origin="http://evil.example")[0] == 403
        assert ask(path, "PUT")[0] == 400, "Optuna's own answer to an empty note"


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["--host", "0.0.0.0"], "", "set a token in HPSEARCH_DASHBOARD_TOKEN"),
        (["--host", "0.0.0.0"], "short", "shorter than 16 characters"),
        (["--store", "sqlite:///gone.db"], "", "gone.db"),
        (["--port", "1", "--host", "192.0.2.77"], TOKEN, "cannot listen on 192.0.2.77:1"),
    ],
)
def test_what_is_not_safe_is_not_served(
    hpsearch: Run, folder: Path, arguments: list[str], token: str, message: str
) -> None:
    store = ["--store", f"sqlite:///{folder}/studies.db"] if "--store" not in arguments else []
    done = hpsearch("dashboard", *store, *arguments, env={"HPSEARCH_DASHBOARD_TOKEN": token})
    assert done.returncode in (2, 69)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_artifacts_are_downloads_in_a_sandbox() -> None:
    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/html"), ("Content-Security-Policy", "default-src *")])
        return [b"<script>evil()</script>"]

    answered: list[tuple[str, dict[str, str]]] = []
    environ: dict[str, str] = {"HTTP_HOST": "localhost:8080", "PATH_INFO": "/artifacts/1/2"}
    setup_testing_defaults(environ)
    guard = Guard(application, token=None, may_write=False, names={"localhost"})
    guard(environ, lambda status, headers: answered.append((status, dict(headers))))
    ((status, headers),) = answered
    assert status == "200 OK"
    assert headers["Content-Disposition"] == "attachment"
    assert headers["Content-Security-Policy"] == "sandbox"


@pytest.mark.parametrize(
    "descriptors",
    [pytest.param(None, marks=pytest.mark.nightly, id="many descriptors"), pytest.param(24, id="few descriptors")],
)
def test_connections_that_say_nothing_keep_nobody_out(folder: Path, descriptors: int | None) -> None:
    with serving(folder) as ask:
        port = ask.port  # type: ignore[attr-defined]
        silent = []
        server = psutil.Process(ask.pid)  # type: ignore[attr-defined]
        if descriptors:
            server.rlimit(psutil.RLIMIT_NOFILE, (server.num_fds() + descriptors, 4096))
        for _ in range(40 if descriptors else 150):
            with suppress(OSError):
                silent.append(socket.create_connection(("127.0.0.1", port), timeout=0.2 if descriptors else 5))
        if descriptors:
            before = sum(server.cpu_times()[:2])
            time.sleep(2)
            assert sum(server.cpu_times()[:2]) - before < 1, "it does not ask over and over"
        assert server.num_threads() < 100
        answered = None
        for _ in range(60):
            with suppress(OSError, http.client.HTTPException):
                answered, _, _ = ask("/healthz")
                break
            time.sleep(0.5)
        assert answered == 200
        for connection in silent:
            connection.close()
