"""A study that is stopped, whenever and however, ranks what it has, and goes on from there at the next launch."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

import hpsearch
from hpsearch import api
from hpsearch.records import Event
from hpsearch.reports import text as wording
from hpsearch.store.store import Store
from tests.commands import HPSEARCH
from tests.conftest import TINY, Run
from tests.faults.harness import Study as Suffering

pytestmark = pytest.mark.slow
PAUSING = [
    "prune.unpromising=promote",
    "search.num_epochs=9",
    "training.evaluations_per_epoch=2",
    "prune.overfit=false",
]
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def after_points(count: int, number: signal.Signals = signal.SIGTERM) -> Callable[[Event], None]:
    """A listener that sends this process a signal when it has heard of so many evaluations."""
    heard = 0

    def listen(event: Event) -> None:
        nonlocal heard
        heard += event.kind == "point"
        if event.kind == "point" and heard == count:
            os.kill(os.getpid(), number)

    return listen


@pytest.fixture(autouse=True)
def signals_as_usual() -> Iterator[None]:
    """A run of the tests under nohup, or in the background of a shell, ignores signals, and all its children do."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.nightly),
        pytest.param(signal.SIGHUP, id="SIGHUP"),
    ],
)
def test_a_study_stopped_by_a_signal_has_a_winner_which_the_next_launch_trains_on(
    tiny: Path, tmp_path: Path, number: signal.Signals
) -> None:
    stopped = hpsearch.launch(tiny, overrides=PAUSING, trials=3, listen=after_points(3, number))
    assert stopped.exit_code == EXIT_CODES[number]
    board = stopped.board()
    assert board.best is not None
    assert board.best.state in ("paused", "interrupted")
    assert board.best.score_low < board.best.score < board.best.score_high
    row = stopped.trial(board.best.trial)
    assert row.best_valid_loss == min(point.valid_loss for point in row.points)
    assert any("stopped early" in note for note in wording.leaderboard_notes(board))
    assert hpsearch.doctor(store=stopped.store) == []
    model = api.export("tiny", output=tmp_path / "model", store=stopped.store)
    assert (model / "model.safetensors").is_file()
    resumed = hpsearch.launch(tiny, overrides=PAUSING, trials=3)
    assert resumed.exit_code == 0
    assert {trial.state for trial in resumed.trials()} <= {"completed", "unpromising"}
    # What was scored when it was stopped has its last word now, or none if it was never promoted.
    with_scores = {trial.number for trial in resumed.trials() if resumed.trial(trial.number).scores}
    assert with_scores == {row.trial for row in resumed.board().rows}
    assert hpsearch.doctor(store=resumed.store) == []


