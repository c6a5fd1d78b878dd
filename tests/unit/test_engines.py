"""Databases that hang, are locked, only read, or have a pooler before them; and files that can only be read."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from hpsearch.errors import StoreAwayError, StoreError, StoreRefusedError
from hpsearch.search.record import open_storage, recorded_trials
from hpsearch.store import engines
from hpsearch.store.store import Store
from tests.proxy import Link
from tests.unit.test_store import OVERFIT, POINT, scored, start, take

NO_TEXT = "a\0b\ud800c"


@pytest.fixture
def link(postgres_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    monkeypatch.setattr(engines, "CONNECT_S", 2)
    monkeypatch.setattr(engines, "ANSWER_S", 1.0)
    made = Link(postgres_store)
    yield made
    made.close()


def seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    with pytest.raises(StoreAwayError):
        call()
    return time.monotonic() - began


def test_text_that_no_database_takes_is_kept_as_far_as_it_goes(store_url: str) -> None:
    store = Store(store_url, create=True)
    trial = start(store, 0)
    store.requeue_trial(trial, NO_TEXT)
    details = {"samples": [{"output": NO_TEXT, NO_TEXT: 1}]}
    store.finish_trial(trial, replace(OVERFIT, error=NO_TEXT, host=NO_TEXT, details=details), last_epoch=1.0)
    row = store.trial(store.study("s"), 0)
    assert row.error == row.host == "a�b�c"
    assert store.details(trial) == {"samples": [{"output": "a�b�c", "a�b�c": 1}]}
    assert store.find_study(NO_TEXT) is None


def test_what_can_never_be_written_is_refused(store_url: str) -> None:
    store = Store(store_url, create=True)
    trial = start(store, 0)
    (score, *_) = scored(7.0, 2.0).scores
    for wrong in (replace(score, value=None), replace(score, n=2**70)):  # type: ignore[arg-type]
        with pytest.raises(StoreRefusedError):
            store.finish_trial(trial, replace(OVERFIT, scores=(wrong,)), last_epoch=1.0)
    assert store.trial(store.study("s"), 0).state == "running", "all of an end is written or nothing"


def test_a_link_that_hangs_is_a_store_that_is_away(link: Link) -> None:
    store = Store(link.url, create=True)
    trial = start(store, 0)
    storage = open_storage(link.url)
    link.hang()
    assert seconds(lambda: store.add_point(trial, POINT)) < 9
    assert seconds(lambda: Store(link.url)) < 4
    assert seconds(lambda: recorded_trials(link.url, "s")) < 9
    link.go_on()
    store.add_point(trial, POINT)
    assert len(store.points(trial)) == 1
    storage.engine.dispose()


def test_an_answer_may_take_long_as_long_as_it_comes(link: Link) -> None:
    engine = engines.make_engine(sa.make_url(link.url))
    with engine.connect() as connection:
        # The server sends a row as it is made.
        rows = connection.execute(sa.text("SELECT repeat('x', 20000), pg_sleep(0.02) FROM generate_series(1, 100)"))
        assert len(rows.all()) == 100
        with pytest.raises(sa.exc.OperationalError, match="no answer from the server for 1 s"):
            connection.execute(sa.text("SELECT pg_sleep(30)"))
    with engine.connect() as connection:
        still = connection.execute(
            sa.text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(30%'")
        )
        assert still.scalar() == 0, "the server was told"


def test_a_lease_that_somebody_has_locked_is_a_store_that_is_away(
    postgres_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "LOCK_S", 1)
    store = Store(postgres_store, create=True)
    start(store, 0)
    study, token = store.study("s").id, take(store, "here")
    assert token is not None
    with sa.create_engine(postgres_store).begin() as other:
        other.execute(sa.text("UPDATE hpsearch_leases SET beat = beat + 1"))
        with pytest.raises(StoreAwayError, match="lock timeout"):
            store.renew_lease(study, token)
    assert store.renew_lease(study, token)


def test_a_driver_whose_link_is_gone_keeps_no_locks(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_GHOST_S", 1)
    monkeypatch.setattr(engines, "LOCK_S", 5)
    store = Store(link.url, create=True)
    start(store, 0)
    study, token = store.study("s").id, take(store, "here")
    assert token is not None
    ghost = engines.make_engine(sa.make_url(link.url)).connect()
    ghost.execute(sa.text("UPDATE hpsearch_leases SET beat = beat + 1"))
    assert store.renew_lease(study, token)
    ghost.invalidate()


def test_a_server_that_only_reads_is_a_store_that_is_away(postgres_store: str) -> None:
    store = Store(postgres_store, create=True)
    trial = start(store, 0)
    name = sa.make_url(postgres_store).database
    server = sa.create_engine(postgres_store, isolation_level="AUTOCOMMIT").connect()
    server.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    store.close()
    with pytest.raises(StoreAwayError, match="read-only transaction"):
        store.add_point(trial, POINT)
    server.execute(sa.text("SET default_transaction_read_only = off"))
    server.execute(sa.text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
    store.add_point(trial, POINT)
    assert len(store.points(trial)) == 1, "by a new connection: after a failover, to another server"
    server.close()


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("57P01", StoreAwayError), ("57P03", StoreAwayError), ("57014", StoreAwayError), ("53300", StoreAwayError),
        ("25006", StoreAwayError), ("08P01", StoreAwayError), ("40P01", StoreAwayError), ("55P03", StoreAwayError),
        ("42P01", StoreError), ("42501", StoreError), ("22P05", StoreRefusedError), ("23505", StoreRefusedError),
    ],
)  # fmt: skip
def test_an_error_is_known_by_its_state(postgres_store: str, state: str, kind: type[StoreError]) -> None:
    engine = engines.make_engine(sa.make_url(postgres_store))
    raised = f"DO $$ BEGIN RAISE EXCEPTION 'so it is' USING ERRCODE = '{state}'; END $$"
    with (
        pytest.raises(StoreError, match="so it is") as caught,
        engines.guarded(postgres_store),
        engine.connect() as connection,
    ):
        connection.exec_driver_sql(raised)
    assert type(caught.value) is kind


@pytest.fixture
def pgbouncer(postgres_store: str) -> Iterator[str]:
    """The URL of a pooler in transaction mode before an empty database, with fewer connections than clients."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    parsed = sa.make_url(postgres_store)
    folder = Path(tempfile.mkdtemp(prefix="hps-pgb-"))
    folder.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n{parsed.database} = host={parsed.query['host']} dbname={parsed.database}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        "pool_mode = transaction\ndefault_pool_size = 2\n"
        f"[users]\n"
    )
    # It does not run as root, and must reach the socket of the server.
    user = {"user": Path(str(parsed.query["host"])).stat().st_uid} if os.getuid() == 0 else {}
    ini = folder / "pgbouncer.ini"
    ini.write_text(ini.read_text().replace("dbname=", f"user={parsed.username} dbname="))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, str(ini)], stdout=log, stderr=log, **user)  # type: ignore[call-overload]
    until = time.monotonic() + 10
    while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None, (folder / "log").read_text()
    yield parsed.set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)
    process.terminate()
    process.wait()
    shutil.rmtree(folder)


