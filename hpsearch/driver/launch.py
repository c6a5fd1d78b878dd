"""Puts a launch together: data, backend, lease, store, search, and the run that they serve until it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpsearch.driver.compatibility import as_begun, existing_trials, refuse_difference, with_its_defaults
from hpsearch.driver.plan import data_reports, fitted, prepare_data
from hpsearch.driver.starts import starts_of
from hpsearch.errors import (
    EXIT_BUSY,
    EXIT_FINISHED,
    EXIT_SIGHUP,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    EXIT_TOO_MANY_FAILED,
    UsageError,
)
from hpsearch.files.layout import run_folder
from hpsearch.files.storage import locate
from hpsearch.metrics.statistics import METRICS
from hpsearch.records import RANKED, Event, Listener, Note, StudyOpened, TrialState
from hpsearch.results.study import Study
from hpsearch.spec.load import LaunchOptions
from hpsearch.spec.redaction import hide_secrets
from hpsearch.spec.study import StudySpec
from hpsearch.store import leases
from hpsearch.store.leases import owner_of
from hpsearch.store.rows import NewStudy, StudyRow
from hpsearch.store.store import Store, opened_store

if TYPE_CHECKING:
    from hpsearch.backends import Backend
    from hpsearch.data.shards import DataCard
    from hpsearch.driver.run.outbox import Outbox
    from hpsearch.driver.run.study_run import StudyRun
    from hpsearch.driver.run.trials import Repeat
    from hpsearch.integrations.optuna_dashboard import Annotator


MAX_FAILED_SHARE = 0.5
"""A study that finished with a larger share of failed trials ends in exit code 3."""


def launch_spec(
    spec: StudySpec,
    overrides: list[str],
    listen: Listener | None = None,
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
    from hpsearch.driver.run.outbox import Outbox
    from hpsearch.integrations.trackers import check_trackers, tracked

    listen = listen or _silent

    def note(text: str) -> None:
        listen(Note(text=text))

    spec = with_its_defaults(spec)
    existing_trials(spec, extend=extend, moves=moves)
    check_trackers(track, locate(spec.folder))
    starts = [] if repeats is not None else starts_of(spec)
    with ThreadPoolExecutor(1) as helper, ExitStack() as stack:
        # Ray needs seconds to start; the text is read and tokenized meanwhile, and what decides is imported.
        stopped = threading.Event()
        stack.callback(stopped.set)
        preparing = helper.submit(prepare_data, spec, data_reports(listen, stopped))
        helper.submit(_import_what_decides)
        backend = stack.enter_context(open_backend(spec, note))
        folder, card, long = preparing.result()
        spec = fitted(spec, card)
        from hpsearch.data.prepare import notes
        from hpsearch.driver.run.study_run import StudyRun
        from hpsearch.integrations.optuna_dashboard import Annotator
        from hpsearch.search.study import Search

        store = stack.enter_context(opened_store(spec.store, create=True))
        row = _register(store, spec, overrides, card)
        spec = as_begun(spec, row)
        lease = stack.enter_context(leases.hold(store, row, note))
        # What another driver did while this one waited for the lease counts.
        row = _update(store, store.study(spec.name), spec, overrides, extend=extend, is_final=repeats is not None)
        store.fence(row.id, lease.token)
        outbox = stack.enter_context(closing(Outbox(note)))
        search = stack.enter_context(
            closing(Search(spec, spec.store, starts=starts, lease=(row.id, lease.token), write=outbox.put))
        )

        signals = _Signals()

        def cluster_lost() -> None:
            store.release_lease(row.id, lease.token)
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
        if said := str(long):
            note(said)
        with _hearing_signals(run, signals, outbox):
            _drive(backend, run, outbox, annotator)
        code = signals.exit_code or run.stop_code or _verdict(run)
        return Study(name=spec.name, store=spec.store, exit_code=code, stop_reason=run.stop_reason)


def _drive(backend: Backend, run: StudyRun, outbox: Outbox, annotator: Annotator) -> None:
    """Run the study to its end, and have everything written."""
    from hpsearch.driver.run.study_run import StopRequestedError

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


def _import_what_decides() -> None:
    for name in (
        "hpsearch.integrations.optuna_dashboard",
        "hpsearch.driver.run.study_run",
        "alembic.command",
    ):  # the last is for Optuna's tables
        import_module(name)


def _register(store: Store, spec: StudySpec, overrides: list[str], card: DataCard) -> StudyRow:
    row = store.find_study(spec.name)
    if row is None:
        metric = spec.ranking_metric
        row = store.add_study(
            NewStudy(
                name=spec.name,
                task=spec.task,
                metric=metric,
                higher_is_better=METRICS[metric].higher_is_better,
                spec=spec.record(),
                fingerprint=spec.fingerprint,
                overrides=overrides,
                budget_trials=spec.budget.trials,
                data=card.__dict__,
                objective=spec.objective,
                placement=spec.placement(),
            )
        )
    if row.data["fingerprint"] != card.fingerprint:
        raise UsageError(
            f"study '{spec.name}' was begun on other text (data fingerprint {row.data['fingerprint']}, now "
            f"{card.fingerprint}): changed files, another Python, or an hpsearch that prepares them otherwise. Its "
            "scores would not compare; use a new --name"
        )
    return row


def _update(
    store: Store, row: StudyRow, spec: StudySpec, overrides: list[str], *, extend: bool, is_final: bool
) -> StudyRow:
    """Make the study in the store the one that is launched, as far as that is allowed."""
    if not is_final:
        refuse_difference(row, spec, extend=extend)
        if (row.fingerprint, row.budget_trials) != (spec.fingerprint, spec.budget.trials):
            store.extend_study(
                row.id, spec=spec.record(), fingerprint=spec.fingerprint, budget_trials=spec.budget.trials
            )
    store.update_study(row.id, overrides=overrides, placement=spec.placement())
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
    # A launch without a terminal (nohup) continues when that closes.
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


def _opening(spec: StudySpec, store: Store, card: DataCard, where: str, run: StudyRun) -> StudyOpened:
    return StudyOpened(
        name=spec.name,
        store=store.shown_url,
        where=where,
        budget=run.budget,
        finished=run.num_finished,
        resumed=run.resumed,
        data=card.__dict__,
    )


def recorded_options(options: LaunchOptions) -> list[str]:
    """The options of a launch as they are kept with the study; the store's password is not."""
    given = {name: options.get(name) for name in LaunchOptions.__annotations__ if name != "overrides"}
    return [
        *(f"--set {override}" for override in options.get("overrides") or ()),
        *(f"--{name} {hide_secrets(str(value))}" for name, value in given.items() if value is not None),
    ]


def _silent(event: Event) -> None:
    del event
