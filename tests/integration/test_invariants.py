"""`hpsearch doctor` finds what was broken by hand, mends what it safely can, and leaves the rest to a person."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpsearch
from hpsearch.results.study import Study
from hpsearch.store import leases
from hpsearch.upkeep import doctor as invariants
from tests.conftest import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(f"{TINY}store: sqlite:///{folder}/studies.db\nfolder: {folder}/runs\n")
    hpsearch.launch(folder / "tiny.yaml", trials=2)
    return folder


@pytest.fixture
def broken(finished: Path) -> Iterator[Path]:
    """The finished study, restored after the test."""
    saved = finished.with_name("saved")
    shutil.copytree(finished, saved)
    yield finished
    shutil.rmtree(finished)
    saved.rename(finished)


@pytest.fixture(autouse=True)
def _short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that is this very process cannot be seen to be gone; it is watched, here for a moment."""
    monkeypatch.setattr(invariants, "WATCH_S", 0.3)
    monkeypatch.setattr(leases, "TIMEOUT_S", 0.3)


def look(folder: Path, repair: bool = False) -> list[tuple[str, bool, bool]]:
    found = hpsearch.doctor(store=f"sqlite:///{folder}/studies.db", repair=repair)
    return [(finding.problem, finding.can_repair, finding.repaired) for finding in found]


def test_a_good_store_has_nothing_wrong(finished: Path) -> None:
    assert look(finished) == []


@pytest.mark.parametrize(
    ("statements", "problem", "mends"),
    [
        (
            ["UPDATE hpsearch_trials SET state = 'running', ended_at = NULL WHERE number = 0",
             "DELETE FROM hpsearch_scores WHERE trial_id = 1", "DELETE FROM hpsearch_examples WHERE trial_id = 1",
             "UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE number = 0",
             "DELETE FROM trial_values WHERE trial_id = 1"],
            "is running, and no driver holds the study", True,
        ),
        (
            ["UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE number = 1",
             "DELETE FROM trial_values WHERE trial_id = 2"],
            "is completed, and RUNNING for Optuna", True,
        ),
        (["UPDATE trials SET state = 'FAIL' WHERE number = 1"], "is completed, and FAIL for Optuna", False),
        (["UPDATE trial_values SET value = 99 WHERE trial_id = 1"], "and 99.0 for Optuna", False),
        (["UPDATE hpsearch_trials SET params = '{}' WHERE number = 1"], "ran {}, and Optuna has", False),
        (["DELETE FROM hpsearch_points WHERE trial_id = 1 AND evaluation = 1"], "its curve has gaps", False),
        (["UPDATE hpsearch_points SET step = 1 WHERE trial_id = 2"], "the steps of its curve do not rise", False),
        (["UPDATE hpsearch_trials SET best_valid_loss = 1 WHERE number = 0"], "is said to be 1.0, and is", False),
        (["UPDATE hpsearch_trials SET ended_at = NULL WHERE number = 0"], "has no time of its end", False),
        (["DELETE FROM hpsearch_scores WHERE trial_id = 2 AND metric = 'perplexity'"], "has no test perplexity", False),
        (["INSERT INTO hpsearch_points VALUES (99, 1, 1, 1, 1, 1, 1, 1, 1, 1)"], "1 in hpsearch_points", True),
        (["UPDATE hpsearch_leases SET beat = 7"], "its lease is held by", True),
    ],
)  # fmt: skip
def test_what_is_broken_is_found(broken: Path, statements: list[str], problem: str, mends: bool) -> None:
    with sqlite3.connect(broken / "studies.db") as plain:
        for statement in statements:
            plain.execute(statement)
    found = look(broken)
    assert any(problem in text and can == mends for text, can, _ in found), found
    if mends:
        assert all(repaired for _, can, repaired in look(broken, repair=True) if can)
        assert look(broken) == []


def test_files_of_nobody_are_removed_and_a_lost_checkpoint_is_told(broken: Path) -> None:
    (run,) = (broken / "runs").glob("tiny-*")
    (run / "trial-00077").mkdir()
    (run / "trial-00077" / "resume-000000001-00.safetensors").touch()
    (run / "trial-00000-attempt-2").mkdir()
    shutil.rmtree(run / "trial-00001")
    problems = "\n".join(text for text, _, _ in look(broken))
    assert "trial-00077: no trial of the store has this number" in problems
    assert "trial-00000-attempt-2: trial 0 has ended" in problems
    assert "trial-00001 is gone" in problems
    look(broken, repair=True)
    assert sorted(folder.name for folder in run.iterdir()) == ["logs", "owner.json", "trial-00000"]


def test_only_the_best_checkpoints_stay_as_the_study_runs(tiny: Path) -> None:
    study = hpsearch.launch(tiny, overrides=["limits.keep_checkpoints=2"])
    assert kept(study) == [row.trial for row in study.board().rows[:2]]
    folders = sorted(Path(study.store.removeprefix("sqlite:///")).parent.glob("runs/tiny-*/trial-*"))
    assert len(folders) == 2
    (garbage,) = hpsearch.gc("tiny", keep=1, dry_run=True, store=study.store)
    assert garbage.folder in folders
    assert garbage.size > 1000
    assert kept(study) == [row.trial for row in study.board().rows[:2]], "a dry run removes nothing"
    hpsearch.gc("tiny", keep=1, store=study.store)
    assert kept(study) == [study.board().rows[0].trial]
    assert hpsearch.doctor(store=study.store) == []


def test_the_next_launch_ends_a_removal_that_was_cut_short(tiny: Path) -> None:
    study = hpsearch.launch(tiny, trials=2, overrides=["limits.keep_checkpoints=1"])
    (best,) = kept(study)
    (folder,) = Path(study.store.removeprefix("sqlite:///")).parent.glob("runs/tiny-*/trial-*")
    left = folder.with_name(f"trial-{1 - best:05d}")
    left.mkdir()
    (left / "config.json").touch()
    assert any("this is not its checkpoint" in finding.problem for finding in hpsearch.doctor(store=study.store))
    hpsearch.launch(tiny, trials=2, overrides=["limits.keep_checkpoints=1"])
    assert hpsearch.doctor(store=study.store) == []
    assert folder.is_dir()
    assert not left.exists()


def kept(study: Study) -> list[int]:
    return [row.trial for row in study.board().rows if row.checkpoint]
