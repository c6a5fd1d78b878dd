"""The commands as functions: `launch`, `check`, `open_study`, `doctor`, ... The command line calls these and prints."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hpsearch
from hpsearch.data import pretrained
from hpsearch.driver import leases
from hpsearch.driver.ownership import is_own, owner_of
from hpsearch.driver.retention import Garbage, earlier_attempts, find_garbage, run_folder
from hpsearch.driver.retention import collect as collect_garbage
from hpsearch.errors import (
    EXIT_BUSY,
    EXIT_FINISHED,
    EXIT_SIGHUP,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    EXIT_TOO_MANY_FAILED,
    RunFolderError,
    UnknownStudyError,
    UsageError,
)
from hpsearch.files.scratch import private_folder
from hpsearch.files.storage import Folder, cached, copied, locate, names
from hpsearch.files.trial_log import log_file, read_log
from hpsearch.records import LAST_WORDS, RANKED, RESULT, TRIAL, UNFINISHED, Event, Listener, TrialConfig, TrialState
from hpsearch.results.leaderboard import Choice, Leaderboard, compare, count_states, finalists, frame, leaderboard
from hpsearch.spec.environment import environment_store
from hpsearch.spec.load import load_study
from hpsearch.spec.redaction import hide_secrets
from hpsearch.spec.sections import LimitSpec
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.space import narrowed
from hpsearch.spec.study import DEFAULT_STORE, StudySpec, recorded_space, recorded_study
from hpsearch.store.store import NewStudy, Row, Store
from hpsearch.tasks import HIGHER_IS_BETTER, RANKING_METRIC

if TYPE_CHECKING:
    import pandas as pd

    from hpsearch.data.shards import DataCard
    from hpsearch.driver.doctor import Finding
    from hpsearch.driver.outbox import Outbox
    from hpsearch.driver.run import Repeat, StudyRun

_RUN_AGAIN = UNFINISHED | {TrialState.FAILED}
"""States of a repeat that the next finals put in its place again."""
MAX_FAILED_SHARE = 0.5
"""A study that finished with a larger share of failed trials ends in exit code 3."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study in a store, as a person reads it."""

    name: str
    store: str
    exit_code: int = EXIT_FINISHED
    """What the launch that returned it ended in; 0 for a study that was just opened."""
    stop_reason: str | None = None
    """Why the launch ended before the budget was used, if it did."""

    def board(self, *others: str, top: int | None = None, mixed: bool = False) -> Leaderboard:
        """Ranked trials, together with those of other studies in the same store. Raises UsageError."""
        with _opened(self.store) as store:
            return leaderboard(store, self.name, *others, top=top, mixed=mixed)

    def compare(self, first: int, second: int) -> dict[str, Any]:
        """The paired test of two ranked trials. Raises UnknownStudyError, UsageError."""
        with _opened(self.store) as store:
            return compare(store, self.name, first, second)

    def leaderboard(self, *, top: int | None = None) -> pd.DataFrame:
        """Ranked trials as a frame, best test score first; sampled settings are columns `param_NAME`."""
        return frame(self.board(top=top))

    @property
    def best(self) -> Row | None:
        """The trial with the best test score; while there is none, the one that leads on validation, if any."""
        return self.choose("test")

    def choose(self, by: Choice) -> Row | None:
        """The winner by its test score, or on validation; see `Leaderboard.chosen`."""
        return self.board(top=1).chosen(by)

    def trials(self) -> list[Row]:
        """Every trial in any state, by number."""
        with _opened(self.store) as store:
            return store.trials(store.study(self.name)["id"])

    def trial(self, number: int) -> Row:
        """One trial with its curve (`points`), `scores`, `decisions` and `details`. Raises UnknownStudyError."""
        with _opened(self.store) as store:
            return store.whole_trial(store.trial(store.study(self.name), number))


def store_url(store: str | None = None) -> str:
    """The store to read: the argument, then HPSEARCH_STORE or HPSEARCH_STORE_FILE, then sqlite:///hpsearch.db."""
    return store or environment_store() or DEFAULT_STORE


def open_study(name: str, *, store: str | None = None) -> Study:
    """A study by name. Raises UnknownStudyError, StoreError."""
    url = store_url(store)
    with _opened(url) as opened:
        opened.study(name)
    return Study(name=name, store=url)


def studies(*, store: str | None = None) -> list[Row]:
    """All studies of a store, oldest first, with trials by state, best test score and lease."""
    with _opened(store_url(store)) as opened:
        return opened.studies()


