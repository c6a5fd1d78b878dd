"""What the Optuna dashboard shows of a study beside its numbers, read with the dashboard's own functions."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.artifacts import FileSystemArtifactStore
from optuna_dashboard import get_note, save_note
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from optuna_dashboard._note import get_note_from_system_attrs, save_note_with_version
from optuna_dashboard.artifact._backend import list_trial_artifacts

import hpsearch as package
from hpsearch.integrations.optuna_dashboard import StudyArtifacts, trial_note
from hpsearch.search.annotations import Annotations, Artifact
from hpsearch.search.study import Search
from hpsearch.spec.load import load_study
from hpsearch.store.rows import StudyRow, WholeTrial
from tests.conftest import Run
from tests.rows import row

pytestmark = pytest.mark.slow


class Recorded:
    """A study as Optuna's tables hold it."""

    def __init__(self, folder: Path, name: str = "tiny") -> None:
        self.study = optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/studies.db")
        self.storage, self.id = self.study._storage, self.study._study_id
        self.attributes: dict[str, Any] = self.storage.get_study_system_attrs(self.id)

    def note(self, number: int) -> str:
        return str(get_note_from_system_attrs(self.attributes, self.study.trials[number]._trial_id)["body"])

    def artifacts(self, number: int) -> dict[str, str]:
        trial = self.study.trials[number]
        found = list_trial_artifacts(self.attributes, {}, trial)
        return {artifact["filename"]: artifact["artifact_id"] for artifact in found}


def test_a_launch_leaves_notes_figures_and_artifacts_for_the_dashboard(
    tiny: Path, tmp_path: Path, hpsearch: Run
) -> None:
    study = package.launch(tiny, overrides=["limits.keep_checkpoints=2"])
    there = Recorded(tmp_path)
    ranked = study.board().rows
    note = get_note(there.study)
    assert f"| {ranked[0].tie} | {ranked[0].trial} | {ranked[0].score:.2f} |" in note
    figures = {name: json.loads(content) for name, content in get_plotly_graph_objects(there.attributes).items()}
    assert set(figures) == {"hpsearch-curves", "hpsearch-leaderboard"}
    best = study.trial(ranked[0].trial)
    (curve,) = [
        trace for trace in figures["hpsearch-curves"]["data"] if trace["name"].startswith(f"trial {best.number} (")
    ]
    assert curve["y"] == [point.valid_loss for point in best.points]
    for trial in study.trials():
        assert there.note(trial.number).startswith(f"**{trial.state}**")

    kept = {row.trial for row in ranked[:2]}
    assert {number for number in range(4) if there.artifacts(number)} == kept
    files = there.artifacts(best.number)
    assert set(files) == {"model-card.md", "log.jsonl"}
    folder = tmp_path / "runs" / "artifacts"
    assert {file.name for file in folder.iterdir()} == {
        artifact for number in kept for artifact in there.artifacts(number).values()
    }
    card = FileSystemArtifactStore(folder).open_reader(files["model-card.md"]).read().decode()
    assert f"Trial {best.number} of tiny" in card
    assert best.checkpoint in card.replace("\\", "")
    assert b"ends as" in StudyArtifacts(f"sqlite:///{tmp_path}/studies.db").open_reader(files["log.jsonl"]).read()

    # The command of the note does what it says.
    (command,) = re.findall(r"^hpsearch launch .*$", there.note(best.number), re.MULTILINE)
    words = shlex.split(command.replace("STUDY.yaml", "tiny.yaml"))
    again = hpsearch(*words[1:])
    assert again.returncode == 0, again.stderr
    repeated = package.open_study(words[words.index("--name") + 1], store=study.store)
    assert repeated.board().rows[0].score == ranked[0].score
    exported = hpsearch(*shlex.split(re.findall(r"^hpsearch export .*$", there.note(best.number), re.MULTILINE)[0])[1:],
                        "--store", study.store)  # fmt: skip
    assert exported.returncode == 0, exported.stderr


def test_what_a_person_has_written_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    package.launch(tiny, trials=2)
    there = Recorded(tmp_path)
    save_note(there.study, "what I think of it")
    save_note_with_version(there.storage, there.id, there.study.trials[0]._trial_id, 2, "my trial")
    package.launch(tiny, trials=3, extend=True)
    there = Recorded(tmp_path)
    assert get_note(there.study) == "what I think of it"
    assert there.note(0) == "my trial"
    assert there.note(2).startswith("**")


def test_a_note_that_is_ours_follows_the_study(tiny: Path, tmp_path: Path) -> None:
    package.launch(tiny, trials=1)
    first = get_note(Recorded(tmp_path).study)
    study = package.launch(tiny, trials=3, extend=True)
    second = get_note(Recorded(tmp_path).study)
    assert "| 1 | 0 |" in first
    assert second.count("\n| ") == 2 + len(study.board().rows)
    assert re.search(rf"^- {sum(study.board().states.values())} trials", second, re.MULTILINE)


def test_what_is_shown_costs_one_transaction_however_large(tiny: Path, tmp_path: Path) -> None:
    spec = load_study(tiny)
    search = Search(spec, spec.store)
    asked = search.ask()
    commits = []
    assert search._record is not None
    sa.event.listen(search._record.storage.engine, "commit", commits.append)
    artifact = Artifact(trial=asked.number, name="log.jsonl", id="0a", kind="application/jsonl")
    lost = asked.number + 7
    search.annotate(
        Annotations(
            notes={asked.number: "n" * 50_000, lost: "of a trial that Optuna's tables have not"},
            study_note="## Leaderboard\n", replaces="## Leaderboard\n", artifacts=[artifact], without=[],
            figures={"curves": json.dumps({"data": ["x" * 90_000]})},
        )
    )  # fmt: skip
    written = [commit for commit in commits if commit is not None]
    assert len(written) <= 2, "one that reads and one that writes"
    assert search.annotated() == ({asked.number}, {asked.number: {"log.jsonl"}})
    search.close()
    there = Recorded(tmp_path)
    assert there.note(asked.number) == "n" * 50_000
    assert json.loads(get_plotly_graph_objects(there.attributes)["curves"])["data"] == ["x" * 90_000]


def test_a_note_is_text_whatever_a_study_is_called() -> None:
    evil = "<img src=x onerror=alert(1)> [a](javascript:alert(1)) | `x` ```"
    trial = row(
        WholeTrial, number=0, state="failed", reason=evil, scores=[], decisions=[], host=evil, device=evil,
        device_seconds=1.0, attempt=1, worker_deaths=0, points=[], params={"architecture": f"{evil}\n```\n# heading"},
        seed=0,
    )  # fmt: skip
    note = trial_note(row(StudyRow, name=evil, overrides=[]), trial)
    inside, fence = [], None
    for line in note.splitlines():
        if line.startswith("```") and set(line) == {"`"} and fence in (None, line):
            fence = None if fence else line
        elif fence is None:
            inside.append(line)
    assert fence is None
    outside = "\n".join(inside)
    assert "<img" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "# heading" not in outside
