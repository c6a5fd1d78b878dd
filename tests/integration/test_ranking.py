"""What a leaderboard says: ties, contracts, comparisons, finals, and other objectives than the loss."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

import hpsearch
from hpsearch.api import finals
from hpsearch.errors import UsageError
from hpsearch.metrics import statistics
from hpsearch.store.store import Store

pytestmark = pytest.mark.slow

Run = Callable[..., Any]

CLASSIFIER = """
name: areas
task: classification
data: {corpus: python_areas, max_examples: 700}
tokenizer: {vocab_size: 800}
model: {hidden_size: 32, num_layers: 1, context_length: 32}
training: {evaluations_per_epoch: 2}
objective: f1
search:
  learning_rate: {min: 1e-3, max: 1e-2, scale: log}
  num_epochs: {min: 2, max: 4}
budget: {trials: 4}
resources: {gpus_per_trial: 0}
prune: {overfit: false, unpromising: median}
backend: inline
"""
TRANSLATION = """
name: messages
task: translation
data: {corpus: ui_messages, max_examples: 500}
tokenizer: {vocab_size: 600}
model: {architecture: bart, hidden_size: 32, num_layers: 1, context_length: 24, init_std: 0.08}
training: {evaluations_per_epoch: 1, learning_rate: 1e-2, num_epochs: 3}
search: {batch_size: [8, 16]}
budget: {trials: 2}
sampler: grid
resources: {gpus_per_trial: 0, parallel: 2}
prune: {unpromising: none}
"""


def study_file(folder: Path, text: str) -> Path:
    file = folder / "study.yaml"
    file.write_text(f"{text}store: sqlite:///{folder}/studies.db\nfolder: {folder}/runs\n")
    return file


@pytest.fixture
def searched(tiny: Path) -> hpsearch.Study:
    """Four trials of the tiny study, all of them ranked."""
    return hpsearch.launch(tiny, overrides=["prune.unpromising=none", "prune.overfit=false"])


def change_contracts(store: Path, trial: int, **changes: Any) -> None:
    with sqlite3.connect(store) as plain:
        for metric in ("perplexity", "bits_per_byte"):
            where = "metric = ? AND trial_id = (SELECT id FROM hpsearch_trials WHERE number = ?)"
            (text,) = plain.execute(f"SELECT contract FROM hpsearch_scores WHERE {where}", [metric, trial]).fetchone()
            contract = {key: changes.get(key, value) for key, value in json.loads(text).items()}
            plain.execute(
                f"UPDATE hpsearch_scores SET contract = ? WHERE {where}", [json.dumps(contract), metric, trial]
            )


def test_the_leaderboard_says_who_cannot_be_told_from_the_winner(searched: hpsearch.Study, tmp_path: Path) -> None:
    rows = searched.board().rows
    assert [row.test_rank for row in rows] == [1, 2, 3, 4]
    assert rows[0].tie == "1"
    assert rows[0].p_value == 1
    for row in rows[1:]:
        assert row.tie == ("1=" if row.p_value > 0.05 else str(row.test_rank))
    # Make the second trial answer as the winner did, document by document, but for a hair.
    store = Store(f"sqlite:///{tmp_path}/studies.db")
    ids = {row.number: row.id for row in searched.trials()}
    winner, second = (ids[row.trial] for row in rows[:2])
    answers = statistics.unpack(store.examples([winner])[winner])
    nats = answers["nats"].copy()
    nats[::2] *= 1.001
    with store._engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE hpsearch_examples SET content = :content WHERE trial_id = :id"),
            {"content": statistics.pack({**answers, "nats": nats}), "id": second},
        )
        connection.execute(
            sa.text("UPDATE hpsearch_scores SET value = :value WHERE trial_id = :id AND metric = 'perplexity'"),
            {"value": rows[0].score * 1.00001, "id": second},
        )
    store.close()
    assert [row.tie for row in searched.board().rows][:2] == ["1", "1="]


def test_compare_tests_two_trials_on_the_same_documents(searched: hpsearch.Study, hpsearch: Run) -> None:
    rows = searched.board().rows
    best, worst = rows[0], rows[-1]
    found = searched.compare(best.trial, worst.trial)
    metrics = {entry.metric: entry for entry in found.metrics}
    assert set(metrics) == {"perplexity", "bits_per_byte"}
    entry = metrics["perplexity"]
    assert entry.scores == [best.score, worst.score]
    assert entry.low <= entry.difference <= entry.high
    assert (entry.p_value <= 0.05) == (entry.better == best.trial)
    swapped = searched.compare(worst.trial, best.trial).metrics[0]
    assert swapped.difference == -entry.difference
    assert swapped.better == entry.better
    itself = searched.compare(best.trial, best.trial).metrics[0]
    assert (itself.difference, itself.p_value, itself.better) == (0, 1, None)
    printed = hpsearch("compare", "tiny", str(best.trial), str(worst.trial), "--store", searched.store)
    assert printed.returncode == 0
    assert f"trial {best.trial}" in printed.stdout
    missing = hpsearch("compare", "tiny", "0", "9", "--store", searched.store)
    assert missing.returncode == 2
    assert "has no trial 9; it has trials 0 to 3" in missing.stderr


def test_scores_that_do_not_compare_are_not_ranked_together(
    searched: hpsearch.Study, tmp_path: Path, hpsearch: Run
) -> None:
    change_contracts(tmp_path / "studies.db", 2, tokenizer="another")
    board = searched.board()
    assert board.metric == "bits_per_byte"
    assert "tokenizers differ" in (board.note or "")
    assert [row.score for row in board.rows] == sorted(row.test_bits_per_byte for row in board.rows)
    change_contracts(tmp_path / "studies.db", 1, context_length=99)
    refused = hpsearch("rank", "tiny", "--store", searched.store)
    assert refused.returncode == 2
    assert "cannot be ranked together: context_length (99 and 32)" in refused.stderr
    assert "--mixed" in refused.stderr
    assert len(searched.board(mixed=True).rows) == 4
    with pytest.raises(UsageError, match="cannot be compared"):
        searched.compare(0, 1)


def test_studies_are_ranked_together(searched: hpsearch.Study, tiny: Path, hpsearch: Run) -> None:
    import hpsearch as package

    package.launch(tiny, name="other", trials=1)
    board = searched.board("other")
    # The first trial of a study of the same seed is the same run, so two scores are equal.
    assert len({row.test_rank for row in board.rows}) == 4
    assert [row.score for row in board.rows] == sorted(row.score for row in board.rows)
    assert {row.study for row in board.rows} == {"tiny", "other"}
    printed = hpsearch("rank", "tiny", "other", "--store", searched.store)
    assert "other" in printed.stdout
    package.launch(study_file(tiny.parent, CLASSIFIER), trials=1, store=searched.store)
    with pytest.raises(UsageError, match="no score in common"):
        searched.board("areas")


def test_finals_run_the_best_settings_again_and_tell_luck_from_merit(
    searched: hpsearch.Study, tmp_path: Path, hpsearch: Run
) -> None:
    before = searched.board()
    done = finals("tiny", top=2, seeds=3, store=searched.store)
    assert done.exit_code == 0
    repeats = [row for row in done.trials() if row.repeat_of is not None]
    assert [row.number for row in repeats] == list(range(4, 10))
    assert {row.repeat_of for row in repeats} == {row.trial for row in before.rows[:2]}
    assert {row.seed for row in repeats} == {1, 2, 3}
    board = done.board()
    assert [row.trial for row in board.rows] == [row.trial for row in before.rows], "repeats are no new entries"
    assert board.states == before.states
    assert [entry.mean for entry in board.finals] == sorted(entry.mean for entry in board.finals)
    for entry in board.finals:
        values = [done.trial(number).scores[0].value for number in entry.repeats]
        assert entry.mean == pytest.approx(sum(values) / 3)
        assert len(set(values)) == 3, "the seeds differ"
        assert entry.dropped == pytest.approx(entry.mean - entry.chosen_score)
    view = "SELECT trial, seeds, mean_score FROM hpsearch_finals ORDER BY mean_score"
    with sqlite3.connect(tmp_path / "studies.db") as plain:
        rows = plain.execute(view).fetchall()
    assert rows == [(entry.trial, 3, pytest.approx(entry.mean)) for entry in board.finals]
    # Nothing is run twice; the printed leaderboard shows them; the search goes on as if they had not been.
    again = hpsearch("finals", "tiny", "--top", "2", "--store", searched.store)
    assert again.returncode == 0
    assert "mean of new seeds" in again.stdout
    assert "than the score that chose it" in again.stdout
    assert len(done.trials()) == 10
    loaded = optuna.load_study(study_name="tiny", storage=searched.store)
    assert len(loaded.trials) == 10
    assert loaded.trials[4].user_attrs["repeats trial"] == repeats[0].repeat_of


def test_a_study_goes_on_after_its_finals(searched: hpsearch.Study, tiny: Path) -> None:
    import hpsearch as package

    finals("tiny", top=1, seeds=1, store=searched.store)
    longer = package.launch(tiny, trials=6, extend=True, overrides=["prune.unpromising=none", "prune.overfit=false"])
    rows = longer.trials()
    assert [row.number for row in rows] == list(range(7))
    assert [row.repeat_of is not None for row in rows] == [False] * 4 + [True] + [False] * 2


def stop_at_the_first_point(event: Any) -> None:
    from hpsearch.driver.run.study_run import StopRequestedError

    if event.kind == "point":
        raise StopRequestedError("enough")


def test_finals_that_were_stopped_go_on_where_they_were(searched: hpsearch.Study, tiny: Path) -> None:
    finals("tiny", top=1, seeds=1, store=searched.store, listen=stop_at_the_first_point)
    assert [row.state for row in searched.trials()][4:] == ["interrupted"]
    done = finals("tiny", top=1, seeds=1, store=searched.store)
    rows = done.trials()[4:]
    assert [(row.number, row.state, row.seed, row.attempt) for row in rows] == [(4, "completed", 1, 2)]
    assert done.board().finals[0].seeds == 1


def test_a_search_leaves_stopped_finals_alone(searched: hpsearch.Study, tiny: Path) -> None:
    import hpsearch as package

    finals("tiny", top=1, seeds=1, store=searched.store, listen=stop_at_the_first_point)
    unpruned = ["prune.unpromising=none", "prune.overfit=false"]
    longer = package.launch(tiny, trials=5, extend=True, overrides=unpruned)
    assert [(row.repeat_of is not None, row.state) for row in longer.trials()][4:] == [
        (True, "interrupted"),
        (False, "completed"),
    ]


def test_finals_of_nothing_are_refused(tiny: Path, hpsearch: Run, tmp_path: Path) -> None:
    missing = hpsearch("finals", "tiny", "--store", f"sqlite:///{tmp_path}/none.db")
    assert missing.returncode == 69
    assert "there is no store" in missing.stderr


def test_f1_of_the_validation_split_as_the_objective(tmp_path: Path) -> None:
    study = hpsearch.launch(study_file(tmp_path, CLASSIFIER))
    loaded = optuna.load_study(study_name="areas", storage=study.store)
    assert loaded.direction.name == "MAXIMIZE"
    rows = {row.number: row for row in study.trials()}
    for trial in loaded.trials:
        if trial.state.name == "COMPLETE":
            assert trial.value == rows[trial.number].best_valid_score
            points = study.trial(trial.number).points
            taken = [point.valid_score for point in points]
            assert [score is not None for score in taken] == [point.epoch % 1 == 0 for point in points]
            assert trial.value == max(score for score in taken if score is not None)
    board = study.board()
    assert board.validation_choice is not None
    assert board.validation_choice.valid_score == max(row.valid_score for row in board.rows)


def test_translation_runs_on_ray_and_its_answers_are_kept(tmp_path: Path, hpsearch: Run) -> None:
    file = study_file(tmp_path, TRANSLATION)
    done = hpsearch("launch", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[2] == "bleu"
    import hpsearch as package

    study = package.open_study("messages", store=f"sqlite:///{tmp_path}/studies.db")
    rows = study.board().rows
    assert len(rows) == 2
    assert [row.test_bleu for row in rows] == sorted((row.test_bleu for row in rows), reverse=True)
    assert all(0 < row.p_value <= 1 for row in rows)
    assert [entry.metric for entry in study.compare(0, 1).metrics] == ["bleu", "chrf", "ter"]
    shown = hpsearch("show", "messages", "0", "--store", study.store)
    assert "reference" in shown.stdout
    scored = package.launch(file, name="by-bleu", overrides=["objective=bleu"], trials=1, backend="inline")
    (trial,) = scored.trials()
    points = scored.trial(0).points
    assert trial.best_valid_score == max(point.valid_score for point in points)


@pytest.mark.nightly
def test_classification_runs_on_ray(tmp_path: Path, hpsearch: Run) -> None:
    done = hpsearch("launch", str(study_file(tmp_path, CLASSIFIER)), "--backend", "ray", "--trials", "2")
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "studies.db") as plain:
        rows = plain.execute("SELECT test_rank, test_f1 FROM hpsearch_leaderboard").fetchall()
    assert len(rows) == 2
    assert rows[0][1] >= rows[1][1] > 0
