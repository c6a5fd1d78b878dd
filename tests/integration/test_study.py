"""A whole study, from YAML to ranked rows, on both backends and both databases, as a user would notice it."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray

import hpsearch
from hpsearch.errors import StudyBusyError, UsageError
from hpsearch.files.layout import PULSE_FILE
from hpsearch.records import Event
from hpsearch.spec.task import task_named
from hpsearch.store.store import Store
from tests.faults.harness import Study as Suffering

pytestmark = pytest.mark.slow

COLUMNS = "trial, evaluation, epoch, step, train_loss, valid_loss, learning_rate, tokens"

OVERFIT = [
    "model.hidden_size=64",
    "training.schedule=constant",
    "training.evaluations_per_epoch=2",
    "search.learning_rate=1e-2",
    "search.batch_size=[8, 16]",
    "search.num_epochs=30",
]
"""Settings under which validation loss turns within ten epochs."""


def curves(file: Path, study: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(file) as plain:
        return plain.execute(f"SELECT {COLUMNS} FROM hpsearch_curves WHERE study = ?", [study]).fetchall()


def test_a_study_file_becomes_a_ranked_record(tiny: Path, tmp_path: Path) -> None:
    study = hpsearch.launch(tiny)
    assert study.exit_code == 0
    board = study.leaderboard()
    assert list(board["test_perplexity"]) == sorted(board["test_perplexity"])
    assert study.best is not None
    assert study.best.test_perplexity == board["test_perplexity"].min()
    assert set(board["state"]) <= {"completed", "overfit", "plateau"}
    assert (board["score_low"] < board["score"]).all()
    assert (board["score"] < board["score_high"]).all()
    assert {"param_learning_rate", "param_batch_size", "param_num_epochs"} <= set(board.columns)
    trial = study.trial(int(study.best.trial))
    assert len(trial.points) >= 2
    assert trial.best_valid_loss == min(point.valid_loss for point in trial.points)
    assert {score.metric for score in trial.scores} == {"perplexity", "bits_per_byte"}
    assert (Path(trial.checkpoint) / "model.safetensors").is_file()
    assert len(study.trials()) == 4
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["runs", "studies.db", "tiny.yaml"], "no litter"


def test_optuna_alone_reads_what_happened(tiny: Path, tmp_path: Path) -> None:
    study = hpsearch.launch(
        tiny, trials=6, overrides=["prune.unpromising={rule: median, warmup_epochs: 0, startup_trials: 2}"]
    )
    loaded = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/studies.db")
    ours = study.trials()
    assert [trial.number for trial in loaded.trials] == [row.number for row in ours]
    table = {
        "completed": "COMPLETE",
        "overfit": "COMPLETE",
        "plateau": "COMPLETE",
        "unpromising": "PRUNED",
        "diverged": "PRUNED",
    }
    for trial, row in zip(loaded.trials, ours, strict=True):
        assert trial.state.name == table[row.state]
        assert trial.params == row.params
        points = study.trial(row.number).points
        assert list(trial.intermediate_values) == [point.evaluation for point in points], "every evaluation is there"
        if trial.state.name == "COMPLETE":
            assert trial.value == row.best_valid_loss
    ranked = [row for row in ours if row.state in ("completed", "overfit", "plateau")]
    assert loaded.best_value == min(row.best_valid_loss for row in ranked)
    assert any(row.state == "unpromising" for row in ours)


def test_runs_that_overfit_are_pruned_scored_and_ranked(tiny: Path) -> None:
    study = hpsearch.launch(tiny, trials=2, overrides=OVERFIT)
    rows = study.trials()
    assert {row.state for row in rows} == {"overfit"}
    for row in rows:
        trial = study.trial(row.number)
        assert trial.best_epoch < trial.last_epoch < 30
        last = trial.decisions[-1]
        assert (last.verdict, last.action) == ("overfitting", "stop")
        assert last.evidence["best_evaluation"] == trial.best_evaluation
        assert last.evidence["valid_trend_z"] > 1.96 or last.evidence["since_best"] >= 7
        assert last.evidence["train_trend_z"] < -1.96
    assert len(study.leaderboard()) == 2


def test_the_test_split_is_seen_by_nobody_who_decides(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpsearch.tasks.causal_lm.training import CausalLM

    looks: list[str] = []
    batch = CausalLM.batch
    monkeypatch.setattr(
        CausalLM, "batch", lambda self, split, indices: (looks.append(split), batch(self, split, indices))[1]
    )
    events: list[tuple[str, int]] = []
    hpsearch.launch(tiny, trials=2, listen=lambda event: events.append((event.kind, looks.count("test"))))
    seen = 0
    for kind, so_far in events:
        if kind == "trial_ended":
            assert so_far > seen, "scored once, at its end"
            seen = so_far
        else:
            assert so_far == seen, "and not before"


def test_inline_and_ray_leave_the_same_rows(tiny: Path, tmp_path: Path) -> None:
    serial = ["resources.parallel=1", "prune.unpromising={rule: median, warmup_epochs: 0, startup_trials: 2}"]
    for backend in ("inline", "ray"):
        hpsearch.launch(tiny, name=backend, backend=backend, trials=6, overrides=serial)
    assert not ray.is_initialized()
    file = tmp_path / "studies.db"
    inline, on_ray = curves(file, "inline"), curves(file, "ray")
    assert inline == on_ray, "equal to the bit"
    assert len(inline) > 10
    rows = [hpsearch.open_study(name, store=f"sqlite:///{file}").trials() for name in ("inline", "ray")]
    for one, other in zip(*rows, strict=True):
        for key in (
            "number",
            "state",
            "reason",
            "params",
            "settings",
            "seed",
            "last_epoch",
            "best_epoch",
            "best_valid_loss",
        ):
            assert getattr(one, key) == getattr(other, key), key
    boards = [hpsearch.open_study(name, store=f"sqlite:///{file}").leaderboard() for name in ("inline", "ray")]
    assert list(boards[0]["score"]) == list(boards[1]["score"])


def test_ray_runs_trials_side_by_side_and_leaves_no_litter(
    tiny: Path, tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))  # other tests have their own Ray beside this one
    at_once: list[int] = []
    running: set[int] = set()

    def listen(event: Event) -> None:
        if event.kind == "trial_started":
            running.add(event.trial)
        elif event.kind == "trial_ended":
            running.discard(event.trial)
        at_once.append(len(running))

    study = hpsearch.launch(tiny, backend="ray", trials=5, listen=listen, overrides=["resources.parallel=2"])
    assert study.exit_code == 0
    assert max(at_once) == 2
    assert {row.state for row in study.trials()} <= {"completed", "overfit", "plateau"}
    assert not [path for path in short_folder.iterdir() if path.name.startswith(("hps-", "ray"))]
    assert not [path for path in home.rglob("*") if path.is_file() and "ray" in str(path).lower()]


def test_models_are_tried_before_a_launch_once_and_bad_ones_each_time(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    task = task_named("causal_lm")
    try_model = task.check_model
    monkeypatch.setattr(
        task, "check_model", lambda *given: (tried.append(given[0].model_dump_json()), try_model(*given))[1]
    )
    for name, changes, expected in (
        ("first", [], 1),
        ("second", ["training.weight_decay=0.2"], 0),
        ("wider", ["model.hidden_size=64"], 1),
        ("wide again", ["model.hidden_size=64"], 0),
    ):
        tried.clear()
        hpsearch.launch(tiny, name=name.replace(" ", "-"), trials=1, overrides=changes)
        assert len(tried) == expected, name
    for _ in range(2):
        tried.clear()
        with pytest.raises(UsageError, match="of these sizes cannot be built"):
            hpsearch.launch(tiny, name="bad", trials=1, overrides=["model.config={n_head: 7}"])
        assert len(tried) == 1, "what could not be built is tried again"
    assert "bad" not in [row.name for row in hpsearch.studies(store=f"sqlite:///{tmp_path}/studies.db")]


@pytest.mark.nightly
@pytest.mark.slow
def test_trials_are_packed_on_a_gpu_once_their_memory_is_known(short_folder: Path) -> None:
    """A GPU that is none, of 10 GB, of which a trial takes 1 GB and 20 MB for each example of its batch."""
    study = Suffering(
        short_folder, trials=8, pace=2.5,
        faults={"pace_from": 5, "gpus": 1, "gpu_bytes": 10_000_000_000, "example_bytes": 20_000_000},
        overrides=["search.batch_size=[16, 32, 64]", "resources={gpus_per_trial: packed}", "search.num_epochs=4"],
    )  # fmt: skip
    assert study.finish() == 0, study.errors().read_text()
    assert "1 at a time, 1 CPU and 1 GPU each, and more once their memory is known" in str(study.events())
    running: set[int] = set()
    together = []
    batches = {
        trial.number: trial.params["batch_size"]
        for trial in hpsearch.open_study("suffering", store=study.store).trials()
    }
    for epoch in study.epochs():
        running.add(epoch["trial"])
        together.append(set(running))
        if epoch["evaluation"] == 4:
            running.remove(epoch["trial"])
    alone = {number for numbers in together for number in numbers if len(numbers) == 1}
    assert {0, 1, 2, 3, 4} <= alone
    assert max(len(numbers) for numbers in together) > 1, "later ones run side by side"
    for numbers in together:
        if len(numbers) > 1:
            assert sum(1e9 + 20e6 * batches[number] for number in numbers) <= 10e9, numbers


def test_the_same_study_on_postgresql(tiny: Path, postgres_store: str) -> None:
    study = hpsearch.launch(tiny, store=postgres_store)
    assert study.exit_code == 0
    assert len(study.leaderboard()) == 4
    loaded = optuna.load_study(study_name="tiny", storage=postgres_store)
    assert loaded.best_value == min(row.best_valid_loss for row in study.trials())
    sqlite = hpsearch.launch(tiny)
    assert [row.params for row in sqlite.trials()] == [row.params for row in study.trials()]
    assert [row.best_valid_loss for row in sqlite.trials()] == [row.best_valid_loss for row in study.trials()]


def test_a_finished_study_launched_again_does_nothing(tiny: Path) -> None:
    before = hpsearch.launch(tiny, trials=2).trials()
    again = hpsearch.launch(tiny, trials=2)
    assert again.exit_code == 0
    assert again.trials() == before


def test_a_larger_budget_goes_on_with_the_study(tiny: Path) -> None:
    before = hpsearch.launch(tiny, trials=2).trials()
    with pytest.raises(UsageError, match=r"budget\.trials: 2 -> 3\n.*--extend"):
        hpsearch.launch(tiny, trials=3)
    after = hpsearch.launch(tiny, trials=3, extend=True).trials()
    assert after[:2] == before
    assert len(after) == 3
    with pytest.raises(UsageError, match="2 is less than the 3 it has"):
        hpsearch.launch(tiny, trials=2, extend=True)


def test_a_changed_study_is_refused_with_the_difference(tiny: Path) -> None:
    before = hpsearch.launch(tiny, trials=1).trials()
    with pytest.raises(UsageError, match=r"search\.num_layers: 1 -> 2") as caught:
        hpsearch.launch(tiny, overrides=["search.num_layers=2"])
    assert "--name" in str(caught.value)
    assert hpsearch.open_study("tiny", store=f"sqlite:///{tiny.parent}/studies.db").trials() == before


@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=pytest.mark.nightly)])
def test_a_study_that_runs_out_of_time_is_taken_up_again(tiny: Path, backend: str) -> None:
    def slow(event: Event) -> None:
        if event.kind == "point":
            time.sleep(0.6)  # nine points outlast the 3 s that the study has

    overrides = ["budget.minutes=0.05", "search.num_epochs=9", "resources.parallel=1"]
    study = hpsearch.launch(tiny, backend=backend, overrides=overrides, trials=3, listen=slow)
    assert study.stop_reason is not None
    assert "0.05 minutes" in study.stop_reason
    stopped = study.trials()
    assert not [row for row in stopped if row.state == "running"]
    (interrupted,) = [row for row in stopped if row.state == "interrupted"]
    study = hpsearch.launch(tiny, backend=backend, overrides=["search.num_epochs=9"], trials=3)
    rows = study.trials()
    assert [row.number for row in rows] == [0, 1, 2], "an interrupted trial resumes under its number"
    assert {row.state for row in rows} <= {"completed", "overfit", "plateau", "unpromising"}
    again = rows[interrupted.number]
    assert (again.params, again.attempt) == (interrupted.params, interrupted.attempt + 1)


def test_slots_are_filled_without_waiting_for_a_worker_to_come_up(tiny: Path) -> None:
    has_come_up = []

    def look(event: Event) -> None:
        if event.kind == "trial_started":
            # The first thing that a worker leaves in its trial's folder.
            has_come_up.append(any(tiny.parent.joinpath("runs").rglob(PULSE_FILE)))

    hpsearch.launch(tiny, backend="ray", overrides=["resources.parallel=2"], trials=2, listen=look)
    assert has_come_up == [False, False]


def test_a_trial_that_raises_fails_alone_on_ray(tiny: Path) -> None:
    # A width that no number of heads divides cannot be built; the other trials go on.
    study = hpsearch.launch(tiny, backend="ray", overrides=["search.config.n_head=[2, 3]", "sampler=random"], trials=4)
    rows = study.trials()
    assert {row.state for row in rows} == {"completed", "failed"}
    failed = next(row for row in rows if row.state == "failed")
    assert "Traceback" in failed.error
    assert study.exit_code == 0 if sum(row.state == "failed" for row in rows) <= 2 else 3


def test_a_study_that_another_driver_holds_is_left_alone(tiny: Path) -> None:
    study = hpsearch.launch(tiny, trials=1)
    store = Store(study.store, create=True)
    row = store.study("tiny")
    alive = threading.Event()
    token = store.take_lease(row.id, holder="another, process 1", process={"pid": 1})
    assert token is not None

    def beat() -> None:
        while not alive.wait(0.5):
            store.renew_lease(row.id, token)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(StudyBusyError, match=r"held by another, process 1 since \d{4}-.* alive"):
            hpsearch.launch(tiny, trials=1)
    finally:
        alive.set()
        heart.join()
        store.close()
    assert len(study.trials()) == 1


def test_what_a_dead_driver_left_running_is_run_again(tiny: Path) -> None:
    study = hpsearch.launch(tiny, trials=1)
    with sqlite3.connect(tiny.parent / "studies.db") as plain:
        plain.execute("UPDATE hpsearch_trials SET state = 'running', ended_at = NULL")
        plain.execute("DELETE FROM hpsearch_scores")
        plain.execute("DELETE FROM hpsearch_examples")
        plain.execute("UPDATE trials SET state = 'RUNNING', datetime_complete = NULL")
        plain.execute("DELETE FROM trial_values")
    before = curves(tiny.parent / "studies.db", "tiny")
    (row,) = hpsearch.launch(tiny, trials=1).trials()
    assert (row.state, row.attempt) == ("completed", 2)
    assert curves(tiny.parent / "studies.db", "tiny") == before
    assert len(study.leaderboard()) == 1
    assert hpsearch.doctor(store=study.store) == []


def test_other_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the {i} sentence of a small file, number {i * 7}" for i in range(400)))
    own = tmp_path / "own.yaml"
    own.write_text(tiny.read_text().replace("{corpus: python_docs, fraction: 0.08}", "{files: text.txt}"))
    hpsearch.launch(own, trials=1)
    text.write_text(text.read_text() + "\n\none more sentence that changes the text")
    with pytest.raises(UsageError, match="was begun on other text"):
        hpsearch.launch(own, trials=1)


def test_llama_and_conditions_run_as_well(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("architecture: gpt2, ", ""))
    study = hpsearch.launch(
        tiny,
        trials=3,
        overrides=[
            "search.architecture=[gpt2, llama]",
            "search.dropout={values: [0.0, 0.1], when: {architecture: gpt2}}",
            "sampler=random",
            "prune.unpromising=none",
        ],
    )
    rows = study.trials()
    assert {row.state for row in rows} == {"completed"}
    assert {row.params["architecture"] for row in rows} == {"gpt2", "llama"}
    assert all(("dropout" in row.params) == (row.params["architecture"] == "gpt2") for row in rows)


def test_check_touches_nothing_and_tells_what_a_launch_will_do(tiny: Path) -> None:
    from hpsearch.api import check

    before = set(tiny.parent.rglob("*"))
    found = check(tiny)
    assert set(tiny.parent.rglob("*")) == before
    assert found["store"] == "new"
    assert found["resumes"] is None
    study = hpsearch.launch(tiny)
    assert [row.params for row in study.trials()][:3] == found["first_settings"]
    assert found["data"] == hpsearch.studies(store=study.store)[0].data
    assert check(tiny)["resumes"] == study.board().states
    json.dumps(found)


def test_a_study_is_extended_by_a_wider_space_and_keeps_its_history(tiny: Path) -> None:
    narrow = ["search.batch_size=[16, 32]", "search.learning_rate={min: 1e-3, max: 1e-2, scale: log}"]
    before = hpsearch.launch(tiny, trials=2, overrides=narrow).trials()
    wide = ["search.batch_size=[8, 16, 32]"]
    with pytest.raises(UsageError, match=r"search\.learning_rate\.max: 0\.01 -> 0\.1\n(?s:.*)give --extend"):
        hpsearch.launch(tiny, overrides=wide)
    study = hpsearch.launch(tiny, overrides=wide, extend=True)
    assert study.trials()[:2] == before
    assert len(study.leaderboard()) == 4
    store = Store(study.store)
    versions = store.spec_versions(store.study("tiny").id)
    assert [(row.version, row.budget_trials) for row in versions] == [(1, 2), (2, 4)]
    assert versions[0].spec["search"]["batch_size"] == [16, 32]
    store.close()
    assert hpsearch.doctor(store=study.store) == []
    for change, problem in (
        (["search.batch_size=[8, 16]"], "search.batch_size lacks 32"),
        (["search.batch_size=[8, 16, 32]", "model.hidden_size=64"], "model.hidden_size is not part of the space"),
        (["search.batch_size=8"], "search.batch_size is not searched any more"),
    ):
        with pytest.raises(UsageError, match=r"larger budget or a wider space only:\n(?s:.*)" + problem):
            hpsearch.launch(tiny, overrides=change, extend=True)


def test_a_study_starts_from_what_it_is_given_and_from_earlier_studies(tiny: Path) -> None:
    earlier = hpsearch.launch(tiny, name="earlier", overrides=["search.num_layers=[1, 2]"])
    ranked = earlier.board(top=3).rows
    given = ["enqueue=[{learning_rate: 0.02, batch_size: 32, num_epochs: 3}]", "transfer_from=[earlier]"]
    told = hpsearch.check(tiny, overrides=given)
    assert told["first_settings"][0] == {"learning_rate": 0.02, "batch_size": 32, "num_epochs": 3}
    study = hpsearch.launch(tiny, overrides=given, trials=3)
    tried = [trial.params for trial in study.trials()]
    assert tried[0] == {"learning_rate": 0.02, "batch_size": 32, "num_epochs": 3}
    wanted = [{name: value for name, value in row.params.items() if name != "num_layers"} for row in ranked]
    assert tried[1:] == wanted[:2]
    # One more known setting may come at any time, and what was tried is not tried again.
    more = [given[0].replace("]", ", {learning_rate: 0.05, num_epochs: 2}]"), given[1]]
    study = hpsearch.launch(tiny, overrides=more, trials=5, extend=True)
    last = [trial.params for trial in study.trials()][3:]
    assert (last[0]["learning_rate"], last[0]["num_epochs"]) == (0.05, 2)
    assert last[1] == wanted[2]
    with pytest.raises(UsageError, match="transfer_from: no study named 'nope'"):
        hpsearch.launch(tiny, name="other", overrides=["transfer_from=[nope]"])
    assert [row.name for row in hpsearch.studies(store=study.store)] == ["earlier", "tiny"]


def test_a_trial_has_a_time_limit(tiny: Path) -> None:
    study = hpsearch.launch(tiny, trials=1, overrides=["search.num_epochs=60", "limits.max_minutes=0.03"])
    (row,) = study.trials()
    assert row.state == "completed"
    assert "stopped after max_minutes (0.03)" in row.reason
    assert row.last_epoch < 60
    assert len(study.leaderboard()) == 1


def test_finals_that_were_stopped_go_on_with_the_same_repeats(tiny: Path) -> None:
    study = hpsearch.launch(tiny, trials=2)
    with sqlite3.connect(tiny.parent / "studies.db") as plain:
        hpsearch.finals("tiny", top=1, seeds=2, store=study.store)
        plain.execute("UPDATE hpsearch_trials SET state = 'running', ended_at = NULL WHERE number = 3")
        plain.execute("DELETE FROM hpsearch_scores WHERE trial_id = 4")
        plain.execute("DELETE FROM hpsearch_examples WHERE trial_id = 4")
        plain.execute("UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE number = 3")
        plain.execute("DELETE FROM trial_values WHERE trial_id = 4")
    assert hpsearch.launch(tiny, trials=2).trials()[3].state == "interrupted", "a search does not run the finals"
    rows = hpsearch.finals("tiny", top=1, seeds=2, store=study.store).trials()
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert (rows[3].state, rows[3].attempt, rows[3].seed) == ("completed", 2, 2)
    assert hpsearch.doctor(store=study.store) == []
