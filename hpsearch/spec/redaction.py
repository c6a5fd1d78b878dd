"""Secrets in text that is shown or kept: found by taking URLs apart, and remembered wherever one was read.

A password may hold any character, so that no pattern finds it in the middle of a message. What a store's URL was seen
to hold is therefore remembered, and hidden wherever it turns up, in quotes or out of them, escaped or not.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator

HIDDEN = "***"
_SECRET_WORDS = ("pass", "secret", "token", "key", "credential")
"""A URL's option whose name holds one of these is a secret."""
_NO_SECRET = {"sslkey"}
"""Names of files."""
_SHORTEST = 4
"""A shorter secret is hidden in URLs only: it may be part of any word."""
_ONE_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{1,3}[^\n]*@\S*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{1,3}[^\s'\"<>]+")
_DATABASE = re.compile(r"(?:postgres|mysql|mariadb|mssql|oracle)[A-Za-z0-9+]*:/{1,3}[^\n'\"<>]*@[^\s'\"<>]*")
"""One whose password may hold blanks: up to the last `@` of its line."""
_known: set[str] = set()


def remember_secrets(url: str) -> None:
    """Hide what is secret in this URL wherever it turns up from now on."""
    for secret in _secrets(url):
        forms = {secret, urllib.parse.unquote(secret), urllib.parse.unquote_plus(secret)}
        forms |= {urllib.parse.quote(form, safe="") for form in forms} | {repr(form)[1:-1] for form in forms}
        _known.update(form for form in forms if len(form) >= _SHORTEST)


def has_secret(url: str) -> bool:
    """Whether a URL holds a password, or an option that is one."""
    return any(_secrets(url))


def hide_secrets(text: str) -> str:
    """The text with every secret in it replaced by `***`: those of its URLs, and those that were remembered."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if _ONE_URL.fullmatch(text):
        return _without_secrets(text)
    text = _DATABASE.sub(lambda match: _without_secrets(match[0]), text)
    return _URL.sub(lambda match: _without_secrets(match[0]), text)


def _without_secrets(url: str) -> str:
    for secret in sorted(_secrets(url), key=len, reverse=True):
        url = url.replace(f":{secret}@", f":{HIDDEN}@").replace(f"={secret}", f"={HIDDEN}")
    return url


def _secrets(url: str) -> Iterator[str]:
    """The password of a URL and its secret options, as they stand in it."""
    _, colon, rest = url.partition(":/")
    if not colon:
        return
    rest = rest.lstrip("/")
    # The last @ ends the password, whatever it holds; one in the options is behind a question mark.
    user, at, place = rest.rpartition("@")
    if at and "?" in user and "=" in user.rpartition("?")[2] and "/" in user.partition("?")[0]:
        user, at, place = user.partition("?")[0].rpartition("@")[0], at, rest
    password = user.partition(":")[2]
    if password and password != HIDDEN:
        yield password
    for option in place.partition("?")[2].split("&"):
        name, equals, value = option.partition("=")
        is_secret = any(word in name.lower() for word in _SECRET_WORDS) and name.lower() not in _NO_SECRET
        if equals and value and value != HIDDEN and is_secret:
            yield value