def launch(
    study: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    trials: int | None = None,
    store: str | None = None,
    backend: str | None = None,
    address: str | None = None,
    folder: str | None = None,
    extend: bool = False,
    track: Sequence[str] = (),
    listen: Listener | None = None,
    on_cluster_lost: Callable[[int | None], None] | None = None,
) -> Study:
    """Run a study to the end of its budget, or go on with it; returns it with `.best` and `.leaderboard()`.

    Interrupted by SIGINT, SIGTERM or SIGHUP it returns, too, with `exit_code` 130, 143 or 129. `extend` accepts a
    larger budget or a wider space than the study has. `listen` hears every Event, from any thread. When Ray is lost
    everything is brought to safety, then `on_cluster_lost` is called (with the exit code of a launch that was asked to
    stop), then ClusterError is raised; but when the head of Ray died, Ray ends the process within a minute. Raises the
    errors of `hpsearch.errors`.
    """
    options = {"name": name, "trials": trials, "store": store, "backend": backend, "address": address, "folder": folder}
    spec = load_study(study, overrides=overrides, **options)  # type: ignore[arg-type]
    recorded = _recorded(overrides, **options)
    return launch_spec(
        spec,
        recorded,
        listen or _silent,
        extend=extend,
        moves=folder is not None,
        track=track,
        on_cluster_lost=on_cluster_lost,
    )


def submit(
    study: str | os.PathLike[str],
    *,
    address: str | None = None,
    job_id: str | None = None,
    overrides: Sequence[str] = (),
    name: str | None = None,
    trials: int | None = None,
    store: str | None = None,
    folder: str | None = None,
    extend: bool = False,
    track: Sequence[str] = (),
) -> str:
    """Launch a study as a job of the Ray cluster at an http `address`; returns the job's id.

    The file and the local data that it names go with it. Nothing is submitted that this machine can tell is wrong.
    Raises SpecError, UsageError, ClusterError.
    """
    from hpsearch.backends.ray.jobs import Cluster

    spec = load_study(study, overrides=overrides, name=name, trials=trials, store=store, address="auto", folder=folder)
    arguments = [f"--set={override}" for override in overrides]
    options = {"name": name, "trials": trials, "folder": folder}
    arguments += [f"--{option}={value}" for option, value in options.items() if value is not None]
    arguments += [*(["--extend"] if extend else []), *(f"--track={tracker}" for tracker in track)]
    return Cluster(address).submit(Path(study), spec, arguments=arguments, job_id=job_id)


def report(*names: str, store: str | None = None, page: str | None = None, is_live: bool = False) -> str:
    """A page of figures of one study, or of several side by side, as one HTML document that needs no network.

    `page` is the name of a file of `dashboards/` or the path of one. One that `is_live` is for the server of
    `hpsearch dashboard`, which it asks for its scripts and for newer numbers. Raises UnknownStudyError, UsageError.
    """
    from hpsearch.reports.pages import read_page, render
    from hpsearch.reports.study_data import read_study
    from hpsearch.search.study import importances

    chosen = read_page(page or ("study" if len(names) == 1 else "comparison"))
    url = store_url(store)
    with _opened(url) as opened:
        studies = [read_study(opened, name, importances(url, name)) for name in dict.fromkeys(names)]
    return render(chosen, studies, is_live=is_live)


def trial_page(name: str, trial: int, *, store: str | None = None) -> str:
    """The page of one trial, for the server of `hpsearch dashboard`. Raises UnknownStudyError."""
    from hpsearch.reports.pages import render_trial
    from hpsearch.reports.study_data import read_study

    with _opened(store_url(store)) as opened:
        data = read_study(opened, name)
        return render_trial(data, opened.whole_trial(opened.trial(data.study, trial)))


def status(name: str, *, store: str | None = None) -> dict[str, Any]:
    """How far a study is: trials by state, the best, who runs it, and about how long the rest will take.

    The rest is reckoned from the trials that have ended, as if as many ran side by side as now. Raises
    UnknownStudyError.
    """
    url = store_url(store)
    with _opened(url) as opened:
        return _status(opened, name, url)


def _status(opened: Store, name: str, url: str) -> dict[str, Any]:
    row = opened.study(name)
    trials = [trial for trial in opened.trials(row["id"]) if trial["repeat_of"] is None]
    lease = opened.lease(row["id"])
    board = leaderboard(opened, name, top=1)
    ended = [trial for trial in trials if trial["state"] not in UNFINISHED]
    running = [trial for trial in trials if trial["state"] == TrialState.RUNNING]
    left = max(0, row["budget_trials"] - len(ended))
    mean_s = sum(trial["device_seconds"] or 0.0 for trial in ended) / len(ended) if ended else None
    is_held = leases.is_held(lease)
    return {
        "schema_version": 1,
        "study": name,
        "store": hide_secrets(url),
        "budget": row["budget_trials"],
        "states": count_states(trials),
        "best": board.best,
        "metric": row["metric"],
        "holder": lease["holder"] if lease is not None and is_held else None,
        "since": lease["acquired_at"] if lease is not None and is_held else None,
        "heartbeat_at": lease["heartbeat_at"] if lease is not None and is_held else None,
        "seconds_left": None if mean_s is None or not running else left * mean_s / len(running),
        "is_finished": left == 0,
    }


