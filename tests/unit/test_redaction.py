"""No secret of a URL is shown, whatever it looks like and wherever it turns up."""

from __future__ import annotations

import urllib.parse

import pytest

from hpsearch.spec import redaction
from hpsearch.spec.redaction import has_secret, hide_secrets, remember_secrets

PASSWORDS = ["canary4711", "can/ary", "can ary", "can@ary", "can:ary", "can?ary=1", "can#ary", "can%2Fary", "cän&ary'"]


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", set())


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("scheme", ["postgresql://", "postgresql+psycopg2://", "postgresql:/", "postgresql:///"])
def test_a_password_is_hidden_in_a_url(password: str, scheme: str) -> None:
    url = f"{scheme}user:{password}@db.example:5432/studies?sslmode=require"
    shown = hide_secrets(url)
    assert password not in shown
    assert "ary" not in shown.replace("***", "")
    assert "user:***@db.example:5432/studies" in shown
    assert has_secret(url)
    assert hide_secrets(shown) == shown


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_that_was_seen_is_hidden_wherever_it_turns_up(password: str) -> None:
    url = f"postgresql://user:{password}@db/studies"
    remember_secrets(url)
    forms = [password, urllib.parse.quote(password, safe=""), repr(password), urllib.parse.unquote(password)]
    for form in forms:
        said = hide_secrets(f'connection to "{form}" failed for {url}, try {form} again')
        assert "ary" not in said, form
        assert said.startswith("connection to ")
        assert said.endswith(" again")


@pytest.mark.parametrize("option", ["sslpassword", "password", "passfile", "ssl_token", "secret_key"])
def test_an_option_that_is_a_secret_is_hidden(option: str) -> None:
    url = f"postgresql://user@db/studies?sslmode=require&{option}=canary&application_name=x"
    assert has_secret(url)
    assert hide_secrets(url) == f"postgresql://user@db/studies?sslmode=require&{option}=***&application_name=x"


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////tmp/studies.db",
        "postgresql://user@db/studies",
        "postgresql://user@db:5432/studies?sslmode=require&sslkey=client.pem",
        "see http://head:8265/api/jobs/, and ask ada@example.org",
        "a time: 12:30, a ratio 1:2@3, an address ada@example.org",
        "s3://bucket/runs",
        "https://user@example.org/path",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_secrets(text) == text
    assert " " in text or not has_secret(text)


def test_a_message_keeps_what_stands_around_a_url() -> None:
    said = "the store postgresql://u:canary@h/db cannot be used: FATAL: no such role (see postgresql://v:canary2@h/e)"
    assert "canary" not in hide_secrets(said)
    assert hide_secrets(said).endswith(")")
    assert "cannot be used" in hide_secrets("the store 'postgresql://u:canary@h/db' cannot be used: FATAL")


def test_a_url_whose_password_was_hidden_holds_no_secret() -> None:
    assert not has_secret("postgresql://user:***@db/studies?sslpassword=***")
