"""Stores that hang, are locked or only read while a study runs, and what the next launch makes of it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

import hpsearch
from tests.commands import HPSEARCH
from tests.faults.harness import Row, Study
from tests.proxy import Link

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]
Suffer = Callable[..., Study]
Survive = Callable[[Row], None]
WHILE_AWAY = 9
"""Epochs after which at least one trial has begun and ended since the store went away in the first."""


@pytest.fixture
def link(postgres_store: str) -> Iterator[Link]:
    made = Link(postgres_store)
    yield made
    made.close()


def ended_in(call: Callable[[], int]) -> tuple[int, float]:
    began = time.monotonic()
    return call(), time.monotonic() - began


def rank(study: Study) -> int:
    words = [*HPSEARCH, "rank", "suffering", "--store", study.store]
    return subprocess.run(words, capture_output=True, timeout=120, check=False).returncode


def noted(study: Study, text: str) -> bool:
    return any(text in event.get("text", "") for event in study.events())


def test_the_link_to_the_store_hangs_and_a_signal_comes(suffer: Suffer, survive: Survive, link: Link) -> None:
    study = suffer(backend="inline", trials=6, store=link.url, pace=1.0)
    launch = study.launch()
    study.wait_for_epochs(2, launch)
    link.hang()
    read, seconds = ended_in(lambda: rank(study))
    assert (read, seconds < 30) == (69, True)
    study.wait_for_epochs(WHILE_AWAY, launch)
    study.wait_for(lambda: noted(study, "Trials continue"), launch)
    launch.send_signal(signal.SIGINT)
    code, seconds = ended_in(lambda: launch.wait(60))
    assert code == 69, study.errors().read_text()
    assert seconds < 27, "the grace, and a moment for what hangs"
    assert "Traceback" not in study.errors().read_text()
    link.go_on()
    survive(study.judge(row := Row("the store's link hung", recovered_by="the same command"), study.finish()))
    assert row.repeated == 0, "what was trained meanwhile is taken up from its folders"


def test_results_of_a_launch_whose_store_stayed_away_are_taken_up(suffer: Suffer, survive: Survive, link: Link) -> None:
    study = suffer(backend="inline", trials=6, store=link.url, pace=0.5)
    launch = study.launch()
    study.wait_for_epochs(2, launch)
    link.hang()
    study.wait_for_epochs(WHILE_AWAY, launch)
    launch.kill()
    launch.wait()
    results = {file.parent.name: file.read_text() for file in study.folder.rglob("result.json")}
    assert len(results) >= 2, "also of a trial that no row knows"
    link.go_on()
    survive(study.judge(row := Row("the store away, driver killed", recovered_by="the same command"), study.finish()))
    assert row.repeated <= 1
    for name, result in results.items():
        trial = hpsearch.open_study("suffering", store=study.store).trial(int(name.split("-")[1]))
        assert trial.best_valid_loss == json.loads(json.loads(result)["result"])["best_valid_loss"]


def test_somebody_locks_the_lease(suffer: Suffer, survive: Survive, postgres_store: str) -> None:
    study = suffer(backend="inline", trials=4, store=postgres_store, pace=2.0)
    launch = study.launch()
    study.wait_for_epochs(2, launch)
    with sa.create_engine(postgres_store).begin() as other:
        other.execute(sa.text("UPDATE hpsearch_leases SET holder = holder"))
        study.wait_for(lambda: noted(study, "Trials continue"), launch)
        assert noted(study, "lock timeout. Trials continue"), study.events()[-1]
        code, seconds = ended_in(lambda: study.launch().wait(60))
        assert (code, seconds < 40) == (69, True)
        assert "lock timeout" in study.errors().read_text()
        study.launches.reverse()
    study.wait_for(lambda: noted(study, "the store is back after"), launch)
    survive(study.judge(row := Row("the lease locked by a transaction"), launch.wait(240)))
    assert row.repeated == 0


def test_the_server_only_reads_for_a_while(suffer: Suffer, survive: Survive, postgres_store: str) -> None:
    study = suffer(backend="inline", trials=4, store=postgres_store, pace=1.0)
    launch = study.launch()
    study.wait_for_epochs(2, launch)
    server = sa.create_engine(postgres_store, isolation_level="AUTOCOMMIT").connect()
    try:
        server.execute(sa.text("ALTER SYSTEM SET default_transaction_read_only = on"))
        server.execute(sa.text("SELECT pg_reload_conf()"))
        time.sleep(15)
        assert launch.poll() is None, study.errors().read_text()
    finally:
        server.execute(sa.text("SET default_transaction_read_only = off"))
        server.execute(sa.text("ALTER SYSTEM RESET default_transaction_read_only"))
        server.execute(sa.text("SELECT pg_reload_conf()"))
        server.close()
    survive(study.judge(row := Row("PostgreSQL only reads for 15 s"), launch.wait(240)))
    assert row.repeated == 0
    assert noted(study, "read-only transaction. Trials continue")