def watch(name: str, *, store: str | None = None, every_s: float = 2.0) -> Iterator[dict[str, Any]]:
    """How far a study is, again and again until it is finished: `status` with the trials; the running have `points`.

    Reads the store and nothing else, so that it works wherever the store is reached. Raises UnknownStudyError.
    """
    url = store_url(store)
    with _opened(url) as opened:
        while True:
            found = _status(opened, name, url)
            study = opened.study(name)
            trials = [trial for trial in opened.trials(study["id"]) if trial["repeat_of"] is None]
            for trial in trials:
                trial["points"] = opened.points(trial["id"]) if trial["state"] == TrialState.RUNNING else []
            yield {**found, "trials": trials}
            if found["is_finished"]:
                return
            time.sleep(every_s)


def export_data(
    name: str, folder: str | os.PathLike[str], *, format: str = "csv", store: str | None = None
) -> list[Path]:
    """Write the trials, curves and scores of a study as tables into a folder: csv, parquet or json; returns the files.

    Raises UnknownStudyError, and RunFolderError when the folder cannot be written.
    """
    from hpsearch.results.export import study_tables, write_table

    with _opened(store_url(store)) as opened:
        tables = study_tables(opened, name)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return [write_table(table, Path(folder) / f"{kind}.{format}") for kind, table in tables.items()]
    except OSError as error:
        raise RunFolderError(f"cannot write {folder}: {error.strerror or error}") from error


def logs(name: str, trial: int, *, store: str | None = None, follow: bool = False) -> Iterator[dict[str, Any]]:
    """What the worker of a trial has said, line by line; with `follow` until the trial has ended.

    Each line has `time`, `attempt`, `level`, `message`, and sometimes `facts`, `logger` and `traceback`. Raises
    UnknownStudyError, and UsageError when this machine has no such file.
    """
    with _opened(store_url(store)) as opened:
        study = opened.study(name)
        file = log_file(run_folder(study["placement"]["folder"], study), trial)
        position = 0
        while True:
            is_live = opened.trial(study, trial)["state"] in UNFINISHED
            lines, position = read_log(file, start=position)
            yield from lines
            if not (follow and is_live):
                break
            time.sleep(0.5)
    if not position:
        raise UsageError(f"trial {trial} has no log at {file}: it has not begun, or ran on other machines")


def export_model(
    name: str,
    trial: int | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    by: Choice = "test",
    store: str | None = None,
) -> Path:
    """Copy the model of a trial to a folder that transformers loads; returns that folder.

    By default that of the winner `by` its test score or on validation. A trial that has not ended gives its best
    checkpoint so far. Raises UnknownStudyError, UsageError when the trial has no checkpoint or the folder is there, and
    RunFolderError.
    """
    opened = open_study(name, store=store)
    if trial is None:
        chosen = opened.choose(by)
        if chosen is None:
            raise UsageError(f"'{name}' has no trial with a test score or a validation loss yet")
        trial = int(chosen["trial"])
    target = Path(folder or f"{name}-trial-{trial}")
    if target.exists():
        raise UsageError(f"{target} is there already; name another folder")
    with _opened(opened.store) as there:
        study = there.study(name)
        row = there.trial(study, trial)
        if row["state"] in UNFINISHED:
            try:
                _export_unfinished(study, row, target)
                return target
            except UsageError:
                row = there.trial(study, trial)
                if row["state"] in UNFINISHED:
                    raise
            # It has ended meanwhile, and its states are gone.
    if row["checkpoint"] is None:
        raise UsageError(
            f"trial {trial} has no checkpoint: it was not ranked, or not among the best limits.keep_checkpoints of them"
        )
    source = locate(row["checkpoint"])
    if not is_own(source, study):
        raise RunFolderError(f"{source} does not belong to '{name}'; nothing is exported from it")
    if "config.json" not in names(source):
        raise RunFolderError(f"the checkpoint of trial {trial} is not at {source} any more, or not within reach")
    copied(source, target, without=(LAST_WORDS, RESULT, TRIAL))
    return target


def _export_unfinished(study: Row, row: Row, target: Path) -> None:
    """Write the best model that a trial which has not ended has left so far."""
    run = run_folder(study["placement"]["folder"], study)
    earlier = earlier_attempts(run, row["number"], row["attempt"] + 1)
    spec = recorded_study(study["spec"], study["placement"], "", trials=study["budget_trials"])
    pretrained = {"pretrained": study["placement"].get("pretrained")}
    with private_folder("export-") as scratch:
        config = TrialConfig(
            study=study["name"],
            study_uid=study["uid"],
            number=row["number"],
            task=study["task"],
            seed=row["seed"],
            params=row["params"],
            objective=study["objective"],
            model=ModelSettings(**{**row["settings"]["model"], **pretrained}),
            training=RunSettings(**row["settings"]["training"]),
            translation=spec.translation,
            classification=spec.classification,
            rule=None,
            data=str(locate(study["placement"]["folder"]) / "data" / study["data"]["fingerprint"]),
            folder=str(scratch / "trial"),
            earlier=tuple(str(place) for place in earlier),
            threads=os.cpu_count() or 1,
            device="cpu",
        )
        from hpsearch.worker.run import export_unfinished

        export_unfinished(config, scratch / "model")
        copied(scratch / "model", target)


