"""Small things that people do, each of which once went wrong: the right outcome."""

from __future__ import annotations

import json
import sqlite3
import threading
from io import StringIO
from pathlib import Path

import optuna
import pandas as pd
import pytest

import hpsearch as package
from hpsearch.cli.summaries import _confusion
from hpsearch.records import Event
from hpsearch.store.store import Store
from tests.conftest import Run

pytestmark = pytest.mark.slow
NUMBERS = [".nan", ".inf", "-.inf", "1e400", "99999999999999999999999", "-1", "1e-400", "0", "true", "[]"]
KEYS = [
    "budget.trials", "budget.minutes", "limits.max_minutes", "limits.stall_minutes", "limits.retries", "seed",
    "model.hidden_size", "model.dropout", "model.context_length", "training.learning_rate", "training.batch_size",
    "training.num_epochs", "training.weight_decay", "search.learning_rate", "search.num_layers",
    "search.learning_rate.max", "resources.cpus_per_trial", "resources.gpus_per_trial", "resources.parallel",
    "resources.memory_gb_per_trial", "tokenizer.vocab_size", "prune.unpromising.startup_trials", "data.fraction",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_no_number_is_a_bug(tiny: Path, key: str) -> None:
    """Whatever number stands in a study file, it is taken or refused by name: none ends as a bug."""
    from hpsearch.errors import SpecError
    from hpsearch.spec.load import load_study

    for number in NUMBERS:
        overrides = [f"{key}={number}"]
        if key.endswith(".max"):
            overrides = [f"search.learning_rate={{min: 1e-4, max: {number}}}"]
        try:
            spec = load_study(tiny, overrides=overrides)
            said = spec.fingerprint
        except SpecError as error:
            said = str(error)
            said = said if key.rpartition(".")[2] in said else ""
        assert said, (key, number)


@pytest.mark.parametrize(
    "arguments", [["rank", "tiny", "--debug"], ["--debug", "rank", "tiny"], ["show", "tiny", "0", "--debug"]]
)
def test_debug_works_before_a_command_and_after_it(
    tiny: Path, tmp_path: Path, hpsearch: Run, arguments: list[str]
) -> None:
    missing = hpsearch(*arguments, "--store", f"sqlite:///{tmp_path}/none.db")
    assert missing.returncode == 69
    assert "Traceback" in missing.stderr
    assert "No such option" not in missing.stderr


def test_a_study_of_optunas_own_is_not_taken_over(tiny: Path, tmp_path: Path, hpsearch: Run, store_url: str) -> None:
    optuna.create_study(study_name="tiny", storage=optuna.storages.RDBStorage(store_url))
    for command in ("check", "launch"):
        refused = hpsearch(command, str(tiny), "--store", store_url)
        assert refused.returncode == 2
        assert "holds a study 'tiny' of Optuna's that hpsearch has not made" in refused.stderr
    assert Store.preflight(store_url) == "new"
    other = hpsearch("launch", str(tiny), "--store", store_url, "--name", "mine", "--trials", "1")
    assert other.returncode == 0, other.stderr
    assert hpsearch("launch", str(tiny), "--store", store_url, "--trials", "1").returncode == 2


def test_a_study_of_an_earlier_version_goes_on_with_the_optimizer_that_it_was_begun_with(
    tiny: Path, tmp_path: Path
) -> None:
    first = package.launch(tiny, trials=1)
    with sqlite3.connect(tmp_path / "studies.db") as plain:
        # As the migration left the studies that were begun before there was a choice.
        for table in ("hpsearch_studies", "hpsearch_specs"):
            # Records once had the options of every task.
            others = "'$.translation', json('{\"num_beams\": 1}'), '$.classification', json('{\"f1\": \"macro\"}')"
            changed = f"json_set(spec, '$.training.optimizer', 'adamw', '$.training.weight_average', 0.0, {others})"
            plain.execute(
                f"UPDATE {table} SET spec = json_remove({changed}, '$.limits', '$.prune.unpromising.percentile')"
            )
    second = package.launch(tiny, trials=2, extend=True)
    assert second.exit_code == 0
    settings = [trial.settings["training"]["optimizer"] for trial in second.trials()]
    assert settings == ["muon", "adamw"]
    assert first.store == second.store


@pytest.mark.parametrize(
    "url", ["postgresql+psycopg2://u:secret99@h/db", "postgresql:/u:secret99@h/db", "mysql://u:secret99@h/db"]
)
def test_a_store_url_that_cannot_be_used_is_a_usage_error_without_its_password(
    tiny: Path, hpsearch: Run, url: str
) -> None:
    refused = hpsearch("check", str(tiny), env={"HPSEARCH_STORE": url})
    assert refused.returncode == 2, refused.stderr
    assert "secret99" not in refused.stdout + refused.stderr


def test_a_small_space_is_tried_through_once_and_the_study_says_so(tiny: Path) -> None:
    notes = []
    overrides = ["search={batch_size: [16, 32], num_epochs: 1}"]
    study = package.launch(
        tiny, trials=5, overrides=overrides,
        listen=lambda event: notes.append(event.text) if event.kind == "note" else None,
    )  # fmt: skip
    assert study.exit_code == 0
    assert sorted(trial.params["batch_size"] for trial in study.trials()) == [16, 32]
    assert any(
        "every setting of the search space has been tried: the study ends after 2 trials" in note for note in notes
    )


def test_four_hundred_classes_are_no_matrix_in_a_terminal() -> None:
    from rich.console import Console

    labels = [f"class {number}" for number in range(400)]
    counts = [[0] * 400 for _ in labels]
    for number in range(400):
        counts[number][number] = 3
        counts[number][(number + 1) % 400] = number % 7
    console = Console(width=100, record=True, file=StringIO())
    console.print(_confusion(labels, counts))
    lines = console.export_text().splitlines()
    assert len(lines) < 25
    assert any("6" in line and "of" not in line for line in lines[1:])
    assert "more pairs of 400 classes" in lines[-1]


def test_a_run_folder_that_is_away_for_a_while_costs_a_trial_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenized text disappears while trials run, and comes back two seconds later: that costs no attempt."""
    monkeypatch.setattr("hpsearch.driver.run.disk._PROBE_EVERY_S", 0.2)
    away: list[Path] = []
    notes: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "trial_ended" and event.trial == 0 and not away:
            away.extend((tmp_path / "runs" / "data").glob("[0-9a-f]*"))
            away[0].rename(tmp_path / "away")
        if event.kind == "note":
            notes.append(event.text)
            if "data is away" in event.text:
                threading.Timer(2.0, (tmp_path / "away").rename, away).start()

    study = package.launch(tiny, trials=3, listen=listen)
    assert study.exit_code == 0
    assert any("the data is there; the study resumes" in note for note in notes)
    assert not any("trying again" in note for note in notes), "no attempt is spent on it"
    assert sum(study.trial(trial.number).worker_deaths for trial in study.trials()) == 0
    assert {trial.state for trial in study.trials()} <= {"completed", "overfit", "plateau", "unpromising"}


def test_that_rays_memory_monitor_ended_a_worker_is_said(tiny: Path, tmp_path: Path, hpsearch: Run) -> None:
    """Ray is told that a thousandth of the memory is all there is."""
    environment = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    options = ["--backend=ray", "--trials=1", "--set=limits.retries=0", "--set=resources.parallel=1"]
    done = hpsearch("launch", str(tiny), *options, env=environment)
    assert done.returncode == 3, done.stderr
    reason = "Ray ended its worker: the node ran low on memory ("
    assert f"trial 0 failed: {reason}" in done.stderr
    assert "resources.memory_gb_per_trial" in done.stderr
    (trial,) = package.open_study("tiny", store=f"sqlite:///{tmp_path}/studies.db").trials()
    assert trial.state == "failed"
    assert (trial.reason or "").startswith(reason)


def test_failed_trials_are_put_back_by_a_command(tiny: Path, tmp_path: Path, hpsearch: Run) -> None:
    away: list[Path] = []

    def listen(event: Event) -> None:
        if event.kind == "trial_ended" and event.trial == 0:
            away.extend((tmp_path / "runs" / "data").glob("*/train-text.npy"))
            away[0].rename(tmp_path / "away")

    study = package.launch(tiny, trials=2, overrides=["limits.retries=0"], listen=listen)
    assert [trial.state for trial in study.trials()].count("failed") == 1
    (tmp_path / "away").rename(away[0])
    said = hpsearch("retry", "tiny", "--store", study.store)
    assert said.returncode == 0, said.stderr
    assert "put back: 1;" in said.stderr
    again = package.launch(tiny, trials=2, overrides=["limits.retries=0"])
    assert "failed" not in {trial.state for trial in again.trials()}
    assert package.doctor(store=study.store) == []
    refused = hpsearch("retry", "tiny", "0", "--store", study.store)
    assert refused.returncode == 2
    assert "trial 0 of 'tiny' has not failed" in refused.stderr


def test_a_loss_too_large_for_a_perplexity_is_a_divergence(tiny: Path) -> None:
    overrides = [
        "search={learning_rate: 1.0e+6, num_epochs: 2}", "training.gradient_clip=0", "training.optimizer=adamw",
        "training.weight_average=0.0", "prune.overfit=false",
    ]  # fmt: skip
    study = package.launch(tiny, trials=1, overrides=overrides)
    assert study.exit_code == 3
    assert [trial.state for trial in study.trials()] == ["diverged"]


def test_a_name_of_a_file_is_no_pattern(tmp_path: Path, hpsearch: Run) -> None:
    (tmp_path / "da1ta.parquet").write_bytes(b"another file")
    rows = pd.DataFrame({"text": [f"text number {number} of the file that was named" for number in range(60)]})
    rows.to_parquet(tmp_path / "da[1]ta.parquet")
    (tmp_path / "s.yaml").write_text(
        "name: s\ntask: causal_lm\ndata: {files: 'da[1]ta.parquet'}\ntokenizer: {vocab_size: 300}\nbackend: inline\n"
    )
    checked = hpsearch("check", "s.yaml", "--json")
    assert checked.returncode == 0, checked.stderr
    assert sum(json.loads(checked.stdout)["data"]["documents"].values()) == 60


@pytest.mark.parametrize("turn", range(3))
def test_a_column_that_a_parquet_file_lacks_is_a_usage_error_each_time(
    tmp_path: Path, hpsearch: Run, turn: int
) -> None:
    pd.DataFrame({"text": ["a", "b"] * 500}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "s.yaml").write_text(
        "name: s\ntask: causal_lm\ndata: {files: d.parquet, column: txt}\nbackend: inline\n"
    )
    refused = hpsearch("check", "s.yaml")
    assert refused.returncode == 2
    assert "has no column 'txt'; it has text" in refused.stderr
