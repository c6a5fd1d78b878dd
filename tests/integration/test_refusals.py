"""What the store can never take ends a trial, not its study; and text of any kind is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

import hpsearch
from hpsearch.training.trainer import Trainer
from tests.conftest import TINY

pytestmark = pytest.mark.slow


def test_an_end_that_the_store_refuses_fails_its_trial(
    tiny: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Trainer.score

    def wrong(self: Any) -> Any:
        scored = score(self)
        if "trial-00001" not in str(self.folder):
            return scored
        return replace(scored, scores=tuple(replace(one, n=2**70) for one in scored.scores))

    monkeypatch.setattr(Trainer, "score", wrong)
    notes: list[str] = []
    options = ["prune={overfit: false, unpromising: none}"]
    study = hpsearch.launch(
        tiny, store=store_url, overrides=options, listen=lambda event: notes.append(getattr(event, "text", ""))
    )
    assert study.exit_code == 0
    assert [trial.state for trial in study.trials()] == ["completed", "failed", "completed", "completed"]
    failed = study.trial(1)
    assert "cannot be used" in failed.reason
    assert len(failed.points) >= 2, "what it learned stays"
    assert any(note.startswith("trial 1 failed: the store") for note in notes)
    states = [trial.state.name for trial in optuna.load_study(study_name="tiny", storage=store_url).trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert hpsearch.doctor(store=store_url) == []
    assert hpsearch.launch(tiny, store=store_url, overrides=options).trials() == study.trials()


def test_text_with_characters_that_are_none_is_classified(tmp_path: Path, store_url: str) -> None:
    words = ["save", "open", "close", "name", "file", "line"]
    rows = [{"text": f"{a} {b}\0 {c}", "label": f"{a}\0"} for a in words for b in words for c in words]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "labels.yaml"
    text = TINY.replace("name: tiny", "name: labels").replace("causal_lm", "classification").replace("gpt2", "bert")
    text = text.replace("{corpus: python_docs, fraction: 0.08}", "{files: rows.jsonl}").replace(
        "trials: 4", "trials: 1"
    )
    file.write_text(f"{text}folder: {tmp_path}/runs\n")
    study = hpsearch.launch(file, store=store_url)
    assert study.exit_code == 0
    details = json.dumps(study.trial(0).details)
    assert "\\ufffd" in details
    assert "\\u0000" not in details