def archive(name: str, *, store: str | None = None) -> str | None:
    """Put a study aside under a name that says when, so that its own is free; returns that name.

    None when there is no such study. Nothing is deleted. Raises StudyBusyError when it is running.
    """
    url = store_url(store)
    if Store.preflight(url) == "new":
        return None
    with _opened(url, create=True) as opened:
        row = opened.find_study(name)
        if row is None:
            return None
        with leases.hold(opened, row, lambda text: None):
            return opened.archive_study(row)


def finals(
    name: str, *, top: int = 5, seeds: int = 3, store: str | None = None, listen: Listener | None = None
) -> Study:
    """Run the best `top` settings of a study again with `seeds` new seeds each; repeats that are done stay.

    The repeats are trials of their own, marked `repeat_of`; the sampler is not told. Raises the errors of `launch`.
    """
    from hpsearch.driver.run import Repeat

    url = store_url(store)
    with _opened(url) as opened:
        row = opened.study(name)
        if row["placement"] is None:
            raise UsageError(f"'{name}' was last launched by an older hpsearch; launch it once more before its finals")
        spec = recorded_study(row["spec"], row["placement"], url, trials=row["budget_trials"])
        rows = list(finalists(leaderboard(opened, name), top))
        if not rows:
            raise UsageError(f"no trial of '{name}' can be ranked yet, so there are no finals")
        done = {
            (trial["repeat_of"], trial["seed"])
            for trial in opened.trials(row["id"])
            if trial["repeat_of"] is not None and trial["state"] not in _RUN_AGAIN
        }
    wanted = [
        Repeat(of=finalist["trial"], seed=(spec.seed + number) % 2**32)
        for number in range(1, seeds + 1)
        for finalist in rows
    ]
    repeats = [repeat for repeat in wanted if (repeat.of, repeat.seed) not in done]
    if not repeats:
        return Study(name=name, store=url)
    return launch_spec(spec, row["overrides"], listen or _silent, repeats)


def retry(name: str, *trials: int, store: str | None = None) -> list[int]:
    """Put failed trials of a study, all by default, back into its queue for the next launch; returns their numbers.

    Raises UnknownStudyError, StudyBusyError, and UsageError for a trial that has not failed.
    """
    from hpsearch.search.study import Search

    url = store_url(store)
    with _opened(url, create=True) as opened:
        row = opened.study(name)
        chosen = [opened.trial(row, number) for number in dict.fromkeys(trials)]
        if wrong := [trial for trial in chosen if trial["state"] != TrialState.FAILED]:
            raise UsageError(f"trial {wrong[0]['number']} of '{name}' has not failed: it is {wrong[0]['state']}")
        failed = chosen or [trial for trial in opened.trials(row["id"]) if trial["state"] == TrialState.FAILED]
        if not failed:
            return []
        with leases.hold(opened, row, lambda text: None) as lease:
            opened.fence(row["id"], lease.token)
            spec = recorded_study(row["spec"], row["placement"], url, trials=row["budget_trials"])
            with closing(Search(spec, url, lease=(row["id"], lease.token))) as search:
                for trial in failed:
                    opened.reopen_trial(trial["id"], "failed, and was put back by `hpsearch retry`")
                    search.reopen(trial["number"])
    return [trial["number"] for trial in failed]


def collect(name: str, *, keep: int | None = None, dry_run: bool = False, store: str | None = None) -> list[Garbage]:
    """Remove the checkpoints of a study that are neither among the best `keep` nor needed to resume; returns them.

    `keep` is the study's own `limits.keep_checkpoints` by default. Raises UnknownStudyError, StudyBusyError.
    """
    url = store_url(store)
    with _opened(url, create=not dry_run) as opened, ExitStack() as stack:
        row = opened.study(name)
        if row["placement"] is None:
            raise UsageError(f"'{name}' was last launched by an older hpsearch; launch it once more before gc")
        if not dry_run:
            lease = stack.enter_context(leases.hold(opened, row, lambda text: None))
            opened.fence(row["id"], lease.token)
        limits = LimitSpec.model_validate(row["placement"].get("limits", {}))
        garbage = find_garbage(opened, row, keep=keep or limits.keep_checkpoints)
        if not dry_run:
            owner = owner_of(opened, row, lease.token)
            owner.claim(run_folder(row["placement"]["folder"], row))
            collect_garbage(opened, garbage, remove=owner.remove)
        return garbage


def doctor(study: str | None = None, *, repair: bool = False, store: str | None = None) -> list[Finding]:
    """Hold a store, or one study of it, to its invariants; with `repair`, mend what is safe to.

    Raises UnknownStudyError, StudyBusyError.
    """
    from hpsearch.driver.doctor import examine

    with _opened(store_url(store), create=repair) as opened:
        return examine(opened, only=study, repair=repair)


