"""The store on SQLite and PostgreSQL: events in order, leases, views, migrations, and stores that cannot be used."""

from __future__ import annotations

import math
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from hpsearch.errors import LeaseLostError, StoreError, StudyBusyError, UnknownStudyError, UsageError
from hpsearch.files.scratch import _started, is_gone, this_process
from hpsearch.metrics import statistics, ties
from hpsearch.records import Point, Score, TrialConfig, TrialResult, TrialState
from hpsearch.results.leaderboard import flat_rows, frame, leaderboard
from hpsearch.search.record import recorded_trials
from hpsearch.search.study import Search
from hpsearch.spec.load import load_study
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.store import leases
from hpsearch.store.rows import NewStudy
from hpsearch.store.schema import migrations, views
from hpsearch.store.schema.tables import metadata
from hpsearch.store.store import Store

STUDY = NewStudy(
    name="s", task="causal_lm", metric="perplexity", higher_is_better=False, spec={"name": "s"}, fingerprint="f",
    overrides=["--trials 3"], budget_trials=3, data={"fingerprint": "d"}, objective="loss", placement={},
)  # fmt: skip
POINT = Point(
    evaluation=1, epoch=0.5, step=9, train_loss=3.0, valid_loss=2.0, learning_rate=0.1, tokens=99, seconds=1.5
)
OVERFIT = TrialResult(state=TrialState.OVERFIT, reason="turned", best_evaluation=1, best_epoch=0.5, best_valid_loss=2.0)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url, create=True)
    yield opened
    opened.close()


def config(number: int, **params: object) -> TrialConfig:
    return TrialConfig(
        study="s", number=number, task="causal_lm", seed=0, params=params, model=ModelSettings(),
        training=RunSettings(), rule=None, data="d", folder="f", threads=1,
    )  # fmt: skip


def scored(perplexity: float, valid_loss: float) -> TrialResult:
    score = Score(
        metric="perplexity", value=perplexity, low=perplexity - 1, high=perplexity + 1, n=9, contract={"unit": "token"}
    )
    bits = replace(score, metric="bits_per_byte", value=1.0)
    return replace(OVERFIT, best_valid_loss=valid_loss, scores=(score, bits))


def start(store: Store, number: int, **params: object) -> int:
    row = store.find_study("s") or store.add_study(STUDY)
    return store.start_trial(row.id, config(number, **params))


def test_what_is_written_is_read(store: Store) -> None:
    trial = start(store, 0, learning_rate=0.1)
    store.add_point(trial, POINT)
    store.add_point(trial, replace(POINT, evaluation=2, valid_loss=math.nan, train_loss=math.inf))
    store.add_decision(trial, evaluation=2, verdict="diverging", action="stop", evidence={"z": math.nan, "rule": "r"})
    store.finish_trial(trial, replace(scored(7.0, 2.0), details={"samples": [{"output": "é"}]}), last_epoch=1.0)
    assert store.details(trial) == {"samples": [{"output": "é"}]}
    study = store.study("s")
    assert (study.spec, study.overrides, study.data) == ({"name": "s"}, ["--trials 3"], {"fingerprint": "d"})
    assert study.created_at.utcoffset() == timedelta(0)
    row = store.trial(study, 0)
    assert (row.state, row.params, row.last_epoch) == ("overfit", {"learning_rate": 0.1}, 1.0)
    assert row.ended_at >= row.started_at
    first, second = store.points(trial)
    assert (first.valid_loss, first.tokens) == (2.0, 99)
    assert (second.valid_loss, second.train_loss) == (None, None)
    assert store.decisions(trial)[0].evidence == {"z": None, "rule": "r"}
    assert [score.metric for score in store.scores(trial)] == ["perplexity", "bits_per_byte"]


