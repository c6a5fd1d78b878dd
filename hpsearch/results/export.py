"""A study as tables for other tools: a row a trial, a row an evaluation, a row a score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from hpsearch.errors import RunFolderError
from hpsearch.results.leaderboard import param_names
from hpsearch.store.store import Store

_POINT = (
    "evaluation",
    "epoch",
    "step",
    "train_loss",
    "valid_loss",
    "valid_score",
    "learning_rate",
    "tokens",
    "seconds",
)
_SCORE = ("metric", "value", "low", "high", "n")
_TRIAL = (
    "state",
    "reason",
    "repeat_of",
    "seed",
    "attempt",
    "worker_deaths",
    "started_at",
    "ended_at",
    "device_seconds",
    "host",
    "device",
    "last_epoch",
    "best_epoch",
    "best_valid_loss",
    "best_valid_score",
    "num_parameters",
    "checkpoint",
)


def study_tables(store: Store, name: str) -> dict[str, pd.DataFrame]:
    """Frames `trials`, `curves` and `scores`; sampled settings are columns `param_NAME`. Raises UnknownStudyError."""
    study = store.study(name)
    trials = store.trials(study.id)
    curves = store.study_points(study.id)
    scores = store.study_scores(study.id)
    names = param_names(trials)
    rows: list[dict[str, Any]] = [
        {
            "study": name,
            "trial": row.number,
            **{f"param_{setting}": row.params.get(setting) for setting in names},
            **{key: getattr(row, key) for key in _TRIAL},
            **{f"test_{metric}": score.value for metric, score in scores.get(row.number, {}).items()},
        }
        for row in trials
    ]
    points: list[dict[str, Any]] = [
        {"study": name, "trial": row.number, **{key: getattr(point, key) for key in _POINT}}
        for row in trials
        for point in curves.get(row.id, [])
    ]
    results: list[dict[str, Any]] = [
        {
            "study": name,
            "trial": number,
            **{key: getattr(score, key) for key in _SCORE},
            "contract": json.dumps(score.contract),
        }
        for number, by_metric in sorted(scores.items())
        for score in by_metric.values()
    ]
    return {
        "trials": pd.DataFrame(rows, columns=None if rows else ["study", "trial", *_TRIAL]),
        "curves": pd.DataFrame(points, columns=["study", "trial", *_POINT]),
        "scores": pd.DataFrame(results, columns=["study", "trial", *_SCORE, "contract"]),
    }


def write_table(table: pd.DataFrame, file: Path) -> Path:
    """Write a frame as its file's suffix says."""
    if file.suffix == ".parquet":
        # One column has one type there; a choice may be of several.
        mixed = [name for name in table if table[name].map(type).nunique() > 1 and table[name].dtype == object]
        table.astype(dict.fromkeys(mixed, "string")).to_parquet(file, index=False)
    elif file.suffix == ".json":
        table.to_json(file, orient="records", date_format="iso", indent=1)
    else:
        table.map(spreadsheet_text).to_csv(file, index=False, lineterminator="\n")
    return file


def spreadsheet_text(value: Any) -> Any:
    """A value for a CSV file; text that a spreadsheet would run as a formula gets an apostrophe before it.

    As OWASP's page on CSV injection advises.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_tables(store: Store, name: str, folder: Path, *, format: str) -> list[Path]:
    """Write the tables of a study into a folder; returns the files. Raises UnknownStudyError, RunFolderError."""
    tables = study_tables(store, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [write_table(table, folder / f"{kind}.{format}") for kind, table in tables.items()]
    except OSError as error:
        raise RunFolderError(f"cannot write {folder}: {error.strerror or error}") from error
