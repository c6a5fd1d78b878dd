"""One web application that is safe to leave running: our live pages, and the unmodified Optuna dashboard beside them.

By itself the Optuna dashboard asks nobody who they are, answers to any host name, deletes studies on request, and
serves artifacts that a browser would run as its own pages. Here each request passes a guard first; nothing is
rewritten.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import ipaddress
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.cookies import CookieError, SimpleCookie
from importlib.util import find_spec
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from hpsearch.api import report, studies, trial_page
from hpsearch.errors import HpsearchError, UnknownStudyError, UsageError
from hpsearch.integrations.optuna_dashboard import StudyArtifacts
from hpsearch.reports.pages import plotly_script, render_index
from hpsearch.search.record import open_storage
from hpsearch.store.store import Store

Environ = dict[str, Any]
Headers = list[tuple[str, str]]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]

TOKEN_VARIABLE = "HPSEARCH_DASHBOARD_TOKEN"
MIN_TOKEN_LENGTH = 16
DRAW_EVERY_S = 4.0
MOST_CONNECTIONS = 64
SILENCE_S = 10.0
"""A connection that says nothing for so long is closed."""
HEALTH_PATH = "/healthz"
_COOKIE = "hpsearch_dashboard"
_READS = {"GET", "HEAD", "OPTIONS"}
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_HEADERS = [("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer")]
_ARTIFACT_HEADERS = [("Content-Disposition", "attachment"), ("Content-Security-Policy", "sandbox")]


@contextmanager
def open_dashboard(
    store_url: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    may_write: bool = False,
    names: Iterable[str] = (),
) -> Iterator[WSGIServer]:
    """A server that waits for `serve_forever()`; port 0 takes a free one.

    A `token` is asked for when there is one, and there has to be one on any address but this machine's own. `names` are
    host names that requests may use beside that address. Raises UsageError, StoreError.
    """
    if find_spec("optuna_dashboard") is None:
        raise UsageError("the dashboard is an extra: pip install 'hpsearch[dashboard]'")
    if token and len(token) < MIN_TOKEN_LENGTH:
        raise UsageError(f"the token in {TOKEN_VARIABLE} is shorter than {MIN_TOKEN_LENGTH} characters")
    if not token and not _is_loopback(host):
        raise UsageError(f"--host {host} is open to other machines: set a token in {TOKEN_VARIABLE}")
    # A server's database may wait for its first launch; a file that is not there is a mistake.
    is_waiting = not store_url.startswith("sqlite") and Store.preflight(store_url) == "new"
    Store(store_url, create=is_waiting).close()
    from optuna_dashboard import wsgi

    guard = Guard(
        Site(store_url, wsgi(open_storage(store_url), artifact_store=StudyArtifacts(store_url))),
        token=token,
        may_write=may_write,
        names=_LOCAL_NAMES | {name.lower() for name in (host, *names)},
    )
    try:
        kind = _Server6 if ":" in host else _Server
        server = make_server(host.strip("[]"), port, guard, server_class=kind, handler_class=_Handler)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        yield server
    finally:
        server.server_close()


class Site:
    """`/` lists studies, `/study?name=` and `/trial?study=&number=` show them, `/optuna/` is the Optuna dashboard."""

    def __init__(self, store_url: str, optuna: Application) -> None:
        self._store_url = store_url
        self._optuna = optuna
        self._lock = threading.Lock()
        self._drawn: dict[tuple[Any, ...], tuple[float, bytes]] = {}

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""))
        kind, status, more = "text/html", "200 OK", ("Cache-Control", "no-store")
        if path in ("/optuna", "/optuna/"):
            start_response("302 Found", [("Location", "/dashboard"), ("Content-Length", "0")])
            return [b""]
        try:
            if path == "/":
                body = render_index(studies(store=self._store_url)).encode()
            elif path == "/study" and query.get("name"):
                names = tuple(dict.fromkeys(query["name"]))
                body = self._drawn_once(names, lambda: report(*names, store=self._store_url, is_live=True))
            elif path == "/trial" and query.get("study") and query.get("number", [""])[0].isdecimal():
                study, number = query["study"][0], int(query["number"][0])
                body = self._drawn_once((study, number), lambda: trial_page(study, number, store=self._store_url))
            elif path == "/plotly.js":
                kind, more = "text/javascript", ("Cache-Control", "private, max-age=86400")
                body = plotly_script().encode()
            else:
                return self._optuna(environ, start_response)
        except UnknownStudyError as error:
            kind, status, body = "text/plain", "404 Not Found", f"{error}\n".encode()
        except HpsearchError as error:
            kind, status, body = "text/plain", "503 Service Unavailable", f"{error}\n".encode()
        start_response(status, [("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))), more])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _drawn_once(self, key: tuple[Any, ...], draw: Callable[[], str]) -> bytes:
        """However many people look at a page, it is drawn once in a while."""
        with self._lock:
            now = time.monotonic()
            self._drawn = {page: kept for page, kept in self._drawn.items() if now - kept[0] < DRAW_EVERY_S}
            if key not in self._drawn:
                body = draw().encode()
                self._drawn[key] = (time.monotonic(), body)
            return self._drawn[key][1]


class Guard:
    """Lets through to an application what comes from somebody who may, under a name of ours, and changes nothing."""

    def __init__(self, application: Application, *, token: str | None, may_write: bool, names: Iterable[str]) -> None:
        self._application = application
        self._token = token
        self._may_write = may_write
        self._names = set(names)

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")

        def answer(status: str, text: str, *headers: tuple[str, str]) -> list[bytes]:
            body = f"{text}\n".encode()
            plain = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
            start_response(status, [*plain, *_HEADERS, *headers])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

        host = environ.get("HTTP_HOST", "")
        if _name(host) not in self._names:
            # A page of another site can have a name of its own resolve to this address (DNS rebinding).
            return answer("400 Bad Request", "this host name is not served; see --allow-name")
        if path == HEALTH_PATH:
            return answer("200 OK", "ok")
        query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""))
        if self._token and "token" in query:
            if not _equal(query["token"][0], self._token):
                return answer("401 Unauthorized", "this is not the token")
            cookie = f"{_COOKIE}={_digest(self._token)}; Path=/; HttpOnly; SameSite=Strict"
            # Leaves the token out of the address bar and of what other sites are told.
            return answer("302 Found", "", ("Location", "/"), ("Set-Cookie", cookie))
        if self._token and not self._is_known(environ):
            return answer("401 Unauthorized", "open /?token=TOKEN, or send the token as a bearer")
        if environ["REQUEST_METHOD"] not in _READS:
            if not self._may_write:
                return answer("403 Forbidden", "this dashboard is read-only; see --write")
            origin = environ.get("HTTP_ORIGIN")
            if origin is not None and urllib.parse.urlsplit(origin).netloc != host:
                return answer("403 Forbidden", "another site may not write here")
        more = [*_HEADERS, *(_ARTIFACT_HEADERS if path.startswith("/artifacts/") else [])]

        def start(status: str, headers: Headers, *rest: Any) -> Any:
            replaced = {name.lower() for name, _ in more}
            kept = [(name, value) for name, value in headers if name.lower() not in replaced]
            return start_response(status, [*kept, *more], *rest)

        return self._application(environ, start)

    def _is_known(self, environ: Environ) -> bool:
        assert self._token is not None
        scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() == "bearer" and _equal(given.strip(), self._token):
            return True
        try:
            cookie = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(_COOKIE)
        except CookieError:
            return False
        return cookie is not None and _equal(cookie.value, _digest(self._token))


def _name(host: str) -> str:
    """The name in a Host header: without port, in lower case."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _digest(token: str) -> str:
    """What a browser keeps in place of the token."""
    return hashlib.sha256(f"{_COOKIE}:{token}".encode()).hexdigest()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _Server(ThreadingMixIn, WSGIServer):
    """One thread for each connection, of which there are at most MOST_CONNECTIONS; more are closed at once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)  # the connection waits, and asking again at once would only burn the CPU
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no event; the rest goes to standard error as it is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: an address may hold the token."""