def test_launches_that_add_one_study_at_once_share_it(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda number: store.add_study(replace(STUDY, budget_trials=number)), range(8)))
    assert len({row.id for row in rows}) == 1
    assert len({row.budget_trials for row in rows}) == 1
    assert len(store.spec_versions(rows[0].id)) == 1


def test_a_finished_trial_stays_finished(store: Store) -> None:
    trial = start(store, 0)
    store.finish_trial(trial, OVERFIT, last_epoch=1.0)
    with pytest.raises(StoreError, match="has ended already, so it cannot become failed"):
        store.finish_trial(trial, replace(OVERFIT, state=TrialState.FAILED), last_epoch=1.0)
    assert store.trial(store.study("s"), 0).state == "overfit"


def test_every_write_of_a_trial_may_be_done_twice(store: Store) -> None:
    """A connection that breaks at a commit does not say whether it was done."""
    trial = start(store, 0)
    assert start(store, 0) == trial
    for _ in range(2):
        store.add_point(trial, POINT)
        store.add_decision(trial, evaluation=1, verdict="healthy", action="continue", evidence={})
    for _ in range(2):
        store.finish_trial(trial, scored(7.0, 2.0), last_epoch=1.0)
    assert len(store.points(trial)) == len(store.decisions(trial)) == 1
    assert len(store.scores(trial)) == 2
    with pytest.raises(StoreError, match="trial 0 has ended already, so it cannot run again"):
        start(store, 0)


def test_a_trial_that_goes_on_keeps_its_row_and_its_newest_points(store: Store) -> None:
    trial = start(store, 0, learning_rate=0.1)
    store.add_point(trial, POINT)
    store.requeue_trial(trial, "its worker died", lost=True)
    row = store.trial(store.study("s"), 0)
    assert (row.state, row.reason, row.worker_deaths, row.ended_at) == (
        "interrupted",
        "its worker died",
        1,
        None,
    )
    again = config(0, learning_rate=0.1).model_copy(update={"attempt": 2})
    assert store.start_trial(store.study("s").id, again) == trial
    store.add_point(trial, replace(POINT, valid_loss=1.9))
    row = store.trial(store.study("s"), 0)
    assert (row.state, row.attempt, row.reason) == ("running", 2, "")
    assert [point.valid_loss for point in store.points(trial)] == [1.9]


def test_the_leaderboard_ranks_by_test_and_tells_validations_choice(store: Store) -> None:
    for number, (perplexity, valid_loss) in enumerate([(9.0, 1.9), (7.0, 2.0), (8.0, 2.5)]):
        store.finish_trial(start(store, number, num_layers=number), scored(perplexity, valid_loss), last_epoch=1.0)
    store.finish_trial(start(store, 3, dropout=0.1), TrialResult(state=TrialState.FAILED, reason="x"), last_epoch=None)
    board = leaderboard(store, "s")
    assert [row.trial for row in board.rows] == [1, 2, 0]
    assert [row.test_rank for row in board.rows] == [1, 2, 3]
    assert board.best is not None
    assert board.best.test_perplexity == 7.0
    assert board.validation_choice is not None
    assert board.validation_choice.trial == 0
    assert board.states == {"overfit": 3, "failed": 1}
    top = leaderboard(store, "s", top=1)
    assert [row.trial for row in top.rows] == [1, 0], "validation's choice is shown beside the top"
    table = frame(board)
    assert list(table["param_num_layers"]) == [1, 2, 0]
    assert "test_bleu" not in table.columns
    assert list(flat_rows(board)[0]) == list(table.columns)


