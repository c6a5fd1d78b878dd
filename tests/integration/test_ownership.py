"""Files of a study are its own: studies of one name, copied stores and rows that name other folders do no harm."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

import hpsearch
from hpsearch import api
from hpsearch.errors import LeaseLostError, RunFolderError, UsageError
from hpsearch.files.ownership import OWNER_FILE
from hpsearch.store.store import Store
from tests.conftest import Run

pytestmark = pytest.mark.slow


def checkpoints(study: hpsearch.Study) -> dict[int, str]:
    return {trial.number: trial.checkpoint for trial in study.trials() if trial.checkpoint}


def test_studies_of_one_name_in_two_stores_share_no_files_even_when_they_begin_in_the_same_second(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hpsearch.store.studies

    now = hpsearch.store.studies.now()
    monkeypatch.setattr(hpsearch.store.studies, "now", lambda: now)
    stores = [f"sqlite:///{tmp_path}/{name}.db" for name in ("a", "b")]
    studies = [hpsearch.launch(tiny, store=store, trials=1, overrides=["seed=1"]) for store in stores]
    folders = [Path(checkpoints(study)[0]).parent for study in studies]
    assert folders[0] != folders[1]
    assert all((folder / OWNER_FILE).is_file() for folder in folders)


def test_a_result_or_state_of_another_study_is_not_taken_up(tiny: Path, tmp_path: Path) -> None:
    first = hpsearch.launch(tiny, trials=1)
    other = hpsearch.launch(tiny, trials=1, name="other")
    mine, theirs = (Path(checkpoints(study)[0]) for study in (first, other))
    with sqlite3.connect(tmp_path / "studies.db") as plain:
        plain.execute("UPDATE hpsearch_trials SET checkpoint = ? WHERE checkpoint = ?", [str(theirs), str(mine)])
    with pytest.raises(RunFolderError, match="does not belong to 'tiny'"):
        api.export("tiny", 0, output=tmp_path / "model", store=first.store)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(("doctor", "--repair"), id="doctor"),
        pytest.param(("gc", "tiny", "--keep", "1"), id="gc", marks=pytest.mark.nightly),
    ],
)
def test_a_copy_of_a_store_removes_nothing_of_the_original(
    tiny: Path, tmp_path: Path, hpsearch: Run, command: tuple[str, ...]
) -> None:
    study = api.launch(tiny)
    before = checkpoints(study)
    copy = f"sqlite:///{tmp_path}/copy.db"
    shutil.copyfile(tmp_path / "studies.db", tmp_path / "copy.db")
    garbage = Path(before[0]).with_name("trial-00099")
    garbage.mkdir()
    refused = hpsearch(*command, "--store", copy)
    assert refused.returncode == 74
    assert "belongs to the study in the store" in refused.stderr
    assert str(tmp_path / "studies.db") in refused.stderr
    again = hpsearch("launch", str(tiny), "--trials", "5", "--extend", "--store", copy)
    assert again.returncode == 74
    assert garbage.is_dir()
    assert all((Path(folder) / "config.json").is_file() for folder in before.values())
    # In a folder of its own a copy is as good as any study, and a store that was moved is the same store.
    elsewhere = hpsearch(
        "launch", str(tiny), "--trials", "5", "--extend", "--store", copy, "--folder", str(tmp_path / "elsewhere")
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert all((Path(folder) / "config.json").is_file() for folder in before.values())
    (tmp_path / "studies.db").rename(tmp_path / "moved.db")
    assert hpsearch("gc", "tiny", "--store", f"sqlite:///{tmp_path}/moved.db").returncode == 0
    assert not garbage.exists()


def test_a_row_that_names_another_folder_removes_nothing(tiny: Path, tmp_path: Path) -> None:
    study = hpsearch.launch(tiny, trials=2)
    precious = tmp_path / "precious" / "trial-00001"
    precious.mkdir(parents=True)
    (precious / "thesis.txt").write_text("all of it")
    with sqlite3.connect(tmp_path / "studies.db") as plain:
        plain.execute("UPDATE hpsearch_trials SET checkpoint = ?", [str(precious)])
    hpsearch.launch(tiny, trials=3, extend=True, overrides=["limits.keep_checkpoints=1"])
    hpsearch.gc("tiny", keep=1, store=study.store)
    assert (precious / "thesis.txt").read_text() == "all of it"


def test_a_later_driver_owns_the_folder(tiny: Path, tmp_path: Path) -> None:
    study = hpsearch.launch(tiny, trials=1)
    folder = Path(checkpoints(study)[0]).parent
    owner = json.loads((folder / OWNER_FILE).read_text())
    (folder / OWNER_FILE).write_text(json.dumps({**owner, "token": owner["token"] + 10}))
    with pytest.raises(LeaseLostError, match="another driver"):
        hpsearch.launch(tiny, trials=2, extend=True)
    assert (folder / "trial-00000" / "config.json").is_file()


def test_a_study_whose_files_lie_elsewhere_is_not_gone_on_with_by_chance(tiny: Path, tmp_path: Path) -> None:
    hpsearch.launch(tiny, trials=1)
    text = tiny.read_text().replace(f"{tmp_path}/runs", f"{tmp_path}/mine")
    tiny.write_text(text)
    with pytest.raises(UsageError, match=r"(?s)process \d+ launched it at .*files lie in .*/runs, not in .*/mine"):
        hpsearch.launch(tiny, trials=1)
    assert not (tmp_path / "mine").exists()
    assert hpsearch.launch(tiny, trials=2, extend=True, folder=str(tmp_path / "runs")).exit_code == 0
    moved = hpsearch.launch(tiny, trials=3, extend=True, folder=str(tmp_path / "mine"))
    assert Path(checkpoints(moved)[2]).is_relative_to(tmp_path / "mine")


def test_the_folder_of_a_study_does_not_depend_on_the_servers_time_zone(tiny: Path, postgres_store: str) -> None:
    import sqlalchemy as sa

    first = hpsearch.launch(tiny, store=postgres_store, trials=1)
    database = sa.make_url(postgres_store).database
    engine = sa.create_engine(postgres_store, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {database} SET timezone = 'Pacific/Kiritimati'"))
    engine.dispose()
    second = hpsearch.launch(tiny, store=postgres_store, trials=2, extend=True)
    assert len({Path(folder).parent for folder in checkpoints(second).values()}) == 1
    assert checkpoints(first)[0] == checkpoints(second)[0]


def test_a_database_is_told_from_its_copy(store_url: str, tmp_path: Path) -> None:
    store = Store(store_url, create=True)
    assert set(store.identities()) & set(Store(store_url).identities())
    other = Store(f"sqlite:///{tmp_path}/other.db", create=True)
    assert not set(store.identities()) & set(other.identities())
