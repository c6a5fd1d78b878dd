"""The model of a trial as a folder that transformers loads."""

from __future__ import annotations

import os
from pathlib import Path

from hpsearch.errors import RunFolderError, UsageError
from hpsearch.files.layout import LAST_WORDS, RESULT, TRIAL, earlier_attempts, run_folder
from hpsearch.files.ownership import is_own
from hpsearch.files.scratch import private_folder
from hpsearch.files.storage import copied, locate, names
from hpsearch.records import UNFINISHED, TrialConfig
from hpsearch.results.leaderboard import Choice
from hpsearch.results.study import Study
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import recorded_study
from hpsearch.store.rows import StudyRow, TrialRow
from hpsearch.store.store import opened_store


def export_model(opened: Study, trial: int | None, *, target: str | os.PathLike[str] | None, by: Choice) -> Path:
    """Copy the model of a trial, the winner by default, to a folder; see `hpsearch.export`."""
    name = opened.name
    if trial is None:
        chosen = opened.choose(by)
        if chosen is None:
            raise UsageError(f"'{name}' has no trial with a test score or a validation loss yet")
        trial = int(chosen.trial)
    folder = Path(target or f"{name}-trial-{trial}")
    if folder.exists():
        raise UsageError(f"{folder} is there already; name another folder")
    with opened_store(opened.store) as store:
        study = store.study(name)
        row = store.trial(study, trial)
        if row.state in UNFINISHED:
            try:
                _write_unfinished(study, row, folder)
                return folder
            except UsageError:
                row = store.trial(study, trial)
                if row.state in UNFINISHED:
                    raise
            # It has ended meanwhile, and its states are gone.
    if row.checkpoint is None:
        raise UsageError(
            f"trial {trial} has no checkpoint: it was not ranked, or not among the best limits.keep_checkpoints of them"
        )
    source = locate(row.checkpoint)
    if not is_own(source, study):
        raise RunFolderError(f"{source} does not belong to '{name}'; nothing is exported from it")
    if "config.json" not in names(source):
        raise RunFolderError(f"the checkpoint of trial {trial} is not at {source} any more, or not within reach")
    copied(source, folder, without=(LAST_WORDS, RESULT, TRIAL))
    return folder


def _write_unfinished(study: StudyRow, row: TrialRow, target: Path) -> None:
    """Write the best model that a trial which has not ended has left so far."""
    run = run_folder(study.placement["folder"], study)
    earlier = earlier_attempts(run, row.number, row.attempt + 1)
    spec = recorded_study(study.spec, study.placement, "", trials=study.budget_trials)
    pretrained = {"pretrained": study.placement.get("pretrained")}
    with private_folder("export-") as scratch:
        config = TrialConfig(
            study=study.name,
            study_uid=study.uid,
            number=row.number,
            task=study.task,
            seed=row.seed,
            params=row.params,
            objective=study.objective,
            model=ModelSettings(**{**row.settings["model"], **pretrained}),
            training=RunSettings(**row.settings["training"]),
            options=spec.options.model_dump(mode="json"),
            rule=None,
            data=str(locate(study.placement["folder"]) / "data" / study.data["fingerprint"]),
            folder=str(scratch / "trial"),
            earlier=tuple(str(place) for place in earlier),
            threads=os.cpu_count() or 1,
            device="cpu",
        )
        from hpsearch.worker.run import export_unfinished

        export_unfinished(config, scratch / "model")
        copied(scratch / "model", target)