def launch_spec(
    spec: StudySpec,
    overrides: list[str],
    listen: Listener,
    repeats: Sequence[Repeat] | None = None,
    *,
    extend: bool = False,
    moves: bool = False,
    track: Sequence[str] = (),
    on_cluster_lost: Callable[[int | None], None] | None = None,
) -> Study:
    """`launch` for a study that is loaded already; `overrides` are kept with it as a record.

    `moves` says that a person has named the folder: the study's files may lie elsewhere from now on.
    """
    from hpsearch.backends import open_backend
    from hpsearch.driver.outbox import Outbox
    from hpsearch.integrations.trackers import check_trackers, tracked

    def note(text: str) -> None:
        listen(Event(kind="note", facts={"text": text}))

    spec = _with_its_defaults(spec)
    _existing(spec, extend=extend, moves=moves)
    check_trackers(track, locate(spec.folder))
    starts = [] if repeats is not None else _starts(spec)
    with ThreadPoolExecutor(1) as helper, ExitStack() as stack:
        # Ray needs seconds to start; the text is read and tokenized meanwhile, and what decides is imported.
        preparing = helper.submit(_prepare_data, spec)
        helper.submit(_import_what_decides)
        backend = stack.enter_context(open_backend(spec, note))
        folder, card, truncated = preparing.result()
        from hpsearch.data.prepare import notes
        from hpsearch.driver.run import StopRequestedError, StudyRun
        from hpsearch.integrations.optuna_dashboard import Annotator
        from hpsearch.search.study import Search

        store = stack.enter_context(_opened(spec.store, create=True))
        row = _register(store, spec, overrides, card)
        spec = _as_begun(spec, row)
        lease = stack.enter_context(leases.hold(store, row, note))
        # What another driver did while this one waited for the lease counts.
        row = _go_on(store, store.study(spec.name), spec, overrides, extend=extend, is_final=repeats is not None)
        store.fence(row["id"], lease.token)
        outbox = stack.enter_context(closing(Outbox(note)))
        search = stack.enter_context(
            closing(Search(spec, spec.store, starts=starts, lease=(row["id"], lease.token), write=outbox.put))
        )

        signals = _Signals()

        def cluster_lost() -> None:
            store.release_lease(row["id"], lease.token)
            if on_cluster_lost is not None:
                on_cluster_lost(signals.exit_code or run.stop_code)

        run = StudyRun(
            spec=spec,
            study=row,
            store=store,
            search=search,
            outbox=outbox,
            data=folder,
            owner=owner_of(store, row, lease.token),
            threads=backend.placement.cpus_per_process,
            listen=listen,
            repeats=repeats,
            on_cluster_lost=cluster_lost,
        )
        annotator = stack.enter_context(closing(Annotator(spec.store, row, search, outbox.put, note)))
        run.add_listener(annotator.hear)
        for listener in stack.enter_context(tracked(track, row, run_folder(spec.folder, row), note)):
            run.add_listener(listener)
        lease.on_loss = lambda: run.request_stop("another driver took the study over", EXIT_BUSY, grace_s=0)
        listen(_opening(spec, store, card, backend.placement.where, run))
        for text in notes(spec, card):
            note(text)
        if any(truncated.values()):
            note(f"longer than {spec.model.context_length} tokens and cut: {_counted(truncated)} examples")
        with _hearing_signals(run, signals, outbox):
            try:
                backend.run(run)
            except StopRequestedError:
                pass
            finally:
                run.interrupt_live()
            outbox.flush()
            annotator.finish()
            outbox.flush()
            run.settle()
        code = signals.exit_code or run.stop_code or _verdict(run)
        return Study(name=spec.name, store=spec.store, exit_code=code, stop_reason=run.stop_reason)


def check(spec: StudySpec, *, extend: bool = False, moves: bool = False, contacts_store: bool = True) -> dict[str, Any]:
    """What a launch would do, touching nothing: space, first settings, data, store, devices, tokens to train.

    With `contacts_store` false nothing is asked of the store, which a file from elsewhere may name. Raises the error
    that the launch would raise.
    """
    from hpsearch.data.prepare import measure, notes
    from hpsearch.search.study import first_suggestions
    from hpsearch.tasks import check_model

    store_state = Store.preflight(spec.store) if contacts_store else None
    spec = _with_its_defaults(spec) if contacts_store else spec
    existing = _existing(spec, extend=extend, moves=moves) if contacts_store else None
    _check_score(spec)
    if (model := pretrained.of(spec.model)) and spec.task == "translation":
        pretrained.load_translator(model, spec.data.source_language, spec.data.target_language)
    card, truncated = (None, {}) if spec.data.hub else measure(spec)
    if card:
        for settings in _corner_models(spec):
            check_model(spec.task, settings, card)
    suggestions = first_suggestions(spec, 3, _starts(spec))
    return {
        "schema_version": 1,
        "study": spec.model_dump(mode="json", exclude={"store"}),
        "fixed": {
            name: value
            for settings in spec.settings_for({})
            for name, value in settings.model_dump().items()
            if name not in spec.space.dimensions
        },
        "space_size": spec.space.size if spec.space.size != float("inf") else None,
        "dimensions": list(spec.space.dimensions),
        "evaluations_per_epoch": spec.evaluations_per_epoch,
        "first_settings": suggestions,
        "store": store_state,
        "resumes": existing,
        "devices": _devices(),
        "computing": _computing(spec),
        "data": card.__dict__ if card else None,
        "notes": notes(spec, card) if card else [],
        "truncated": truncated,
        "estimated_tokens": _estimated_tokens(spec, card) if card else None,
    }


