"""The commands as functions, with the same names and arguments. The command line calls these and prints.

Every function that reads a store takes `store`, its SQLAlchemy URL; without it the store is HPSEARCH_STORE, or what is
in the file HPSEARCH_STORE_FILE, or sqlite:///hpsearch.db. All raise the errors of `hpsearch.errors`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from hpsearch.records import Listener
from hpsearch.results.leaderboard import Choice, Comparison, Leaderboard
from hpsearch.results.study import Study
from hpsearch.spec.load import LaunchOptions, load_study
from hpsearch.spec.parsing.environment import environment_store
from hpsearch.spec.study import DEFAULT_STORE
from hpsearch.store.rows import LeadingTrial, RankedTrial, StudySummary, WholeTrial
from hpsearch.store.store import opened_store

if TYPE_CHECKING:
    from hpsearch.backends.ray.jobs import Job
    from hpsearch.driver.drafting.draft import Draft
    from hpsearch.results.status import StudyStatus, WatchedStudy
    from hpsearch.upkeep.doctor import Finding
    from hpsearch.upkeep.retention import Garbage

StudyFile = str | os.PathLike[str]


def store_url(store: str | None = None) -> str:
    """The store that a function reads."""
    return store or environment_store() or DEFAULT_STORE


# Commands that run trials


def init(
    files: Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str] = "study.yaml",
    task: str | None = None,
    pretrained: str | None = None,
) -> Draft:
    """Write a first study file for data in local files, and say what was recognised. Overwrites nothing.

    Raises UsageError for names that are no files of text, DataError for files that cannot be read.
    """
    from hpsearch.driver.drafting.draft import draft

    return draft([os.fspath(file) for file in files], os.fspath(output), task=task, pretrained=pretrained)


def check(
    study: StudyFile, *, extend: bool = False, full: bool = False, **options: Unpack[LaunchOptions]
) -> dict[str, Any]:
    """What a launch would do, touching nothing: space, first settings, data, store, devices, tokens to train.

    A large corpus is read in part, and its counts are estimated, unless `full` is set.

    A database server that only the file names is not asked. Raises the error that the launch would raise.
    """
    from hpsearch.driver import plan

    spec = load_study(study, **options)
    # libpq would give a server that the file alone names the passwords of PGPASSWORD and ~/.pgpass.
    is_own = bool(options.get("store") or environment_store() or spec.store.startswith("sqlite"))
    moves = options.get("folder") is not None
    return plan.check(spec, extend=extend, moves=moves, contacts_store=is_own, full=full)


def launch(
    study: StudyFile,
    *,
    extend: bool = False,
    track: Sequence[str] = (),
    listen: Listener | None = None,
    on_cluster_lost: Callable[[int | None], None] | None = None,
    **options: Unpack[LaunchOptions],
) -> Study:
    """Run a study to the end of its budget, or resume it; returns it with `.best` and `.leaderboard()`.

    Interrupted by SIGINT, SIGTERM or SIGHUP it returns, too, with `exit_code` 130, 143 or 129. `extend` accepts a
    larger budget or a wider space than the study has. `listen` hears every Event, from any thread. When Ray is lost
    everything is brought to safety, then `on_cluster_lost` is called (with the exit code of a launch that was asked to
    stop), then ClusterError is raised; but when the head of Ray died, Ray ends the process within a minute.
    """
    from hpsearch.driver.launch import launch_spec, recorded_options

    return launch_spec(
        load_study(study, **options),
        recorded_options(options),
        listen,
        extend=extend,
        moves=options.get("folder") is not None,
        track=track,
        on_cluster_lost=on_cluster_lost,
    )


def finals(
    study: str, *, top: int = 5, seeds: int = 3, store: str | None = None, listen: Listener | None = None
) -> Study:
    """Run the best `top` settings of a study again with `seeds` new seeds each; repeats that are done stay.

    The repeats are trials of their own, marked `repeat_of`; the sampler is not told.
    """
    from hpsearch.driver.finals import run_finals

    return run_finals(store_url(store), study, top=top, seeds=seeds, listen=listen)


# Jobs of a Ray cluster, at an http `address`


def submit(
    study: StudyFile,
    *,
    address: str | None = None,
    job_id: str | None = None,
    extend: bool = False,
    track: Sequence[str] = (),
    overrides: Sequence[str] = (),
    name: str | None = None,
    trials: int | None = None,
    store: str | None = None,
    folder: str | None = None,
) -> str:
    """Launch a study as a job of a Ray cluster; returns the job's id.

    The file and the local data that it names go with it. Nothing is submitted that this machine can tell is wrong.
    """
    from hpsearch.backends.ray.jobs import Cluster

    spec = load_study(study, overrides=overrides, name=name, trials=trials, store=store, address="auto", folder=folder)
    arguments = [f"--set={override}" for override in overrides]
    given = {"name": name, "trials": trials, "folder": folder}
    arguments += [f"--{option}={value}" for option, value in given.items() if value is not None]
    arguments += [*(["--extend"] if extend else []), *(f"--track={tracker}" for tracker in track)]
    return Cluster(address).submit(Path(study), spec, arguments=arguments, job_id=job_id)


def jobs(*, address: str | None = None) -> list[Job]:
    """The jobs of a Ray cluster, newest first."""
    from hpsearch.backends.ray.jobs import Cluster

    return Cluster(address).jobs()


def stop(job_id: str, *, address: str | None = None) -> Job:
    """Ask a job to stop; returns it as it is then. Its trials write a checkpoint first."""
    from hpsearch.backends.ray.jobs import Cluster

    return Cluster(address).stop(job_id)


# Reading a store


def studies(*, store: str | None = None) -> list[StudySummary]:
    """All studies of a store, oldest first, with trials by state, best test score and lease."""
    with opened_store(store_url(store)) as opened:
        return opened.studies()


def open_study(study: str, *, store: str | None = None) -> Study:
    """A study by name. Raises UnknownStudyError, StoreError."""
    url = store_url(store)
    with opened_store(url) as opened:
        opened.study(study)
    return Study(name=study, store=url)


def status(study: str, *, store: str | None = None) -> StudyStatus:
    """How far a study is: trials by state, the best, its driver, and about how long the rest will take.

    The rest is estimated from the trials that have ended, as if as many ran side by side as now.
    """
    from hpsearch.results.status import study_status

    url = store_url(store)
    with opened_store(url) as opened:
        return study_status(opened, study, url)


def watch(study: str, *, store: str | None = None, every_s: float = 2.0) -> Iterator[WatchedStudy]:
    """How far a study is, again and again until it is finished: `status` with the trials; the running have `points`.

    Reads the store and nothing else, so that it works wherever the store is reached.
    """
    from hpsearch.results.status import watch_study

    return watch_study(store_url(store), study, every_s=every_s)


def logs(study: str, trial: int, *, store: str | None = None, follow: bool = False) -> Iterator[dict[str, Any]]:
    """What the worker of a trial has said, line by line; with `follow` until the trial has ended.

    Each line has `time`, `attempt`, `level`, `message`, and sometimes `facts`, `logger` and `traceback`. Raises
    UsageError when this machine has no such file.
    """
    from hpsearch.results.status import trial_log

    return trial_log(store_url(store), study, trial, follow=follow)


def rank(*studies: str, top: int | None = None, mixed: bool = False, store: str | None = None) -> Leaderboard:
    """The ranked trials of a study, or of several together; `mixed` ranks scores that are not comparable, too."""
    return open_study(studies[0], store=store).board(*studies[1:], top=top, mixed=mixed)


def show(study: str, trial: int, *, store: str | None = None) -> WholeTrial:
    """One trial with its curve, scores, decisions and details."""
    return open_study(study, store=store).trial(trial)


def compare(study: str, first: int, second: int, *, store: str | None = None) -> Comparison:
    """The paired test of two ranked trials."""
    return open_study(study, store=store).compare(first, second)


def best(study: str, *, by: Choice = "test", store: str | None = None) -> RankedTrial | LeadingTrial | None:
    """The winner by its test score or on validation; while there are no test scores, the trial that leads."""
    return open_study(study, store=store).choose(by)


def report(*studies: str, page: str | None = None, store: str | None = None, is_live: bool = False) -> str:
    """A page of figures of one study, or of several side by side, as one HTML document that needs no network.

    `page` is the name of a file of `dashboards/` or the path of one. One that `is_live` is for the server of
    `hpsearch dashboard`, which it asks for its scripts and for newer numbers.
    """
    from hpsearch.reports.pages import read_page, render
    from hpsearch.reports.study_data import read_study
    from hpsearch.search.importances import importances

    chosen = read_page(page or ("study" if len(studies) == 1 else "comparison"))
    url = store_url(store)
    with opened_store(url) as opened:
        data = [read_study(opened, name, importances(url, name)) for name in dict.fromkeys(studies)]
    return render(chosen, data, is_live=is_live)


def trial_page(study: str, trial: int, *, store: str | None = None) -> str:
    """The page of one trial, for the server of `hpsearch dashboard`."""
    from hpsearch.reports.pages import render_trial
    from hpsearch.reports.study_data import read_study

    with opened_store(store_url(store)) as opened:
        data = read_study(opened, study)
        return render_trial(data, opened.whole_trial(opened.trial(data.study, trial)))


def export(
    study: str,
    trial: int | None = None,
    *,
    output: StudyFile | None = None,
    by: Choice = "test",
    store: str | None = None,
) -> Path:
    """Copy the model of a trial to a folder that transformers loads; returns that folder.

    By default that of the winner `by` its test score or on validation. A trial that has not ended gives its best
    checkpoint so far. Raises UsageError when the trial has no checkpoint or the folder is there, and RunFolderError.
    """
    from hpsearch.results.models import export_model

    return export_model(open_study(study, store=store), trial, target=output, by=by)


def export_data(study: str, output: StudyFile, *, format: str = "csv", store: str | None = None) -> list[Path]:
    """Write trials, curves and scores of a study as tables into a folder: csv, parquet or json; returns the files."""
    from hpsearch.results.export import write_tables

    with opened_store(store_url(store)) as opened:
        return write_tables(opened, study, Path(output), format=format)


def schema() -> dict[str, Any]:
    """The JSON schema of study files, for editors."""
    from hpsearch.spec.json_schema import json_schema

    return json_schema()


# Looking after a store


def archive(study: str, *, store: str | None = None) -> str | None:
    """Rename a study to a name that says when, so that its own is free; returns that name.

    None when there is no such study. Nothing is deleted. Raises StudyBusyError when it is running.
    """
    from hpsearch.upkeep.actions import archive_study

    return archive_study(store_url(store), study)


def retry(study: str, *trials: int, store: str | None = None) -> list[int]:
    """Put failed trials of a study, all by default, back into its queue for the next launch; returns their numbers.

    Raises StudyBusyError, and UsageError for a trial that has not failed.
    """
    from hpsearch.upkeep.actions import retry_trials

    return retry_trials(store_url(store), study, trials)


def gc(study: str, *, keep: int | None = None, dry_run: bool = False, store: str | None = None) -> list[Garbage]:
    """Remove the checkpoints of a study that are neither among the best `keep` nor needed to resume; returns them.

    `keep` is the study's own `limits.keep_checkpoints` by default. Raises StudyBusyError when it is running.
    """
    from hpsearch.upkeep.actions import collect_garbage

    return collect_garbage(store_url(store), study, keep=keep, dry_run=dry_run)


def doctor(study: str | None = None, *, repair: bool = False, store: str | None = None) -> list[Finding]:
    """Hold a store, or one study of it, to its invariants; `repair` does what is safe to do.

    Raises StudyBusyError when a study to be repaired is running.
    """
    from hpsearch.upkeep.doctor import examine

    with opened_store(store_url(store), create=repair) as opened:
        return examine(opened, only=study, repair=repair)
