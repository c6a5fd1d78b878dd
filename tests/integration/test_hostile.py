"""Study files, names, values and URLs by somebody who means harm: refused, or shown as the text that they are."""

from __future__ import annotations

import json
import os
import resource
import socket
import sqlite3
import subprocess
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

import hpsearch as package
from hpsearch.errors import SpecError
from hpsearch.results.export import write_table
from hpsearch.spec.load import load_study
from tests.commands import HPSEARCH
from tests.conftest import Run

pytestmark = pytest.mark.slow
GOOD = "name: s\ntask: causal_lm\ndata: {corpus: python_docs}\n"
LAUGHS = "\n".join(
    ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"a{depth}: &a{depth} [{', '.join([f'*a{depth - 1}'] * 9)}]" for depth in range(1, 10)]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"1:5: .*anchors \(&\) and aliases \(\*\) are not allowed"),
        ("a: &a [*a]", "anchors"),
        ("name: !!python/object/apply:os.system ['touch ran']", r"1:7: .*tags \(!\) are not allowed"),
        ("name: !!binary aGk=", "tags"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ("a: " + "{a: " * 5000 + "}" * 5000, "nested deeper than 32 levels"),
        ("# " + "x" * 300_000, "larger than 256 kB"),
        ("name: a\0b", "special characters are not allowed|not valid YAML"),
        ("name: \xff\xfe".encode("latin-1").decode("latin-1"), "name"),
        (GOOD.replace("name: s", "name: ../../etc/passwd"), "name: expected letters, digits"),
        (GOOD.replace("name: s", "name: a/b"), "name: expected letters, digits"),
        (GOOD.replace("name: s", "name: '..'"), "name: expected letters, digits"),
        (GOOD.replace("name: s", 'name: "s\\n"'), "name: expected letters, digits"),
        (GOOD.replace("name: s", "name: " + "s" * 65), "name: expected letters, digits"),
        (GOOD.replace("name: s", 'name: "s\'; DROP TABLE hpsearch_studies; --"'), "name: expected letters, digits"),
        (GOOD.replace("name: s", "name: ${HOME}"), "name: expected letters, digits"),
        (GOOD + "folder: [a]\n", "folder"),
    ],
    ids=range(17),
)
def test_a_hostile_study_file_is_refused_fast_and_small(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(text)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SpecError, match=message):
        load_study(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200_000, "kB"
    assert sorted(tmp_path.iterdir()) == [file]


def test_the_environment_reaches_the_store_and_the_data_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPSEARCH_SECRET", "canary")
    file = tmp_path / "s.yaml"
    file.write_text(
        GOOD
        + "folder: ${HPSEARCH_SECRET}\nsearch: {schedule: [linear, cosine]}\nstore: sqlite:///${HPSEARCH_SECRET}.db\n"
    )
    study = load_study(file)
    assert study.store == "sqlite:///canary.db"
    assert study.folder == "${HPSEARCH_SECRET}"


def test_a_study_file_from_elsewhere_learns_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    file = tmp_path / "s.yaml"
    file.write_text(GOOD + "store: postgresql://x@127.0.0.1/${AWS_SECRET_ACCESS_KEY}\n")
    with pytest.raises(SpecError, match=r"\$\{AWS_SECRET_ACCESS_KEY\} is not read in a study file") as refused:
        load_study(file)
    assert "canary" not in str(refused.value)


def test_check_contacts_no_server_that_the_file_alone_names(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        text = "\n".join(line for line in tiny.read_text().splitlines() if not line.startswith("store:"))
        tiny.write_text(f"{text}\nstore: postgresql://x@127.0.0.1:{port}/studies\n")
        found = package.check(tiny)
        assert found["store"] is None
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "arguments",
    [
        ["rank", "s", "--top", "99999999999999999999999"],
        ["rank", "s", "--top", "nan"],
        ["finals", "s", "--seeds", "1e400"],
        ["launch", "s.yaml", "--trials", "99999999999999999999999"],
        ["launch", "s.yaml", "--set", "budget.minutes=.nan"],
        ["launch", "s.yaml", "--set", "training.learning_rate=1e400"],
    ],
)
def test_numbers_that_are_none_are_refused_in_arguments(tmp_path: Path, hpsearch: Run, arguments: list[str]) -> None:
    (tmp_path / "s.yaml").write_text(GOOD)
    said = hpsearch(*arguments)
    assert said.returncode == 2, said.stderr
    assert "Traceback" not in said.stderr
    assert said.stdout == ""


EVIL = [
    "gelu_new",
    "[/bold]",
    "</script><img src=x onerror=alert(1)>",
    "\x1b[31mred | `pipe`",
    "'); DROP TABLE trials; --",
]


def test_hostile_values_are_shown_as_text_everywhere(tiny: Path, tmp_path: Path, hpsearch: Run) -> None:
    values = json.dumps(EVIL)
    text = tiny.read_text().replace("search:\n", f"search:\n  config.activation_function: {values}\n")
    tiny.write_text(text)
    launched = hpsearch("launch", "tiny.yaml", "--trials", "6", "--set", "sampler=random", "--set", "seed=3")
    assert launched.returncode in (0, 3), launched.stderr
    # Whatever a trial did, its row can be read, and what it holds is escaped.
    with sqlite3.connect(tmp_path / "studies.db") as plain:
        plain.execute("UPDATE hpsearch_trials SET params = json_set(params, '$.x', ?)", [EVIL[2] + EVIL[3] + EVIL[1]])
        plain.execute("UPDATE hpsearch_trials SET reason = ?", [EVIL[3] + EVIL[1]])
        tried = [json.loads(row[0]) for row in plain.execute("SELECT params FROM hpsearch_trials")]
    assert len({str(params) for params in tried}) > 1
    for arguments in (["rank", "tiny"], ["rank", "tiny", "--markdown"], ["studies"], ["doctor"], ["gc", "tiny"]):
        done = hpsearch(*arguments, "--store", f"sqlite:///{tmp_path}/studies.db")
        assert done.returncode in (0, 1), done.stderr
        assert "\x1b" not in done.stdout
        if "--markdown" in arguments:
            assert "<img" not in done.stdout
            assert r"\| \`pipe\`" in done.stdout
    for number in range(len(tried)):
        done = hpsearch("show", "tiny", str(number), "--store", f"sqlite:///{tmp_path}/studies.db")
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        assert "[/bold]" in done.stdout


@pytest.mark.parametrize(
    "name", ["s'; DROP TABLE hpsearch_studies; --", "../../etc/passwd", "", "\x1b[31m", "%s", "{}"]
)
def test_hostile_names_on_the_command_line_name_nothing(tiny: Path, tmp_path: Path, hpsearch: Run, name: str) -> None:
    store = f"sqlite:///{tmp_path}/studies.db"
    package.launch(tiny, trials=1)
    for arguments in (["rank", name], ["show", name, "0"], ["doctor", name], ["gc", name], ["finals", name]):
        done = hpsearch(*arguments, "--store", store)
        assert done.returncode == 2, done.stderr
        assert "\x1b" not in done.stderr
    assert len(package.studies(store=store)) == 1


@pytest.mark.parametrize("password", [pytest.param("canary4711", marks=pytest.mark.nightly), "canary4711/c d:e"])
def test_a_password_is_seen_nowhere(tiny: Path, tmp_path: Path, postgres_store: str, password: str) -> None:
    import sqlalchemy as sa

    user = f"u{os.getpid()}"
    server = sa.create_engine(postgres_store, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE {user} SUPERUSER LOGIN PASSWORD '{password}'"))
    store = sa.make_url(postgres_store).set(username=user, password=password).render_as_string(hide_password=False)
    seen: list[str] = []
    process = subprocess.Popen(
        [*HPSEARCH, "--debug", "launch", str(tiny), "--backend=ray", "--trials=2"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "HPSEARCH_STORE": store},
    )  # fmt: skip
    while process.poll() is None:
        time.sleep(0.2)
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            lines = [" ".join(member.cmdline()) for member in family]
        except psutil.Error:
            continue
        seen += lines
    out, errors = process.communicate()
    with server.connect() as connection:
        connection.execute(sa.text(f"REASSIGN OWNED BY {user} TO CURRENT_USER"))
        connection.execute(sa.text(f"DROP ROLE {user}"))
    server.dispose()
    assert process.returncode == 0, errors
    assert seen
    assert not [line for line in seen if "canary4711" in line]
    assert "canary4711" not in out + errors
    assert "***@" in errors or "postgresql://" in errors
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in written if b"canary4711" in file.read_bytes()]
    row = package.open_study("tiny", store=postgres_store)
    assert len(row.trials()) == 2
    wrong = subprocess.run(
        [*HPSEARCH, "rank", "tiny"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HPSEARCH_STORE": store.replace("canary4711", "canary4712")},
    )  # fmt: skip
    assert wrong.returncode == 69
    assert "canary" not in wrong.stdout + wrong.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["launch", "tiny.yaml", "--store", "postgresql://u:canary4711@h/d"], id="launch"),
        pytest.param(["check", "tiny.yaml", "--set=store=postgresql://u:canary4711@h/d"], id="check --set"),
        pytest.param(["rank", "tiny", "--store=postgresql://h/d?user=u&password=canary4711"], id="rank"),
        pytest.param(["submit", "tiny.yaml", "--store", "postgresql://u:canary4711@h/d"], id="submit"),
    ],
)
def test_a_password_on_the_command_line_is_refused(tiny: Path, hpsearch: Run, arguments: list[str]) -> None:
    refused = hpsearch(*arguments)
    assert refused.returncode == 2
    assert "HPSEARCH_STORE" in refused.stderr
    assert "canary4711" not in refused.stdout + refused.stderr


def test_no_spreadsheet_runs_what_a_study_says(tmp_path: Path) -> None:
    evil = ["=HYPERLINK(0)", "+1", "-1", "@SUM(0)", "\tx", "plain", "a=b"]
    table = pd.DataFrame({"text": evil, "number": [-float(number) for number in range(7)]})
    written = pd.read_csv(write_table(table, tmp_path / "table.csv"))
    assert [text[0] == "'" for text in written["text"]] == [True] * 5 + [False] * 2
    assert list(written["number"]) == list(table["number"])
    same = pd.read_json(write_table(table, tmp_path / "table.json"), dtype=False)
    assert list(same["text"]) == evil