def _estimated_tokens(spec: StudySpec, card: DataCard) -> int:
    """Tokens that the whole budget would train on without any pruning, from the mean epochs of 64 random settings."""
    from hpsearch.search.study import first_suggestions
    from hpsearch.spec.sections import SamplerSpec

    random = spec.model_copy(update={"sampler": SamplerSpec(name="random")})
    random._space = spec.space
    epochs = [spec.settings_for(params)[1].num_epochs for params in first_suggestions(random, 64)]
    return int(sum(epochs) / len(epochs) * spec.budget.trials * card.tokens["train"])


def _corner_models(spec: StudySpec) -> Iterator[Any]:
    """Model settings with each searched architecture, so that a misfit is found before any trial starts."""
    from hpsearch.spec.space import Choice

    first = {
        name: dimension.values[0] if isinstance(dimension, Choice) else _whole(dimension.high, dimension.integer)
        for name, dimension in spec.space.dimensions.items()
        if not dimension.when
    }
    architectures = spec.space.dimensions.get("architecture")
    for name in architectures.values if isinstance(architectures, Choice) else (None,):
        yield spec.settings_for({**first, **({"architecture": name} if name else {})})[0]


TRANSFERRED = 3
"""Settings that a study takes over from each that it starts from."""


def _starts(spec: StudySpec) -> list[dict[str, Any]]:
    """Settings to try first: `enqueue`, the priors together, the best of earlier studies. Raises UsageError."""
    starts = [*(spec.space.overlap(start) for start in spec.enqueue), spec.space.priors]
    if spec.transfer_from:
        if Store.preflight(spec.store) == "new":
            raise UsageError(f"transfer_from: the store is new, and has no study '{spec.transfer_from[0]}'")
        with _opened(spec.store) as store:
            starts += [start for name in spec.transfer_from for start in _transferred(store, name, spec)]
    return [start for index, start in enumerate(starts) if start and start not in starts[:index]]


def _transferred(store: Store, name: str, spec: StudySpec) -> list[dict[str, Any]]:
    """The best settings of an earlier study, as far as the space of this one holds them."""
    try:
        earlier = store.study(name)
    except UnknownStudyError as error:
        raise UsageError(f"transfer_from: {error}") from error
    if name == spec.name or earlier["task"] != spec.task:
        what = "this study itself" if name == spec.name else f"of another task, {earlier['task']}"
        raise UsageError(f"transfer_from: '{name}' is {what}")
    rows = list(finalists(leaderboard(store, name), TRANSFERRED))
    # What it fixed, it has found good, too.
    fixed = recorded_space(earlier["spec"]).fixed
    found = [spec.space.overlap({**fixed, **row["params"]}) for row in rows]
    if not any(found):
        why = "has no ranked trial yet" if not rows else "has found no setting that lies in this search space"
        raise UsageError(f"transfer_from: '{name}' {why}")
    return found


def _whole(value: float, integer: bool) -> float:
    return int(value) if integer else value


def _import_what_decides() -> None:
    for name in (
        "hpsearch.integrations.optuna_dashboard",
        "hpsearch.driver.run",
        "alembic.command",
    ):  # the last is for Optuna's tables
        import_module(name)


def _prepare_data(spec: StudySpec) -> tuple[Folder, DataCard, dict[str, int]]:
    from hpsearch.data.prepare import count_cut, prepare

    _check_score(spec)
    folder, card = prepare(spec)
    _check_models(spec, card, cached(folder))
    return folder, card, count_cut(spec, cached(folder))


def _check_score(spec: StudySpec) -> None:
    """Raise UsageError when the score cannot be taken here."""
    from hpsearch.metrics.bleu import metric

    if spec.task == "translation" and spec.translation.bleu_tokenizer != "auto":
        metric(spec.translation.bleu_tokenizer)


