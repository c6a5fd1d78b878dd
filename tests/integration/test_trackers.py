"""Curves and results copied live to TensorBoard, MLflow and Weights & Biases, read back from what those tools keep."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboardX.proto.event_pb2 import Event as TensorBoardEvent
from wandb.proto import wandb_internal_pb2

import hpsearch as package
from hpsearch.errors import UsageError
from hpsearch.integrations import mlflow as mlflow_tracker
from hpsearch.integrations.trackers import check_trackers, tracked
from hpsearch.records import Point, PointReported, Score, TrialEnded, TrialResult, TrialStarted, TrialState
from hpsearch.registry import TRACKERS
from hpsearch.store.rows import StudyRow
from tests.conftest import Run
from tests.rows import row

pytestmark = pytest.mark.slow
STUDY = row(StudyRow, name="a study", created_at=datetime(2026, 1, 2, tzinfo=UTC))


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


def point(evaluation: int, train_loss: float = 2.0) -> Point:
    return Point(
        evaluation=evaluation, epoch=float(evaluation), step=10 * evaluation, train_loss=train_loss, valid_loss=3.0,
        learning_rate=0.1, tokens=100, seconds=1.0,
    )  # fmt: skip


def result(state: TrialState) -> TrialResult:
    score = Score(metric="perplexity", value=9.5, low=9.0, high=10.0, n=7)
    return TrialResult(state=state, reason="as it was", best_valid_loss=3.0, scores=(score,))


def tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars by name and step, from the records of event files: length, check sum, event, check sum."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events*")):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = TensorBoardEvent.FromString(content[place + 12 : place + 12 + length])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
            place += 16 + length
    return found


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records of W&B's files, which are as LevelDB's logs: blocks of pieces, each with check sum, length and kind."""
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        content, place, record = file.read_bytes(), 7, b""
        while place + 7 <= len(content):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
            record += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or the last piece of one
                yield wandb_internal_pb2.Record.FromString(record)
                record = b""


def test_a_launch_is_copied_to_all_three(tiny: Path, tmp_path: Path) -> None:
    study = package.launch(tiny, trials=2, track=["tensorboard", "mlflow", "wandb"])
    best = study.trial(study.board().rows[0].trial)
    losses = [pytest.approx(one.valid_loss) for one in best.points]

    (folder,) = tmp_path.glob(f"runs/tiny-*/tensorboard/trial-{best.number:05d}")
    scalars = tensorboard(folder)
    assert list(scalars["valid_loss"].values()) == losses
    assert list(scalars["valid_loss"]) == [one.step for one in best.points]
    assert scalars["test_perplexity"] == {0: pytest.approx(best.scores[0].value, rel=1e-6)}

    client = MlflowClient()
    experiment = client.get_experiment_by_name("tiny")
    runs = {run.data.tags["hpsearch.trial"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"0", "1"}
    run = runs[str(best.number)]
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "completed")
    assert float(run.data.params["learning_rate"]) == best.params["learning_rate"]
    assert [one.value for one in client.get_metric_history(run.info.run_id, "valid_loss")] == losses
    assert run.data.metrics["test_perplexity"] == pytest.approx(best.scores[0].value)

    records = list(wandb_records(tmp_path))
    began = [record.run for record in records if record.HasField("run")]
    assert {(run.project, run.run_group, run.display_name) for run in began} == {
        ("tiny", "tiny", "trial 0"), ("tiny", "tiny", "trial 1"),
    }  # fmt: skip
    logged = [
        float(item.value_json)
        for record in records
        for item in record.history.item
        if "valid_loss" in (item.key, *item.nested_key)
    ]
    assert sorted(logged) == sorted(one.valid_loss for trial in (0, 1) for one in study.trial(trial).points)


def test_a_trial_that_is_resumed_goes_on_in_its_run(tmp_path: Path) -> None:
    begun = TrialStarted(trial=3, params={"learning_rate": 0.1, "odd name!": "x"}, epochs=9, repeat_of=None, attempt=1)
    for evaluation, state in ((1, TrialState.INTERRUPTED), (2, TrialState.COMPLETED)):
        with tracked(["tensorboard", "mlflow"], STUDY, tmp_path, lambda text: pytest.fail(text)) as listeners:
            for hear in listeners:
                hear(begun)
                hear(PointReported(trial=3, point=point(evaluation, float("nan")), verdict="", epochs=9))
                hear(
                    TrialEnded(trial=3, result=result(state), last_epoch=2.0, epochs=9, params={}, metric="perplexity")
                )
    scalars = tensorboard(tmp_path / "tensorboard" / "trial-00003")
    assert list(scalars["valid_loss"]) == [10, 20]
    assert "train_loss" not in scalars, "what is no number is left out"
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("a study").experiment_id])
    assert [one.step for one in client.get_metric_history(run.info.run_id, "valid_loss")] == [10, 20]
    assert run.info.status == "FINISHED"


def test_a_trial_that_waits_and_never_goes_on_is_ended_there_too(tmp_path: Path) -> None:
    with tracked(["tensorboard", "mlflow"], STUDY, tmp_path, lambda text: pytest.fail(text)) as listeners:
        for hear in listeners:
            hear(TrialStarted(trial=0, params={"learning_rate": 0.1}, epochs=9, repeat_of=None, attempt=1))
            hear(PointReported(trial=0, point=point(1), verdict="", epochs=9))
            for state in (TrialState.PAUSED, TrialState.UNPROMISING):
                params = {"learning_rate": 0.1}
                hear(
                    TrialEnded(
                        trial=0, result=result(state), last_epoch=2.0, epochs=9, params=params, metric="perplexity"
                    )
                )
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("a study").experiment_id])
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "unpromising")


class Broken:
    """A tracker whose service does not answer."""

    def __init__(self, *_: Any) -> None: ...

    def begin(self, *_: Any) -> None:
        raise ConnectionError("no route to host")

    log = end = begin

    def close(self) -> None: ...


def test_a_tracker_that_fails_is_left_alone_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS.built_in, "mlflow", f"{__name__}:Broken")  # type: ignore[arg-type]
    said: list[str] = []
    with tracked(["mlflow"], STUDY, tmp_path, said.append) as (hear,):
        for trial in range(50):
            hear(TrialStarted(trial=trial, params={}, epochs=9, repeat_of=None, attempt=1))
            hear(PointReported(trial=trial, point=point(1), verdict="", epochs=9))
    assert len(said) == 1
    assert "mlflow: no route to host. Nothing more is logged there" in said[0]


def test_what_cannot_be_tracked_is_said_before_anything_starts(
    tiny: Path, tmp_path: Path, hpsearch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    refused = hpsearch("launch", "tiny.yaml", "--track", "wandb", env=nobody)
    assert refused.returncode == 2
    assert "finds no API key: `wandb login`" in refused.stderr
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UsageError, match="unknown tracker 'aim'; expected tensorboard, mlflow, wandb"):
        check_trackers(["aim"], tmp_path)
    monkeypatch.setattr(mlflow_tracker, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'hpsearch\[mlflow\]'"):
        check_trackers(["mlflow"], tmp_path)
