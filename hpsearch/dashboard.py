"""The unmodified Optuna dashboard over the study store, as a web application that is safe to leave running.

By itself that dashboard asks nobody who they are, answers to any host name, deletes studies on request, and serves
artifacts that a browser would run as its own pages. Here each request passes a guard first; nothing is rewritten.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.cookies import CookieError, SimpleCookie
from importlib.util import find_spec
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from hpsearch.errors import UsageError
from hpsearch.search import open_storage
from hpsearch.store import Store

Environ = dict[str, Any]
Headers = list[tuple[str, str]]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]

TOKEN_VARIABLE = "HPSEARCH_DASHBOARD_TOKEN"
MIN_TOKEN_LENGTH = 16
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
        wsgi(open_storage(store_url)),
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
            return answer("302 Found", "", ("Location", "/dashboard"), ("Set-Cookie", cookie))
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
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no event; the rest goes to standard error as it is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: an address may hold the token."""