def _check_models(spec: StudySpec, card: DataCard, folder: Path) -> None:
    """Raise UsageError for models that cannot be built; what could be is noted beside the data, and not tried again.

    Trying takes seconds: torch and transformers are imported for it.
    """
    from hpsearch.tasks import check_model

    note = folder / "models-checked.txt"
    known = set(note.read_text().splitlines()) if note.is_file() else set()
    versions = f"{hpsearch.__version__} {version('transformers')}"
    for settings in _corner_models(spec):
        key = sha256(f"{versions} {spec.task} {settings.model_dump_json()}".encode()).hexdigest()
        # A pretrained model lies in a folder that may change.
        if key in known and settings.pretrained is None:
            continue
        check_model(spec.task, settings, card)
        with suppress(OSError), note.open("a") as file:
            file.write(f"{key}\n")


def _existing(spec: StudySpec, *, extend: bool = False, moves: bool = False) -> dict[str, int] | None:
    """Trials by state of the study that a launch would go on with; None when it is new. Refuses a changed study."""
    if Store.preflight(spec.store) != "current":
        _refuse_other_study(spec)
        return None
    with _opened(spec.store) as store:
        row = store.find_study(spec.name)
        if row is None:
            _refuse_other_study(spec)
            return None
        _refuse_difference(row, spec, extend=extend)
        if not moves:
            _refuse_other_folder(store, row, spec)
        return {counted["state"]: counted["trials"] for counted in store.counts(row["id"]) if not counted["is_repeat"]}


def _with_its_defaults(spec: StudySpec) -> StudySpec:
    """`_as_begun`, when the store has the study, also in tables of an older hpsearch."""
    if Store.preflight(spec.store) != "current":
        return spec
    with _opened(spec.store) as store:
        row = store.find_study(spec.name)
    return spec if row is None else _as_begun(spec, row)


def _refuse_other_study(spec: StudySpec) -> None:
    if Store.holds_other_study(spec.store, spec.name):
        raise UsageError(
            f"the database {hide_secrets(spec.store)} holds a study '{spec.name}' of Optuna's that hpsearch has not "
            "made; give this one another name with --name, or another store"
        )


def _refuse_other_folder(store: Store, row: Row, spec: StudySpec) -> None:
    """Raise UsageError when the study's files lie elsewhere: it may be somebody else's, under the same name."""
    ours, theirs = str(locate(spec.folder)), (row["placement"] or {}).get("folder")
    lease = store.lease(row["id"])
    if theirs in (None, ours) or lease is None:
        return
    raise UsageError(
        f"study '{spec.name}' is in the store already: {lease['holder']} launched it at "
        f"{lease['acquired_at']:%Y-%m-%d %H:%M} UTC, and its files lie in {theirs}, not in {ours}.\n"
        f"Give the new study a name of its own with --name. To go on with that one, give --folder {theirs} where this "
        f"machine reaches it, or --folder {spec.folder} to train its unfinished trials anew"
    )


def _refuse_difference(row: Row, spec: StudySpec, *, extend: bool) -> None:
    """Raise UsageError when the study of the store says something else, and may not be (or was not) extended."""
    old, new = {**_completed(row), "budget": {"trials": row["budget_trials"]}}, spec.record()
    new["budget"] = {"trials": spec.budget.trials}
    differences = list(_differences(old, new))
    if not differences:
        return
    changed = "\n".join(f"  {path}: {_shown(was)} -> {_shown(now)}" for path, was, now in differences)
    problems = [
        f"  {path} is not part of the space or the budget"
        for path, _, _ in differences
        if not path.startswith(("search.", "budget."))
    ]
    if spec.budget.trials < row["budget_trials"]:
        problems.append(f"  budget.trials: {spec.budget.trials} is less than the {row['budget_trials']} it has")
    problems += [f"  {problem}" for problem in narrowed(recorded_space(row["spec"]), spec.space)]
    if extend and not problems:
        return
    heading = f"study '{spec.name}' is in the store already, from a file that says something else:\n{changed}\n"
    if not problems:
        raise UsageError(f"{heading}This only widens it: give --extend to go on with it so")
    if extend:
        raise UsageError(f"{heading}--extend takes a larger budget or a wider space only:\n" + "\n".join(problems))
    raise UsageError(
        f"{heading}Undo the change to go on with it, give the new study a name of its own with --name, or put the old "
        "one aside with --restart"
    )


def _completed(row: Row) -> dict[str, Any]:
    """The record of a study with today's defaults for settings that there were none of when it was begun."""
    try:
        spec = recorded_study(row["spec"], row["placement"] or {}, DEFAULT_STORE, trials=row["budget_trials"])
    except ValueError:  # what it says is not allowed any more
        return dict(row["spec"])
    return {**spec.record(), "data": {**spec.record()["data"], "files": row["spec"]["data"].get("files")}}


def _as_begun(spec: StudySpec, row: Row) -> StudySpec:
    """The study with the optimizer that it was begun with, where its file names none.

    Of a study that an earlier hpsearch began, the store says what was the default then.
    """
    recorded = row["spec"].get("training", {})
    defaults = {
        name: recorded[name]
        for name in ("optimizer", "weight_average")
        if getattr(spec.training, name) is None and recorded.get(name) is not None
    }
    if not defaults:
        return spec
    begun = spec.model_copy(update={"training": spec.training.model_copy(update=defaults)})
    begun._space = spec.space
    return begun


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


