"""Each fault for real, and what is true after it. `make test-faults` runs all, `make test` the short ones."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

import hpsearch
from tests.conftest import kill_all
from tests.faults.harness import STEPS, Row, Stopwatch, Study, lock_sqlite, wrong_clock
from tests.faults.postgres import Postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Suffer = Callable[..., Study]
Survive = Callable[[Row], None]
KILLS = {"sqlite": 100, "postgresql": 30}
long = pytest.mark.faults


def states(study: Study) -> list[str]:
    return [trial.state for trial in hpsearch.open_study("suffering", store=study.store).trials()]


@pytest.mark.faults
def test_a_worker_is_killed(suffer: Suffer, survive: Survive) -> None:
    study = suffer()
    launch = study.launch()
    victim = study.wait_for_victim(launch)
    watch = Stopwatch(study)
    os.kill(victim["pid"], signal.SIGKILL)
    row = Row("SIGKILL of a worker", seconds=watch.next_worker(launch, victim["trial"]))
    survive(study.judge(row, launch.wait(240)))
    trial = hpsearch.open_study("suffering", store=study.store).trial(victim["trial"])
    assert (trial.state, trial.attempt, trial.worker_deaths) == ("completed", 2, 1)
    said = f"trial {victim['trial']}: the trial's process was ended by SIGKILL; trying again from its checkpoint"
    assert said in [event.get("text") for event in study.events()]
    assert row.repeated <= 1


@long
def test_a_worker_is_preempted(suffer: Suffer, survive: Survive) -> None:
    study = suffer()
    launch = study.launch()
    victim = study.wait_for_victim(launch)
    watch = Stopwatch(study)
    os.kill(victim["pid"], signal.SIGTERM)
    row = Row("SIGTERM of a worker", seconds=watch.next_worker(launch, victim["trial"]))
    survive(study.judge(row, launch.wait(240)))
    trial = hpsearch.open_study("suffering", store=study.store).trial(victim["trial"])
    assert (trial.attempt, trial.worker_deaths) == (2, 0), "a preemption is nobody's fault"
    assert row.repeated == 0


@long
def test_a_preemption_uses_up_no_retry(suffer: Suffer, survive: Survive) -> None:
    study = suffer(overrides=["limits.retries=1"])
    launch = study.launch()
    victim = study.wait_for_victim(launch)
    os.kill(victim["pid"], signal.SIGTERM)
    Stopwatch(study).next_worker(launch, victim["trial"])
    (*_, again) = [epoch for epoch in study.epochs() if epoch["trial"] == victim["trial"]]
    watch = Stopwatch(study)
    os.kill(again["pid"], signal.SIGKILL)
    row = Row("SIGTERM, then SIGKILL of a worker", seconds=watch.next_worker(launch, victim["trial"]))
    survive(study.judge(row, launch.wait(240)))
    trial = hpsearch.open_study("suffering", store=study.store).trial(victim["trial"])
    assert (trial.state, trial.attempt, trial.worker_deaths) == ("completed", 3, 1)


@long
def test_a_worker_is_frozen(suffer: Suffer, survive: Survive) -> None:
    study = suffer(overrides=["limits.stall_minutes=0.25"])
    launch = study.launch()
    victim = study.wait_for_victim(launch)
    watch = Stopwatch(study)
    os.kill(victim["pid"], signal.SIGSTOP)
    row = Row("SIGSTOP of a worker for ever", seconds=watch.next_worker(launch, victim["trial"]))
    survive(study.judge(row, launch.wait(240)))
    trial = hpsearch.open_study("suffering", store=study.store).trial(victim["trial"])
    assert (trial.state, trial.attempt, trial.worker_deaths) == ("completed", 2, 1)
    assert not psutil.pid_exists(victim["pid"])
    assert row.repeated <= 1


@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=long)])
def test_a_driver_is_killed(suffer: Suffer, survive: Survive, backend: str) -> None:
    study = suffer(backend=backend)
    first = study.launch()
    study.wait_for_epochs(5, first)
    watch = Stopwatch(study)
    first.kill()
    first.wait()
    second = study.launch()
    row = Row(f"SIGKILL of the driver, {backend}", recovered_by="the same command", seconds=watch.next_worker(second))
    survive(study.judge(row, second.wait(240)))


@long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_driver_is_asked_to_stop(suffer: Suffer, survive: Survive, number: signal.Signals, code: int) -> None:
    study = suffer()
    first = study.launch()
    study.wait_for_epochs(5, first)
    watch = Stopwatch(study)
    first.send_signal(number)
    assert first.wait(60) == code
    assert "To resume:" in study.errors().read_text() or study.events(0)
    assert "running" not in states(study)
    second = study.launch()
    row = Row(f"{number.name} of the driver", recovered_by="the same command")
    row.seconds = watch.next_worker(second)
    survive(study.judge(row, second.wait(240)))
    assert row.repeated == 0, "each trial wrote a checkpoint before it left"


@long
@pytest.mark.parametrize("process", ["raylet", "gcs_server", "the whole Ray head"])
def test_ray_is_killed(suffer: Suffer, survive: Survive, process: str) -> None:
    study = suffer()
    launch = study.launch()
    study.wait_for_epochs(5, launch)
    victims = (
        psutil.Process(launch.pid).children(recursive=True) if process.startswith("the") else study.children(process)
    )
    watch = Stopwatch(study)
    kill_all(victims)
    row = Row(f"SIGKILL of {process}", seconds=watch.next_worker(launch))
    survive(study.judge(row, launch.wait(240)))
    assert "Ray was lost; starting it anew (1 of 3)" in study.errors(0).read_text()


@long
def test_a_driver_is_stopped_for_two_minutes(suffer: Suffer, survive: Survive) -> None:
    study = suffer(backend="inline")
    first = study.launch()
    study.wait_for_epochs(3, first)
    watch = Stopwatch(study)
    first.send_signal(signal.SIGSTOP)
    # Its trial goes on in another driver, once it has shown no life for half a minute.
    second = study.launch()
    row = Row("SIGSTOP of the driver for two minutes", recovered_by="the same command")
    row.seconds = watch.next_worker(second)
    code = second.wait(240)
    before = study._rows("SELECT * FROM hpsearch_trials")
    time.sleep(max(0.0, 120 - (time.monotonic() - watch.began)))
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 4, "it has lost the study"
    assert study._rows("SELECT * FROM hpsearch_trials") == before, "and wrote nothing more"
    survive(study.judge(row, code))


@long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_a_driver_is_killed_again_and_again(
    suffer: Suffer, survive: Survive, store: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres_store") if store == "postgresql" else ""
    study = suffer(backend="inline", trials=40 if store == "sqlite" else 12, store=url, pace=0.5)
    chance = random.Random(0)
    kills = 0
    while kills < KILLS[store]:
        launch = study.launch("--extend")
        try:
            assert launch.wait(chance.uniform(0.3, 8.0)) == 0, study.errors().read_text()
            study.trials += 8  # it was done before its time
        except subprocess.TimeoutExpired:
            launch.kill()
            launch.wait()
            kills += 1
    row = Row(f"{kills} SIGKILLs of the driver, {store}", recovered_by="the same command")
    code = study.finish("--extend")
    survive(study.judge(row, code))
    assert len(hpsearch.open_study("suffering", store=study.store).board().rows) == study.trials


@long
@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_two_drivers_start_at_once(
    suffer: Suffer, survive: Survive, store: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres_store") if store == "postgresql" else ""
    study = suffer(backend="inline", store=url, pace=2.0)
    launches = [study.launch() for _ in range(4)]
    codes = sorted(launch.wait(240) for launch in launches)
    row = Row(f"four drivers at once on an empty {store}")
    assert codes == [0, 4, 4, 4]
    said = [study.errors(number).read_text() for number in range(4)]
    assert sum("is held by" in text and "since" in text for text in said) == 3
    survive(study.judge(row, 0))
    assert row.repeated == 0


@pytest.mark.parametrize(
    "seconds", [pytest.param(8, marks=long, id="briefly"), pytest.param(60, marks=long, id="minute")]
)
def test_sqlite_is_locked(suffer: Suffer, survive: Survive, seconds: int) -> None:
    study = suffer(backend="inline" if seconds < 60 else "ray", overrides=["search.num_epochs=4"])
    launch = study.launch()
    study.wait_for_epochs(2, launch)
    lock = lock_sqlite(study.folder / "studies.db")
    watch = Stopwatch(study)
    row = Row(f"SQLite locked for {seconds} s", seconds=watch.next_epoch(launch))
    time.sleep(max(0.0, seconds - (time.monotonic() - watch.began)))
    assert launch.poll() is None, "it waits"
    lock.close()
    survive(study.judge(row, launch.wait(240)))
    assert row.repeated == 0


@long
@pytest.mark.parametrize("seconds", [0, 60])
def test_postgresql_goes_away(suffer: Suffer, survive: Survive, tmp_path: Path, seconds: int) -> None:
    server = Postgres(tmp_path / "pg")
    try:
        study = suffer(store=server.url, trials=6)
        launch = study.launch()
        study.wait_for_epochs(4, launch)
        watch = Stopwatch(study)
        server.stop()
        row = Row("PostgreSQL restarted" if not seconds else f"PostgreSQL away for {seconds} s")
        row.seconds = watch.next_epoch(launch)
        time.sleep(seconds)
        server.start()
        survive(study.judge(row, launch.wait(240)))
        assert row.repeated == 0
        if seconds:
            assert any("the store is back after" in event.get("text", "") for event in study.events())
    finally:
        server.stop()


@long
def test_the_disk_is_full_for_checkpoints(suffer: Suffer, survive: Survive, tmp_path: Path) -> None:
    full = tmp_path / "full"
    study = suffer(backend="inline", faults={"full": str(full)})
    launch = study.launch()
    study.wait_for_epochs(3, launch)
    full.touch()
    study.wait_for(lambda: any("no new trial starts" in event.get("text", "") for event in study.events()), launch)
    watch = Stopwatch(study)
    full.unlink()
    row = Row("disk full while writing a checkpoint", seconds=watch.next_epoch(launch))
    survive(study.judge(row, launch.wait(240)))


@long
def test_the_disk_is_full_for_the_store(suffer: Suffer, survive: Survive, tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False, capture_output=True
    ).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        study = suffer(store=f"sqlite:///{disk}/studies.db", pace=1.0)
        launch = study.launch()
        study.wait_for_epochs(3, launch)
        ballast = disk / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as stream:
            while True:
                stream.write(b"0" * 4096)
        study.wait_for(lambda: any("Trials continue" in event.get("text", "") for event in study.events()), launch)
        row = Row("disk full while writing the store", seconds=Stopwatch(study).next_epoch(launch))
        ballast.unlink()
        survive(study.judge(row, launch.wait(240)))
        assert row.repeated == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@long
def test_the_last_checkpoint_is_damaged(suffer: Suffer, survive: Survive) -> None:
    study = suffer(backend="inline", trials=2)
    first = study.launch()
    study.wait_for_epochs(3, first)
    first.kill()
    first.wait()
    watch = Stopwatch(study)
    *_, last = sorted(study.folder.rglob("trial-00000/resume-*"))
    last.write_bytes(last.read_bytes()[:1000])
    (finding,) = [found for found in hpsearch.doctor(store=study.store) if "running" in found.problem]
    assert finding.can_repair
    second = study.launch()
    row = Row("last checkpoint damaged, driver killed", recovered_by="the same command")
    row.seconds = watch.next_worker(second)
    survive(study.judge(row, second.wait(240)))
    assert row.repeated <= 2


@long
def test_a_loss_becomes_nan(suffer: Suffer, survive: Survive) -> None:
    study = suffer(backend="inline", faults={"break": "nan", "trial": 1, "step": random.Random().randrange(1, STEPS)})
    row = Row("NaN at a random step")
    survive(study.judge(row, study.finish()))
    assert states(study) == ["completed", "diverged", "completed", "completed"]


@pytest.mark.parametrize("fits", [pytest.param(7, marks=long), pytest.param(0, marks=long)])
def test_memory_runs_out(suffer: Suffer, survive: Survive, fits: int) -> None:
    study = suffer(backend="inline", trials=3, faults={"break": "oom", "trial": 1, "fits": fits})
    row = Row("out of memory above 7 examples" if fits else "out of memory at one example")
    survive(study.judge(row, study.finish()))
    opened = hpsearch.open_study("suffering", store=study.store)
    trial = opened.trial(1)
    if fits:
        assert (trial.state, trial.micro_batch_size) == ("completed", 4)
        said = [line["message"] for line in hpsearch.logs("suffering", 1, store=study.store)]
        assert "out of memory; continues in micro-batches of 4" in said
    else:
        assert trial.state == "infeasible"
        assert "micro-batch 1" in trial.reason
        assert [row.trial for row in opened.board().rows] in ([0, 2], [2, 0])


@long
@pytest.mark.parametrize("only_first", [True, False])
def test_a_worker_hangs(suffer: Suffer, survive: Survive, only_first: bool) -> None:
    study = suffer(
        trials=3,
        faults={"break": "hang", "trial": 1, "step": 15, "only_first": only_first},
        overrides=["limits.stall_minutes=0.2", "limits.retries=1"],
    )
    row = Row("a worker hangs once" if only_first else "a worker hangs each time")
    survive(study.judge(row, study.finish()))
    trial = hpsearch.open_study("suffering", store=study.store).trial(1)
    if only_first:
        assert (trial.state, trial.attempt) == ("completed", 2)
    else:
        assert (trial.state, trial.attempt) == ("failed", 2)
        assert "made no step for" in trial.reason
        assert "sitecustomize.py" in trial.error, "it says where it hung"


@long
@pytest.mark.parametrize("seconds", [3600, -3600])
def test_the_clock_jumps(suffer: Suffer, survive: Survive, tmp_path: Path, seconds: int) -> None:
    clock, hold = tmp_path / "clock", tmp_path / "hold"
    study = suffer(backend="inline", clock=wrong_clock(clock), faults={"hold": str(hold)})
    first = study.launch()
    study.wait_for_epochs(3, first)
    clock.write_text(f"{seconds:+d}")
    row = Row(f"clock moved by {seconds / 3600:+.0f} h", seconds=Stopwatch(study).next_epoch(first))
    hold.touch()  # or the first has ended before the second has asked
    second = study.launch()
    assert second.wait(120) == 4, "the first is alive, whatever the clock says"
    hold.unlink()
    study.launches.reverse()
    survive(study.judge(row, first.wait(240)))
    assert row.repeated == 0
    ends = [trial.ended_at for trial in hpsearch.open_study("suffering", store=study.store).trials()]
    assert any(abs((end - datetime.now(UTC)).total_seconds()) > 3000 for end in ends), "the clock was wrong"


def test_a_study_of_broken_trials_is_ended(suffer: Suffer) -> None:
    study = suffer(backend="inline", trials=9, faults={"break": "oom", "fits": 0})
    assert study.finish() == 3
    assert states(study) == ["infeasible"] * 3
    said = study.errors(0).read_text()
    assert "the first 3 trials all ended the same way: infeasible: out of memory at micro-batch 1" in said