def test_a_pooler_that_changes_connections_with_each_transaction_is_as_good(pgbouncer: str) -> None:
    stores = [Store(pgbouncer, create=True) for _ in range(4)]
    trials = [start(stores[0], number) for number in range(4)]
    for evaluation in range(1, 12):
        for store, trial in zip(stores, trials, strict=True):
            store.add_point(trial, replace(POINT, evaluation=evaluation))
            assert len(store.points(trial)) == evaluation
    storages = [open_storage(pgbouncer) for _ in range(3)]
    for _ in range(12):
        for storage in storages:
            storage.get_all_studies()
    with stores[0]._engine.connect() as connection:
        connection.commit()
        shown = connection.connection.cursor().execute("SHOW lock_timeout; ").fetchone()
        assert shown == ("0",), "nothing of ours stays with the connection"


@pytest.fixture
def foreign_folder() -> Iterator[Path]:
    """A folder that everybody may read."""
    folder = Path(tempfile.mkdtemp(prefix="hps-ro-"))
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def as_nobody(read: Callable[[], object]) -> str:
    """What somebody prints who may not write the files of whoever runs the tests."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(pwd.getpwnam("nobody").pw_gid)
                os.setuid(pwd.getpwnam("nobody").pw_uid)
            said = str(read())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(sending, said.encode())
        os._exit(0)
    os.close(sending)
    os.waitpid(child, 0)
    with os.fdopen(receiving) as stream:
        return stream.read()


def look(url: str) -> list[object]:
    store = Store(url)
    try:
        return [len(store.points(row.id)) for row in store.trials(store.study("s").id)] + [
            len(recorded_trials(url, "s"))
        ]
    finally:
        store.close()


def test_a_store_in_a_folder_that_cannot_be_written_is_read(foreign_folder: Path) -> None:
    import optuna

    url = f"sqlite:///{foreign_folder}/a b.db"
    store = Store(url, create=True)
    trial = start(store, 0)
    optuna.create_study(study_name="s", storage=open_storage(url)).ask()
    store.add_point(trial, POINT)
    foreign_folder.chmod(0o555)
    assert (foreign_folder / "a b.db-wal").exists()
    assert as_nobody(lambda: look(url)) == "[1, 1]", "while somebody writes"
    store.add_point(trial, replace(POINT, evaluation=2))
    assert as_nobody(lambda: look(url)) == "[2, 1]"
    refused = as_nobody(lambda: Store(url, create=True))
    assert refused.startswith("StoreError: cannot write the store")


def test_a_copy_of_a_store_in_a_folder_that_cannot_be_written_is_read(tmp_path: Path, foreign_folder: Path) -> None:
    import optuna

    url = f"sqlite:///{tmp_path}/a.db"
    store = Store(url, create=True)
    trial = start(store, 0)
    storage = open_storage(url)
    optuna.create_study(study_name="s", storage=storage).ask()
    store.add_point(trial, POINT)
    copies = [foreign_folder / name for name in ("whole.db", "torn.db")]
    shutil.copy(tmp_path / "a.db", copies[1])
    shutil.copy(tmp_path / "a.db-wal", f"{copies[1]}-wal")
    storage.remove_session()
    storage.engine.dispose()
    store.close()
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sqlite3; c = sqlite3.connect('{tmp_path}/a.db'); c.execute('PRAGMA wal_checkpoint(TRUNCATE)'); c.close()",
        ],
        check=True,
    )
    shutil.copy(tmp_path / "a.db", copies[0])
    for copy in copies:
        copy.chmod(0o444)
    foreign_folder.chmod(0o555)
    assert as_nobody(lambda: look(f"sqlite:///{copies[0]}")) == "[1, 1]"
    torn = as_nobody(lambda: look(f"sqlite:///{copies[1]}"))
    assert torn == "[1, 1]" or "copy both files elsewhere" in torn
    assert sorted(file.name for file in foreign_folder.iterdir()) == ["torn.db", "torn.db-wal", "whole.db"]