def _shown(value: Any) -> str:
    return "(absent)" if value is None else str(value)


def _register(store: Store, spec: StudySpec, overrides: list[str], card: DataCard) -> Row:
    row = store.find_study(spec.name)
    if row is None:
        metric = RANKING_METRIC[spec.task]
        row = store.add_study(
            NewStudy(
                name=spec.name,
                task=spec.task,
                metric=metric,
                higher_is_better=HIGHER_IS_BETTER[metric],
                spec=spec.record(),
                fingerprint=spec.fingerprint,
                overrides=overrides,
                budget_trials=spec.budget.trials,
                data=card.__dict__,
                objective=spec.objective,
                placement=spec.placement(),
            )
        )
    if row["data"]["fingerprint"] != card.fingerprint:
        raise UsageError(
            f"study '{spec.name}' was begun on other text (data fingerprint {row['data']['fingerprint']}, now "
            f"{card.fingerprint}): another Python or changed files. Its scores would not compare; use a new --name"
        )
    return row


def _go_on(store: Store, row: Row, spec: StudySpec, overrides: list[str], *, extend: bool, is_final: bool) -> Row:
    """Make the study in the store the one that is launched, as far as that is allowed."""
    if not is_final:
        _refuse_difference(row, spec, extend=extend)
        if (row["fingerprint"], row["budget_trials"]) != (spec.fingerprint, spec.budget.trials):
            store.extend_study(
                row["id"], spec=spec.record(), fingerprint=spec.fingerprint, budget_trials=spec.budget.trials
            )
    store.update_study(row["id"], overrides=overrides, placement=spec.placement())
    return store.study(spec.name)


class _Signals:
    exit_code: int | None = None


@contextmanager
def _hearing_signals(run: StudyRun, seen: _Signals, outbox: Outbox) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP ask the run to stop; a second one ends the process at once, as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    codes = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM, signal.SIGHUP: EXIT_SIGHUP}
    before = {number: signal.getsignal(number) for number in codes}
    # A launch that does without its terminal (nohup) goes on when that closes.
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del codes[signal.SIGHUP]

    def stop(number: int, _: Any) -> None:
        seen.exit_code = codes[signal.Signals(number)]
        run.request_stop(f"stopped by {signal.Signals(number).name}")
        outbox.hurry()
        signal.signal(number, before[signal.Signals(number)])

    for number in codes:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in codes:
            signal.signal(number, before[number])


def _verdict(run: StudyRun) -> int:
    """0 for a study that is worth reading; 3 when too many trials failed or none can be ranked."""
    failed = run.states.get(TrialState.FAILED, 0)
    ranked = sum(run.states.get(state, 0) for state in RANKED) + len(run.scored)
    if ranked == 0 or failed > MAX_FAILED_SHARE * run.num_finished:
        return EXIT_TOO_MANY_FAILED
    return EXIT_FINISHED


def _opening(spec: StudySpec, store: Store, card: DataCard, where: str, run: StudyRun) -> Event:
    facts = {
        "name": spec.name,
        "store": store.shown_url,
        "where": where,
        "budget": run.budget,
        "finished": run.num_finished,
        "resumed": run.resumed,
        "data": card.__dict__,
    }
    return Event(kind="study", facts=facts)


def _recorded(overrides: Sequence[str], **options: Any) -> list[str]:
    """The overrides as they are kept with the study; the store's password is not."""
    given = {f"--{option}": hide_secrets(str(value)) for option, value in options.items() if value is not None}
    return [
        *(f"--set {override}" for override in overrides),
        *(f"{option} {value}" for option, value in given.items()),
    ]


def _computing(spec: StudySpec) -> dict[str, Any]:
    """What trials on this machine would compute in, by what its devices can do, and what is slow about it."""
    from hpsearch.training.devices import describe_cpu, has_bfloat16, pick_device
    from hpsearch.training.trainer import precision

    device = pick_device("cpu" if spec.resources.gpus_per_trial == 0 else "auto")
    formats = precision(spec.training, device)
    warnings = []
    if formats["model"] == "bfloat16" and not has_bfloat16(device):
        warnings.append("training.precision is bfloat16, which this device only emulates: many times slower")
    if spec.training.compile and device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        warnings.append("training.compile needs a C++ compiler, and this machine has none")
    return {"device": device.type, **formats, **describe_cpu(), "warnings": warnings}


def _devices() -> list[str]:
    from hpsearch.training.devices import gpu_names

    return [*gpu_names(), f"{os.cpu_count()} CPUs"]


def _counted(examples: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in examples.items() if count)


def _silent(event: Event) -> None:
    del event


@contextmanager
def _opened(url: str, *, create: bool = False) -> Iterator[Store]:
    store = Store(url, create=create)
    try:
        yield store
    finally:
        store.close()
