"""Trials in forked processes: the same as in one's own, and neither outlives what it belongs to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hpsearch import open_study
from hpsearch.backends.fork_server import Fork, fork_server
from hpsearch.data.prepare import prepare
from hpsearch.files.layout import STOP_FILE
from hpsearch.records import TrialConfig, TrialState
from hpsearch.spec.load import load_study
from hpsearch.worker.run import run_trial
from tests.conftest import TINY, Run, command_of, drain

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with fork_server(tmp_path_factory.mktemp("s")) as address:
        assert address is not None
        yield address


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrialConfig]:
    folder = tmp_path_factory.mktemp("runs")
    file = folder / "tiny.yaml"
    file.write_text(f"{TINY}store: sqlite:///{folder}/studies.db\nfolder: {folder}\n")
    spec = load_study(file)
    data, _ = prepare(spec)

    def made(number: int, **training: object) -> TrialConfig:
        params = {"learning_rate": 0.02, "batch_size": 16, "num_epochs": 2, "num_layers": 1}
        model, run = spec.settings_for(params)
        return TrialConfig(
            study="tiny", number=number, task="causal_lm", seed=0, params=params, model=model,
            training=run.model_copy(update=training), rule=None, data=str(data), threads=1, device="cpu",
            folder=str(folder / f"trial-{number:05d}"),
        )  # fmt: skip

    return made


def gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_a_fork_runs_one_trial_after_the_other_as_its_worker_would(
    server: str, configure: Callable[..., TrialConfig]
) -> None:
    ours, result = drain(run_trial(configure(0)))
    fork = Fork(server, ENVIRONMENT)
    for number in (1, 2):
        theirs, its_result = drain(fork.run_trial(configure(number)))
        assert [one.point.valid_loss for one in theirs] == [one.point.valid_loss for one in ours]
        assert its_result.scores == result.scores
        assert its_result.state is TrialState.COMPLETED
    assert fork._pid != os.getpid()


def test_a_fork_has_the_environment_the_folder_and_the_output_of_its_worker(
    server: str, configure: Callable[..., TrialConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "said.txt").open("w") as said:
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            fork = Fork(server, {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "7"})
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    _, result = drain(fork.run_trial(configure(10)))
    assert result.provenance["visible_gpus"] == "7"
    process = psutil.Process(fork._pid)
    assert process.cwd() == str(tmp_path)
    assert os.readlink(f"/proc/{fork._pid}/fd/2") == str(tmp_path / "said.txt")


def test_a_trial_left_in_its_middle_leaves_its_fork_for_the_next(
    server: str, configure: Callable[..., TrialConfig]
) -> None:
    fork = Fork(server, ENVIRONMENT)
    trial = fork.run_trial(configure(20, num_epochs=200))
    next(trial)
    trial.close()
    assert not (Path(configure(20).folder) / "pulse.json").exists()
    assert drain(fork.run_trial(configure(21)))[1].state is TrialState.COMPLETED


def test_sigterm_of_its_worker_brings_a_trial_to_safety(server: str, configure: Callable[..., TrialConfig]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trial = Fork(server, ENVIRONMENT).run_trial(configure(30, num_epochs=200))
    next(trial)
    os.kill(os.getpid(), signal.SIGTERM)
    _, result = drain(trial)
    assert result.state is TrialState.INTERRUPTED
    assert result.reason == "preempted by SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_trial_raises_comes_back_with_its_traceback(server: str, configure: Callable[..., TrialConfig]) -> None:
    config = configure(40)
    Path(config.folder).write_text("in the way")
    with pytest.raises(ChildProcessError, match=r"(?s)^Traceback .*run\.py.*\nFileExistsError: "):
        drain(Fork(server, ENVIRONMENT).run_trial(config))


def test_the_end_of_a_fork_is_told_with_its_signal(server: str, configure: Callable[..., TrialConfig]) -> None:
    fork = Fork(server, ENVIRONMENT)
    trial = fork.run_trial(configure(50, num_epochs=200))
    next(trial)
    os.kill(fork._pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"^the trial's process was ended by SIGKILL$"):
        drain(trial)
    assert drain(Fork(server, ENVIRONMENT).run_trial(configure(51)))[1].state is TrialState.COMPLETED


def test_a_fork_dies_with_its_worker_even_when_it_is_stopped(
    server: str, configure: Callable[..., TrialConfig]
) -> None:
    fork, other = Fork(server, ENVIRONMENT), Fork(server, ENVIRONMENT)
    next(fork.run_trial(configure(60, num_epochs=200)))
    os.kill(fork._pid, signal.SIGSTOP)
    fork._lines.close()
    fork._socket.close()  # as at the death of a worker
    assert gone(fork._pid)
    assert drain(other.run_trial(configure(61)))[1].state is TrialState.COMPLETED


def test_server_and_forks_end_with_their_launch(tmp_path: Path, configure: Callable[..., TrialConfig]) -> None:
    with fork_server(tmp_path) as address:
        assert address is not None
        fork = Fork(address, ENVIRONMENT)
        trial = fork.run_trial(configure(70, num_epochs=200))
        next(trial)
        servers = [
            child for child in psutil.Process().children() if "hpsearch.backends.fork_server" in command_of(child)
        ]
        server = next(one for one in servers if fork._pid in [child.pid for child in one.children()])
    assert gone(fork._pid)
    assert not server.is_running()
    with pytest.raises(ChildProcessError, match=r"^the trial's process is gone, and with it the one that forks$"):
        drain(trial)
    with pytest.raises(OSError, match="Connection refused"):
        Fork(address, ENVIRONMENT)


def test_a_server_that_dies_leaves_its_forks_to_end_their_trials(
    tmp_path: Path, configure: Callable[..., TrialConfig]
) -> None:
    with fork_server(tmp_path) as address:
        assert address is not None
        fork = Fork(address, ENVIRONMENT)
        psutil.Process(fork._pid).parent().kill()
        assert drain(fork.run_trial(configure(80)))[1].state is TrialState.COMPLETED
        with pytest.raises(OSError, match="Connection refused"):
            Fork(address, ENVIRONMENT)


THREADED = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
HAS_USED_A_GPU = """
import sys, types
sys.modules["hpsearch.worker.run"] = types.SimpleNamespace(can_use_gpus=lambda: False)
"""
"""There is no GPU here to use."""


@pytest.mark.parametrize(
    ("state", "said"), [(THREADED, r"gone|reset|refused"), (HAS_USED_A_GPU, "has used a GPU")], ids=["threads", "GPU"]
)
def test_a_server_that_could_not_fork_well_gives_no_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, said: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(state)
    monkeypatch.syspath_prepend(str(tmp_path))
    with fork_server(tmp_path) as address:
        assert address is not None
        with pytest.raises(OSError, match=said):
            Fork(address, ENVIRONMENT)


def test_a_path_too_long_for_a_socket_leaves_it_to_ray_to_say_so(tmp_path: Path) -> None:
    (long := tmp_path / ("x" * 100)).mkdir()
    with fork_server(long) as address:
        assert address is None


@pytest.mark.nightly
def test_a_study_without_forks_runs_all_the_same(tmp_path: Path, tiny: Path, hpsearch: Run) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nif 'hpsearch.backends.fork_server' in sys.orig_argv:\n    exec({THREADED!r})\n"
    )
    arguments = ["--set", "backend=ray", "--trials", "2", "--json"]
    launched = hpsearch("launch", str(tiny), *arguments, env={"PYTHONPATH": str(tmp_path)})
    assert launched.returncode == 0, launched.stderr
    rows = open_study("tiny", store=f"sqlite:///{tmp_path}/studies.db").trials()
    assert [row.state for row in rows].count("failed") == 0
    assert len(rows) == 2


def test_a_stop_file_reaches_a_fork(server: str, configure: Callable[..., TrialConfig]) -> None:
    config = configure(90, num_epochs=200)
    trial = Fork(server, ENVIRONMENT).run_trial(config)
    next(trial)
    (Path(config.folder) / STOP_FILE).touch()
    assert drain(trial)[1].reason == "asked to stop"