def test_the_top_of_very_many_trials_reads_as_in_the_whole_leaderboard(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond MOST_PAIRED only the answers of trials that are shown are read and tested."""
    monkeypatch.setattr(ties, "MOST_PAIRED", 5)
    draw = np.random.default_rng(0)
    hard = draw.normal(60, 20, 50)
    for number in range(8):
        nats = hard + draw.normal(number, 5, 50)
        examples = {"nats": nats, "tokens": np.full(50, 20), "bytes": np.full(50, 80)}
        perplexity = float(np.exp(nats.sum() / 1000))
        result = replace(scored(perplexity, 2.0 + number % 3), examples=statistics.pack(examples))
        store.finish_trial(start(store, number), result, last_epoch=1.0)
    whole = leaderboard(store, "s").rows
    assert 0.0 < whole[-1].p_value < 0.05 < whole[1].p_value, "some are tied with the winner and some are not"
    assert any(0.0 < row.p_value < 1.0 for row in whole[:6])
    read: list[int] = []
    examples_of = store.examples
    monkeypatch.setattr(store, "examples", lambda ids: (read.extend(ids), examples_of(ids))[1])
    assert leaderboard(store, "s", top=6).rows == whole[:6]
    assert len(read) == 6


def test_the_views_serve_any_sql_client(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/a.db", create=True)
    for number, perplexity in enumerate([9.0, 7.0]):
        trial = start(store, number)
        store.add_point(trial, POINT)
        store.finish_trial(trial, scored(perplexity, 2.0), last_epoch=1.0)
    store.close()
    with sqlite3.connect(tmp_path / "a.db") as plain:
        plain.row_factory = sqlite3.Row
        rows = plain.execute("SELECT * FROM hpsearch_leaderboard").fetchall()
        assert [(row["trial"], row["test_rank"], row["test_perplexity"]) for row in rows] == [(1, 1, 7.0), (0, 2, 9.0)]
        curves = plain.execute("SELECT * FROM hpsearch_curves").fetchall()
        assert [(row["trial"], row["train_loss"], row["valid_loss"]) for row in curves] == [
            (0, 3.0, 2.0),
            (1, 3.0, 2.0),
        ]
        assert plain.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_store_without_ranked_trials_has_an_empty_leaderboard(store: Store) -> None:
    start(store, 0)
    board = leaderboard(store, "s")
    assert (board.rows, board.best, board.validation_choice) == ([], None, None)
    assert frame(board).empty


def test_what_is_not_there_is_named_with_what_is(store: Store) -> None:
    with pytest.raises(UnknownStudyError, match="this store holds no studies"):
        store.study("x")
    start(store, 0)
    with pytest.raises(UnknownStudyError, match="studies in this store: s"):
        store.study("x")
    with pytest.raises(UnknownStudyError, match="study 's' has no trial 7; it has trials 0 to 0"):
        store.trial(store.study("s"), 7)


def test_studies_are_listed_with_states_best_and_holder(store: Store) -> None:
    store.finish_trial(start(store, 0), scored(7.0, 2.0), last_epoch=1.0)
    start(store, 1)
    store.take_lease(store.study("s").id, holder="here", process={})
    (row,) = store.studies()
    assert row.states == {"overfit": 1, "running": 1}
    assert row.best.trial == 0
    assert row.lease.holder == "here"


def take(store: Store, holder: str, **more: Any) -> int | None:
    return store.take_lease(store.study("s").id, holder=holder, process={}, **more)


def test_one_driver_holds_a_study(store: Store) -> None:
    start(store, 0)
    study = store.study("s").id
    token = take(store, "first")
    assert token is not None
    assert take(store, "second") is None
    assert store.renew_lease(study, token)
    assert take(store, "second", dead=(token, 0)) is None, "it has beaten since"
    assert store.release_lease(study, token)
    assert take(store, "second") == token + 1
    assert not store.renew_lease(study, token), "the first has lost it"


def test_a_driver_that_lost_its_lease_writes_nothing_more(store: Store) -> None:
    trial = start(store, 0)
    study = store.study("s").id
    old = Store(store.url, create=True)
    token = take(store, "old")
    assert token is not None
    old.fence(study, token)
    old.add_point(trial, POINT)
    lease = store.lease(study)
    assert lease is not None
    assert lease.beat > 0, "a write is a beat"
    assert take(store, "new", dead=(token, lease.beat)) == token + 1
    for write in (
        lambda: old.add_point(trial, replace(POINT, evaluation=2)),
        lambda: old.finish_trial(trial, OVERFIT, last_epoch=1.0),
        lambda: old.requeue_trial(trial, "x"),
        lambda: old.start_trial(study, config(1)),
    ):
        with pytest.raises(LeaseLostError):
            write()
    assert len(store.points(trial)) == 1
    assert [row.state for row in store.trials(study)] == ["running"]
    old.close()


def test_optunas_tables_are_fenced_as_ours_are(store: Store, tmp_path: Path) -> None:
    start(store, 0)
    study = store.study("s").id
    token = take(store, "old")
    assert token is not None
    file = tmp_path / "s.yaml"
    file.write_text("name: s\ntask: causal_lm\ndata: {corpus: python_docs}\nsearch: {num_layers: [1, 2]}\n")
    search = Search(load_study(file), store.url, lease=(study, token))
    search.ask()
    store.release_lease(study, token)
    take(store, "new")
    with pytest.raises(LeaseLostError):
        search.ask()
    assert len(recorded_trials(store.url, "s")) == 1


def test_a_lease_is_judged_by_its_beats_and_by_no_clock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    start(store, 0)
    study = store.study("s")
    take(store, "elsewhere, process 1")
    with store._engine.begin() as connection:
        # Its clock is a year ahead of ours, or behind: what it wrote last says nothing.
        connection.execute(
            sa.text("UPDATE hpsearch_leases SET heartbeat_at = '2099-01-01', acquired_at = '1999-01-01'")
        )
    monkeypatch.setattr(leases, "TIMEOUT_S", 0.2)
    notes: list[str] = []
    lease = store.lease(study.id)
    assert lease is not None
    assert leases.is_dead(store, lease, watch_s=0.2)
    with leases.hold(store, study, notes.append) as held:
        assert held.token == 2
    assert "took the study over from elsewhere, process 1" in notes[-1] or "dead" in notes[-1]


def test_a_holder_of_this_machine_that_is_gone_is_dead_at_once(store: Store) -> None:
    start(store, 0)
    study = store.study("s")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = {**this_process(), "pid": child.pid, "started": _started(child.pid)}
    store.take_lease(study.id, holder="a child", process=process)
    lease = store.lease(study.id)
    assert lease is not None
    assert is_gone(lease.process) is False
    child.kill()
    child.wait()
    began = time.monotonic()
    assert leases.is_dead(store, lease)
    assert time.monotonic() - began < 5, "without watching it for half a minute"


def test_a_study_that_beats_is_busy(store: Store) -> None:
    start(store, 0)
    study = store.study("s")
    other = Store(store.url, create=True)
    with leases.hold(other, study, print), pytest.raises(StudyBusyError, match=r"held by .* since \d{4}"):
        leases.hold(store, study, print).__enter__()
    other.close()


def test_an_archived_study_frees_its_name_and_keeps_everything(store: Store) -> None:
    store.finish_trial(start(store, 0), scored(7.0, 2.0), last_epoch=1.0)
    url, engine = store.url, store._engine
    optuna.create_study(study_name="s", storage=url)
    name = store.archive_study(store.study("s"))
    assert store.find_study("s") is None
    assert name.startswith("s.20")
    assert [row.trial for row in store.leaderboard(name)] == [0]
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT study_name FROM studies")).scalars().all() == [name]


def test_the_tables_are_what_the_schema_says(store: Store) -> None:
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_reading_commands_know_alembics_revisions() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations.SCRIPTS))
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(found)) == migrations.REVISIONS


def test_an_older_store_is_upgraded_by_a_launch_and_by_nothing_else(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Store(store_url, create=True)
    first.add_study(STUDY)
    first.close()
    scripts = tmp_path / "alembic"
    shutil.copytree(migrations.SCRIPTS, scripts)
    last = migrations.REVISIONS[-1]
    (scripts / "versions" / "later.py").write_text(
        f"import sqlalchemy as sa\nfrom alembic import op\nrevision = 'later'\ndown_revision = {last!r}\n\n"
        "def upgrade():\n    with op.batch_alter_table('hpsearch_trials') as table:\n"
        "        table.add_column(sa.Column('later', sa.Integer))\n"
    )
    with monkeypatch.context() as newer:
        newer.setattr(migrations, "SCRIPTS", scripts)
        newer.setattr(migrations, "REVISIONS", (*migrations.REVISIONS, "later"))
        assert Store.preflight(store_url) == "old"
        with pytest.raises(StoreError, match=f"the older schema version {last}; the next launch into it upgrades it"):
            Store(store_url)
        upgraded = Store(store_url, create=True)
        columns = [column["name"] for column in sa.inspect(upgraded._engine).get_columns("hpsearch_trials")]
        assert columns[-1] == "later"
        assert upgraded.study("s").name == "s"
        upgraded.close()
    for look in (Store, Store.preflight):
        with pytest.raises(StoreError, match="schema version later, written by a newer hpsearch"):
            look(store_url)


def test_a_store_from_before_the_first_release_is_refused_with_a_clear_message(store_url: str) -> None:
    engine = sa.create_engine(store_url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE hpsearch_schema (version INTEGER PRIMARY KEY)"))
    engine.dispose()
    for look in (Store, Store.preflight, partial(Store, create=True)):
        with pytest.raises(
            StoreError, match=r"a development version from before 0\.1\.0, which this one does not read"
        ):
            look(store_url)


def test_views_are_made_anew_when_their_definition_changes(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(views, "VIEWS", {"hpsearch_leaderboard": "SELECT name FROM hpsearch_studies"})
        older.setattr(views, "FINGERPRINT", "older")
        Store(store_url, create=True).close()
    reading = Store(store_url)
    assert reading.leaderboard("s") == [], "commands do not depend on the views that there are"
    reading.close()
    launched = Store(store_url, create=True)
    with launched._engine.connect() as connection:
        assert connection.execute(sa.text("SELECT test_rank, score FROM hpsearch_leaderboard")).all() == []
        assert connection.execute(sa.text("SELECT epoch FROM hpsearch_curves")).all() == []
    launched.close()


def test_reading_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        Store(f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty.db").touch()
    with pytest.raises(StoreError, match="holds no studies"):
        Store(f"sqlite:///{tmp_path}/empty.db")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "cannot read the store URL"),
        ("sqlite://", "must outlive the launch"),
        ("mysql://u:secret@h/d", "SQLite or PostgreSQL, not mysql|needs a driver"),
        ("sqlite:////nowhere/at/all.db", "there is no folder /nowhere/at"),
        ("postgresql://u:secret@127.0.0.1:9/d", "cannot be used"),
        ("postgresql://127.0.0.1:9/d?user=u&password=secret", r"password=\*\*\* cannot be used"),
    ],
)
def test_a_store_that_cannot_be_used_is_named_without_its_password(url: str, message: str) -> None:
    with pytest.raises((StoreError, UsageError), match=message) as caught:
        Store.preflight(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database at all" * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        Store.preflight(f"sqlite:///{tmp_path}/text.db")


def test_many_first_launches_make_the_tables_once(store_url: str) -> None:
    together = threading.Barrier(8)

    def launch() -> None:
        together.wait()
        Store(store_url, create=True).close()

    with ThreadPoolExecutor(8) as pool:
        for first in [pool.submit(launch) for _ in range(8)]:
            first.result()
    with Store(store_url)._engine.connect() as connection:
        versions = connection.execute(sa.text("SELECT version_num FROM hpsearch_version")).scalars().all()
    assert versions == [migrations.REVISIONS[-1]]
