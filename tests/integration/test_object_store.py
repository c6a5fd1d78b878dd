"""A study whose files lie in an object store: a real S3 server (moto's) on loopback, spoken to by s3fs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpsearch.data.prepare import prepare
from hpsearch.files import storage
from hpsearch.files.layout import STOP_FILE
from hpsearch.files.storage import locate
from hpsearch.records import TrialConfig, TrialState
from hpsearch.spec.load import load_study
from hpsearch.training import states
from hpsearch.worker import watchdog
from hpsearch.worker.run import run_trial
from tests.commands import HPSEARCH
from tests.conftest import TINY, Run, drain, kill_all
from tests.object_store import BUCKET, ObjectStore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.end()


@pytest.fixture
def s3(server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectStore:
    for name, value in {**server.environment, "HPSEARCH_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return server


def study(tmp_path: Path, **changes: str) -> Path:
    file = tmp_path / "study.yaml"
    text = f"{TINY}store: sqlite:///{tmp_path}/studies.db\nfolder: {BUCKET}/{tmp_path.name}\n"
    for old, new in changes.items():
        assert f"{old}: " in text
        text = "".join(f"{old}: {new}\n" if line.startswith(f"{old}: ") else line for line in text.splitlines(True))
    file.write_text(text)
    return file


@pytest.fixture
def config(s3: ObjectStore, tmp_path: Path) -> TrialConfig:
    spec = load_study(study(tmp_path))
    data, _ = prepare(spec)
    params = {"learning_rate": 0.02, "batch_size": 16, "num_epochs": 8, "num_layers": 1}
    model, training = spec.settings_for(params)
    return TrialConfig(
        study="tiny", number=1, task="causal_lm", seed=0, params=params, model=model,
        training=training.model_copy(update={"evaluations_per_epoch": 4}), rule=None, data=str(data), threads=1, device="cpu",
        folder=f"{BUCKET}/{tmp_path.name}/trial-00001",
    )  # fmt: skip


def test_a_study_in_an_object_store_is_run_read_exported_and_tidied_there(
    s3: ObjectStore, tmp_path: Path, hpsearch: Run
) -> None:
    study(tmp_path)
    launched = hpsearch("launch", "study.yaml", "--set", "limits.keep_checkpoints=2")
    assert launched.returncode == 0, launched.stderr
    ranked = json.loads(hpsearch("rank", "tiny", "--json", "--store", f"sqlite:///{tmp_path}/studies.db").stdout)
    assert len(ranked["trials"]) >= 2
    there = s3.keys(tmp_path.name)
    models = {key.split("/")[2] for key in there if key.endswith("model.safetensors")}
    assert models == {f"trial-{row['trial']:05d}" for row in ranked["trials"][:2]}, "the checkpoints that are kept"
    assert not [key for key in there if "/resume-" in key or ".tune-" in key], "and nothing that is needed no more"
    data = {key.split("/")[2] for key in there if key.startswith(f"{tmp_path.name}/data/")} - {"sources"}
    assert len(data) == 1
    copies = [place.name for place in (tmp_path / "cache" / "data").iterdir() if place.is_dir()]
    assert copies == list(data), "one copy on this node"
    assert not list(tmp_path.glob("hpsearch-runs*"))
    assert {place.name for place in tmp_path.iterdir()} <= {
        "cache",
        "study.yaml",
        "studies.db",
        "studies.db-wal",
        "studies.db-shm",
    }

    store = ("--store", f"sqlite:///{tmp_path}/studies.db")
    best = ranked["trials"][0]["trial"]
    exported = hpsearch("export", "tiny", *store)
    assert exported.returncode == 0, exported.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / f"tiny-trial-{best}")
    assert AutoTokenizer.from_pretrained(tmp_path / f"tiny-trial-{best}").vocab_size == model.config.vocab_size
    again = hpsearch("export", "tiny", str(best), *store)
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    last = ranked["trials"][-1]["trial"]
    assert "has no checkpoint" in hpsearch("export", "tiny", str(last), "-o", "none", *store).stderr
    said = hpsearch("logs", "tiny", str(best), *store).stdout
    assert "ends as" in said
    assert said.count("evaluation ") >= 2
    assert hpsearch("doctor", "tiny", *store).returncode == 0
    removed = hpsearch("gc", "tiny", "--keep", "1", *store)
    assert "1 folders" in removed.stdout
    assert {key.split("/")[2] for key in s3.keys(tmp_path.name) if key.endswith("model.safetensors")} == {
        f"trial-{best:05d}"
    }


def test_a_trial_resumes_from_an_object_store_to_the_bit(
    config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, whole_result = drain(run_trial(config.model_copy(update={"folder": str(tmp_path / "trial-00001")})))
    monkeypatch.setattr(states, "CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr(watchdog, "_LOOK_AFAR_EVERY_S", 0.0)
    trial = run_trial(config)
    heard = [next(trial) for _ in range(5)]
    (locate(config.folder) / STOP_FILE).touch()
    rest, result = drain(trial)
    assert result.state is TrialState.INTERRUPTED
    heard += rest
    assert len(heard) < len(whole)
    names = storage.names(locate(config.folder))
    assert len([name for name in names if name.startswith("resume-")]) == 2
    newest = max(name for name in names if name.startswith("resume-"))
    (locate(config.folder) / newest).write_bytes(b"cut short")
    again = config.model_copy(
        update={"folder": f"{config.folder}-attempt-2", "earlier": (config.folder,), "recorded": 0, "attempt": 2}
    )
    rest, result = drain(run_trial(again))
    assert "is damaged" in caplog.text
    assert "resumes from step" in caplog.text
    curve = {one.point.evaluation: (one.point.train_loss, one.point.valid_loss) for one in [*heard, *rest]}
    assert curve == {one.point.evaluation: (one.point.train_loss, one.point.valid_loss) for one in whole}
    assert result.scores == whole_result.scores
    assert result.checkpoint == again.folder
    third = again.model_copy(update={"folder": f"{config.folder}-attempt-3", "earlier": (again.folder,)})
    assert drain(run_trial(third))[1] == result, "what has ended is not run again"


def test_a_study_waits_for_an_object_store_that_is_away(
    config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0.0)
    monkeypatch.setattr(states, "CHECKPOINT_SHARE", 1e9)
    trial = run_trial(config)
    next(trial)
    # A port that is taken and listened to by nobody refuses all, and no other process gets it meanwhile.
    with monkeypatch.context() as away, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        _forget_connections()
        _, result = drain(trial)
        assert result.state is TrialState.INTERRUPTED
        assert result.needed_bytes
        assert "out of reach" in result.reason
        assert not storage.has_room(locate(config.folder), result.needed_bytes)
        _forget_connections()
    assert storage.has_room(locate(config.folder), result.needed_bytes)
    again = {"folder": f"{config.folder}-attempt-2", "earlier": (config.folder,), "attempt": 2}
    assert drain(run_trial(config.model_copy(update=again)))[1].state is TrialState.COMPLETED


def _forget_connections() -> None:
    type(locate(BUCKET).fs).clear_instance_cache()  # type: ignore[union-attr]


@pytest.mark.nightly
def test_a_killed_launch_goes_on_from_the_object_store(s3: ObjectStore, tmp_path: Path, hpsearch: Run) -> None:
    file = study(tmp_path, backend="ray")
    file.write_text(file.read_text().replace("num_epochs: {min: 2, max: 4}", "num_epochs: 60"))
    quiet = ["--set=prune.overfit=false", "--set=prune.unpromising=none", "--set=resources.parallel=1"]
    command = [*HPSEARCH, "launch", "study.yaml", "--trials", "1", *quiet]
    launched = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not [key for key in s3.keys(tmp_path.name) if "/resume-" in key]:
            assert launched.poll() is None
            assert time.monotonic() < until
            time.sleep(0.3)
    finally:
        family = psutil.Process(launched.pid).children(recursive=True)
        launched.kill()
        launched.wait()
        kill_all(family)
    resumed = hpsearch("launch", "study.yaml", "--trials", "1", *quiet)
    assert resumed.returncode == 0, resumed.stderr
    said = hpsearch("logs", "tiny", "0", "--store", f"sqlite:///{tmp_path}/studies.db").stdout
    assert "resumes from step" in said


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("s3://key:secret@studies/runs", "holds credentials"),
        ("s3://", "names no place"),
        ("nothing://studies/runs", "fsspec knows no nothing://"),
        ("oci://studies/runs", "oci:// needs a package"),
    ],
)
def test_a_folder_that_cannot_be_is_refused_with_its_line(
    folder: str, said: str, tmp_path: Path, hpsearch: Run
) -> None:
    study(tmp_path, folder=f'"{folder}"')
    refused = hpsearch("check", "study.yaml")
    assert refused.returncode == 2
    assert "study.yaml:1" in refused.stderr
    assert said in refused.stderr
    assert "secret" not in refused.stderr


def test_a_bucket_that_is_not_there_ends_a_launch_before_it_begins(
    s3: ObjectStore, tmp_path: Path, hpsearch: Run
) -> None:
    study(tmp_path, folder="s3://no-such-bucket/runs")
    refused = hpsearch("launch", "study.yaml")
    assert refused.returncode == 74, refused.stderr
    assert "s3://no-such-bucket/runs" in refused.stderr
    assert "bucket does not exist" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in refused.stderr