def test_a_time_budget_ends_with_the_best_brought_to_their_ends_and_the_rest_scored(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.driver.run.endgame.LEAST_S", 0.5)
    notes: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "note":
            notes.append(event.text)

    overrides = [*PAUSING, "search.num_epochs=300", "budget.minutes=0.3"]
    study = hpsearch.launch(tiny, overrides=overrides, trials=1000, listen=listen)
    assert study.exit_code == 0
    assert study.stop_reason == "the budget of 0.3 minutes is used up"
    rows = study.board().rows
    assert any("goes to the leading trials" in note for note in notes)
    brought = [row for row in rows if "brought to its end" in row.reason]
    assert {row.state for row in brought} == {"completed"}
    assert brought[0].last_epoch < 300
    curve = study.trial(brought[0].trial).points
    assert curve[-1].learning_rate < 0.5 * max(point.learning_rate for point in curve)


def test_a_running_study_has_a_best_so_far_that_can_be_exported(tiny: Path, tmp_path: Path, hpsearch: Run) -> None:
    study = Suffering(folder=tmp_path / "study", trials=3, pace=1.0, overrides=["search.num_epochs=60"])
    process = study.launch()
    study.wait_for_victim(process)
    store = ["--store", study.store]
    best = study.wait_for(lambda: _json(hpsearch("best", "suffering", "--json", *store).stdout), process)
    assert best["trial"] in (0, 1, 2)
    assert "leads on validation" in hpsearch("rank", "suffering", *store).stdout
    study.wait_for(lambda: hpsearch("export", "suffering", "-o", "so-far", *store).returncode == 0, process)
    assert (tmp_path / "so-far" / "config.json").is_file()
    study.end()


def _json(text: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(text) if text.strip() else {}
    return found


@pytest.mark.nightly
def test_a_signal_to_all_processes_of_a_launch_ends_it_within_its_grace(tmp_path: Path) -> None:
    study = Suffering(folder=tmp_path / "study", trials=2, pace=1.0)
    process = study.launch()
    study.wait_for_epochs(2, process)
    study.pace = 0.0
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(120) == 143  # Ray itself ends a process whose head died after a minute, with 1
    store = Store(study.store)
    (row,) = store.studies()
    assert row.lease.beat == -1
    assert "running" not in row.states
    assert study.finish() == 0


@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=pytest.mark.nightly)])
def test_a_study_goes_on_whatever_becomes_of_its_output(tmp_path: Path, backend: str) -> None:
    study = Suffering(folder=tmp_path / "study", trials=2, pace=0.0, backend=backend)
    command = [*HPSEARCH, "launch", str(study.file), "--trials", "2", "--backend", backend]
    environment = {**os.environ, "HPSEARCH_STORE": study.store, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
                          cwd=study.folder, text=True) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().startswith("{")
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(120) == 0
    assert hpsearch.open_study("suffering", store=study.store).best is not None
    with open("/dev/full", "w") as full:
        again = subprocess.run([*command, "--trials", "3", "--extend"], stdout=full, stderr=full, env=environment,
                               cwd=study.folder, timeout=120, check=False)  # fmt: skip
    assert again.returncode == 0
    assert len(hpsearch.open_study("suffering", store=study.store).trials()) == 3


def test_closed_standard_streams_are_no_bug(tiny: Path, tmp_path: Path) -> None:
    hpsearch.launch(tiny, trials=1)
    shell = f"{sys.executable} -m hpsearch rank tiny --store sqlite:///{tmp_path}/studies.db >&- 2>&- <&-"
    assert subprocess.run(shell, shell=True, check=False).returncode == 0


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_two_hundred_studies_stopped_at_random_moments_have_a_winner_each(tmp_path: Path) -> None:
    """By signals, by their time budget, and by SIGKILL; those that had evaluated anything."""
    import_module("hpsearch.worker.run")  # the children are forked, so that each begins at once
    rng = random.Random(0)
    evaluated = 0
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        url = f"sqlite:///{folder}/studies.db"
        (folder / "tiny.yaml").write_text(f"{TINY}store: {url}\nfolder: {folder}/runs\n")
        how = rng.choice(["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL", "deadline"])
        moment = rng.uniform(0.2, 6.0)
        code = _launch_and_stop(folder / "tiny.yaml", how, moment)
        store = Store(url) if (folder / "studies.db").exists() and Store.preflight(url) == "current" else None
        row = store.find_study("tiny") if store else None
        points = store.study_points(row.id) if store and row else {}
        if not points:
            continue
        evaluated += 1
        study = hpsearch.open_study("tiny", store=url)
        told = (number, how, moment, code)
        assert study.best is not None, told
        if how != "SIGKILL":
            assert study.board().best is not None, told
            assert api.export("tiny", output=folder / "model", store=url).is_dir(), told
        assert [one for one in hpsearch.doctor(store=url) if not one.can_repair] == [], told
    assert evaluated > 100


def _launch_and_stop(file: Path, how: str, moment: float) -> int:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            overrides = [*PAUSING, *([f"budget.minutes={moment / 60}"] if how == "deadline" else [])]
            code = hpsearch.launch(file, overrides=overrides, trials=20).exit_code
        finally:
            os._exit(code)
    timer = threading.Timer(moment, os.kill, (pid, getattr(signal, how, 0)))
    if how != "deadline":
        timer.start()
    _, status = os.waitpid(pid, 0)
    timer.cancel()
    return os.waitstatus_to_exitcode(status)
