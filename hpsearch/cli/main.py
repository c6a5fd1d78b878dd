"""The `hpsearch` command: parse, call one function, print. Data goes to stdout, progress and errors to stderr."""

from __future__ import annotations

import csv
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from gc import set_threshold
from typing import IO, Any, TypeVar

import click

from hpsearch.errors import (
    EXIT_BUG,
    EXIT_CLUSTER,
    EXIT_FOUND,
    EXIT_IO,
    EXIT_SIGINT,
    HpsearchError,
    plain,
)
from hpsearch.spec.redaction import has_secret, hide_secrets
from hpsearch.spec.settings import MOST

Command = TypeVar("Command", bound=Callable[..., Any])
_TRIAL = click.IntRange(0, MOST)
_COUNT = click.IntRange(1, MOST)

EXIT_CODES = """\b
Exit codes:
  0  finished
  1  doctor found something that it did not mend
  2  the command, the study file or the data cannot be used as given
  3  finished, but no trial can be ranked or more than half of them failed
  4  another driver holds the study
  69 the store cannot be reached, read or written
  70 a bug of hpsearch
  74 files of the run cannot be written
  75 Ray could not be started or was lost; launch again to go on
  129, 130, 143 stopped by SIGHUP, SIGINT or SIGTERM; launch again to go on"""


class _Group(click.Group):
    """Turns every error into one message and the exit code that it is documented to have."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self._main(*args, **kwargs)
        except SystemExit as end:
            if "pyarrow" in sys.modules:
                _leave(end.code)
            raise

    def _main(self, *args: Any, **kwargs: Any) -> Any:
        _open_closed_streams()
        _take_passwords_off_the_command_line()
        set_threshold(50_000)  # rows by the thousand are made and kept: to look through them again and again is slow
        kwargs["standalone_mode"] = False
        _take_debug_from_anywhere()
        debug = bool(os.environ.get("HPSEARCH_DEBUG"))
        try:
            code = super().main(*args, **kwargs)
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
            sys.exit(EXIT_SIGINT)
        except BrokenPipeError:
            # The reader of our output has gone (`| head`); nothing is wrong.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except HpsearchError as error:
            if debug:
                traceback.print_exc()
            print(f"Error: {_shown(str(error))}", file=sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:
            if debug:
                traceback.print_exc()
            print(f"Error: {error.strerror}: {error.filename or ''}", file=sys.stderr)
            sys.exit(EXIT_IO)
        except Exception as error:
            if debug:
                traceback.print_exc()
            print(
                f"Error: {type(error).__name__}: {_shown(str(error))}\n"
                "This is a bug of hpsearch; run the command again with --debug to see where.",
                file=sys.stderr,
            )
            sys.exit(EXIT_BUG)
        sys.exit(code if isinstance(code, int) else 0)


def _leave(code: Any) -> None:
    """End the process without taking Python apart: threads of pyarrow that still read would abort it (arrow#45214)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def _take_debug_from_anywhere() -> None:
    """`--debug` works before a command and after it, and stays in force when the process begins anew."""
    if "--debug" in sys.argv[1:]:
        os.environ["HPSEARCH_DEBUG"] = "1"
        sys.argv = [sys.argv[0], *(argument for argument in sys.argv[1:] if argument != "--debug")]


def _open_closed_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) silent ones: others would take their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


class _LossyStream:
    """A stream whose writes may fail: the reader has gone, or the disk is full. From then on it is silent."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, self._stream.fileno())  # what is buffered goes there when the process ends
        os.close(silent)


@contextmanager
def _output_may_fail() -> Iterator[None]:
    """A study goes on whatever becomes of its output."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _LossyStream(sys.stdout), _LossyStream(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _shown(message: str) -> str:
    """A message as it may be printed, whatever names it quotes."""
    return "\n".join(plain(line) for line in hide_secrets(message).split("\n"))


_GIVEN_STORE = "HPSEARCH_GIVEN_STORE"
"""The store's URL without its password, when it was given on the command line and taken off it."""


def _take_passwords_off_the_command_line() -> None:
    """Become a process whose command line holds no password, because `ps` shows it to everybody.

    The URL of --store goes on in HPSEARCH_STORE, which only the user's own processes can read.
    """
    rest: list[str] = []
    store = None
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--store" and not equals:
            value = next(arguments, "")
        elif name == "--set" and not equals:
            value = next(arguments, "")
            argument, (key, _, value) = f"--set={value}", value.partition("=")
            name = "--store" if key.strip() == "store" else name
        elif name == "--set" and value.startswith("store="):
            name, value = "--store", value.removeprefix("store=")
        if name == "--store" and has_secret(value):
            store = value
        else:
            rest += [f"--store={value}"] if name == "--store" else [argument]
    if store is None:
        return
    os.environ |= {"HPSEARCH_STORE": store, _GIVEN_STORE: hide_secrets(store)}
    os.execv(sys.executable, [sys.executable, "-m", "hpsearch", *rest])


def _store_option(command: Command) -> Command:
    return click.option("--store", metavar="URL", help="The study store [HPSEARCH_STORE, sqlite:///hpsearch.db].")(
        command
    )


def _json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def _study_options(command: Command) -> Command:
    for option in (
        click.option("--backend", type=click.Choice(["ray", "inline"]), help="What runs the trials."),
        click.option(
            "--address", metavar="HOST:PORT", help="The Ray to join, or auto; local starts one [RAY_ADDRESS]."
        ),
        click.option(
            "--folder",
            metavar="PATH",
            help="Folder (or s3://...) of checkpoints and data [HPSEARCH_FOLDER].",
        ),
        click.option("--store", metavar="URL", help="The study store, over HPSEARCH_STORE and the file's."),
        click.option("--name", help="Another name for the study."),
        click.option("--trials", type=_COUNT, help="Another number of trials."),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key, such as search.num_layers.max=4.",
        ),
        click.argument("study_file", metavar="STUDY"),
    ):
        command = option(command)
    return command


@click.group(
    cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="hpsearch")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Find the hyperparameters of a language model: Optuna decides, Ray Tune runs, SQL remembers.

    Write a study file, then: hpsearch check STUDY; hpsearch launch STUDY; hpsearch rank NAME.
    """


def _track_option(command: Command) -> Command:
    return click.option(
        "--track",
        multiple=True,
        type=click.Choice(["tensorboard", "mlflow", "wandb"]),
        help="Copy curves and results live to this tool, too; each is an extra.",
    )(command)


@main.command()
@_study_options
@click.option("--dry-run", is_flag=True, help="Only say what would be done, as `check`.")
@click.option("--extend", is_flag=True, help="Accept a larger budget or a wider space than the study has.")
@click.option("--restart", is_flag=True, help="Put the study of this name aside, under another name, and begin anew.")
@click.option("--yes", is_flag=True, help="Do not ask before --restart.")
@_track_option
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print every event as a line of JSON.")
@click.option("--top", type=_COUNT, default=20, show_default=True, help="Rows of the leaderboard at the end.")
def launch(
    study_file: str,
    dry_run: bool,
    extend: bool,
    restart: bool,
    yes: bool,
    quiet: bool,
    as_json: bool,
    top: int,
    track: tuple[str, ...],
    **options: Any,
) -> int:
    """Run a study to the end of its budget, or go on with one that was stopped.

    Ends with the leaderboard. Ctrl-C lets the running trials write a checkpoint; the same command goes on from there.
    """
    if dry_run:
        return _check(study_file, as_json, options, extend=extend)
    from hpsearch import api
    from hpsearch.cli import terminal

    if restart and not os.environ.get(_RESTARTS):
        _put_aside(study_file, options, yes)
    with _output_may_fail():
        with terminal.progress(_console(stderr=True), quiet=quiet or as_json) as listen:
            study = api.launch(
                study_file,
                **options,
                extend=extend,
                track=track,
                listen=terminal.json_lines(sys.stdout) if as_json else listen,
                on_cluster_lost=_start_over,
            )
        _finish(study, as_json=as_json, quiet=quiet, top=top)
    return study.exit_code


_RESTARTS = "HPSEARCH_CLUSTER_RESTARTS"
MAX_RESTARTS = 3
"""Times that a launch begins anew by itself after Ray was lost."""


def _start_over(stopped_with: int | None) -> None:
    """Become a new process with the same command: what is left of a lost Ray would end this one.

    A launch that was asked to stop ends here, with its exit code: a signal to all its processes ends Ray, too.
    """
    if stopped_with is not None:
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        print(f"{show_cursor}stopped. To go on:\n  {_command_again()}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(stopped_with)
    restarts = int(os.environ.get(_RESTARTS, 0)) + 1
    if restarts > MAX_RESTARTS:
        print(f"Error: Ray was lost {restarts} times; launch again to go on", file=sys.stderr, flush=True)
        os._exit(EXIT_CLUSTER)
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    print(f"{show_cursor}Ray was lost; starting it anew ({restarts} of {MAX_RESTARTS})", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.environ[_RESTARTS] = str(restarts)
    os.execv(sys.executable, [sys.executable, "-m", "hpsearch", *sys.argv[1:]])


def _put_aside(study_file: str, options: dict[str, Any], yes: bool) -> None:
    """Archive the study that has the name, once the person has said so."""
    from hpsearch import api
    from hpsearch.spec.load import load_study

    spec = load_study(study_file, **options)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("--restart asks before it puts a study aside; give --yes where nobody can answer")
        click.confirm(f"Put the study '{spec.name}' aside and begin anew? Nothing is deleted.", abort=True, err=True)
    archived = api.archive(spec.name, store=spec.store)
    if archived:
        print(f"the old study is kept as '{archived}'", file=sys.stderr)


def _finish(study: Any, *, as_json: bool, quiet: bool, top: int) -> None:
    """What stands at the end of a launch: the leaderboard, and how to go on."""
    from hpsearch.cli import terminal

    board = study.board(top=top)
    if as_json:
        print(terminal.to_json({"event": "leaderboard", **board.to_json()}).replace("\n", ""))
    else:
        _print_board(board)
    if study.stop_reason and not quiet:
        print(f"\n{study.stop_reason}. To go on:\n  {_command_again()}", file=sys.stderr)
    elif study.exit_code and not quiet:
        print("\nMost trials failed, or none can be ranked: see `hpsearch show STUDY TRIAL`.", file=sys.stderr)


def _cluster_option(command: Command) -> Command:
    return click.option(
        "--address", metavar="URL", help="The cluster [RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265]."
    )(command)


@main.command()
@_cluster_option
@click.option("--job-id", help="Name of the job [study and time].")
@click.option("--detach", is_flag=True, help="Do not wait for the end.")
@click.option("--extend", is_flag=True, help="Accept a larger budget or a wider space than the study has.")
@_track_option
@click.option("--folder", metavar="PATH", help="Folder (or s3://...) of checkpoints and data that all nodes reach.")
@click.option("--store", metavar="URL", help="The study store, as the cluster reaches it.")
@click.option("--name", help="Another name for the study.")
@click.option("--trials", type=_COUNT, help="Another number of trials.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.argument("study_file", metavar="STUDY")
def submit(study_file: str, address: str | None, detach: bool, **options: Any) -> int:
    """Launch a study on a Ray cluster, as a job; prints its log until it ends, and ends in its exit code.

    The study file and the local data that it names go with it. A token for the cluster is read from RAY_AUTH_TOKEN.
    """
    from hpsearch import api

    job_id = api.submit(study_file, address=address, **options)
    given = f" --address {address}" if address else ""
    print(f"job {job_id}: hpsearch logs {job_id} --follow{given}; hpsearch stop {job_id}{given}", file=sys.stderr)
    return 0 if detach else _follow(job_id, address)


def _follow(job_id: str, address: str | None) -> int:
    from hpsearch.backends.ray import jobs as ray_jobs

    cluster = ray_jobs.Cluster(address)
    for piece in cluster.follow(job_id):
        print(ray_jobs.plain_log(piece), end="", flush=True)
    job = cluster.wait(job_id)
    if job.status != "SUCCEEDED":
        print(f"job {job_id} is {job.status}: {_shown(job.message.partition(',')[0])}", file=sys.stderr)
    return ray_jobs.exit_code(job)


@main.command()
@_cluster_option
@_json_option
def jobs(address: str | None, as_json: bool) -> None:
    """List the jobs of a Ray cluster."""
    from hpsearch.backends.ray.jobs import Cluster
    from hpsearch.cli import terminal

    found = Cluster(address).jobs()
    if as_json:
        print(terminal.to_json({"schema_version": 1, "jobs": [job.__dict__ for job in found]}))
    else:
        _console().print(terminal.jobs_table(found) if found else "no jobs yet")


@main.command()
@click.argument("name", metavar="JOB|STUDY")
@click.argument("trial", required=False, type=_TRIAL)
@_cluster_option
@_store_option
@click.option("--follow", "-f", is_flag=True, help="Go on until it ends; of a job, end in its exit code.")
@_json_option
def logs(name: str, trial: int | None, address: str | None, store: str | None, follow: bool, as_json: bool) -> int:
    """Print the log of a job, or of one trial of a study."""
    if trial is not None:
        from hpsearch import api
        from hpsearch.cli import terminal

        for line in api.logs(name, trial, store=store, follow=follow):
            print(json.dumps(line) if as_json else terminal.log_line(line), flush=True)
        return 0
    from hpsearch.backends.ray import jobs as ray_jobs

    if as_json:
        raise click.UsageError("the log of a job is plain text; --json is for that of a trial")
    if follow:
        return _follow(name, address)
    print(ray_jobs.plain_log(ray_jobs.Cluster(address).log(name)), end="")
    return 0


@main.command()
@click.argument("job_id", metavar="JOB")
@_cluster_option
def stop(job_id: str, address: str | None) -> None:
    """Stop a job. Its trials write a checkpoint first, and the next launch of the study goes on with them."""
    from hpsearch.backends.ray.jobs import Cluster

    job = Cluster(address).stop(job_id)
    ended = job.status not in ("PENDING", "RUNNING")
    print(f"job {job_id} has ended already: {job.status}" if ended else f"job {job_id} was asked to stop")


@main.command()
@click.argument("name", metavar="STUDY|JOB")
@_cluster_option
@_store_option
@_json_option
def status(name: str, address: str | None, store: str | None, as_json: bool) -> None:
    """Say how far a study is, by its name or by the job that launches it; read from the store."""
    from hpsearch import api
    from hpsearch.cli import terminal
    from hpsearch.errors import StoreError, UnknownStudyError

    try:
        found = api.status(name, store=store)
    except (UnknownStudyError, StoreError):
        if address is None and "RAY_API_SERVER_ADDRESS" not in os.environ:
            raise
        from hpsearch.backends.ray.jobs import Cluster

        job = Cluster(address).job(name)
        if not job.study:
            raise click.UsageError(f"job {name} was not submitted by hpsearch: give the study's name") from None
        found = {**api.status(job.study, store=store), "job": job.__dict__}
    if as_json:
        print(terminal.to_json(found))
        return
    if "job" in found:
        print(f"job     {plain(name)}: {found['job']['status']}")
    print(terminal.status_report(found))


@main.command()
@click.argument("study")
@_store_option
def watch(study: str, store: str | None) -> None:
    """Look on while a study runs, on any machine that reaches its store; ends when it is finished."""
    from hpsearch import api
    from hpsearch.cli import terminal

    terminal.watch_study(api.watch(study, store=store), _console())


@main.command("export-data")
@click.argument("study")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["csv", "parquet", "json"]),
    default="csv",
    show_default=True,
    help="Of the files.",
)
@click.option("--output", "-o", type=click.Path(file_okay=False), help="Folder to write [STUDY-data].")
@_store_option
def export_data(study: str, format_: str, output: str | None, store: str | None) -> None:
    """Write trials, curves and scores of a study as tables for other tools."""
    from hpsearch import api

    for file in api.export_data(study, output or f"{study}-data", format=format_, store=store):
        print(f"wrote {file}", file=sys.stderr)


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--allow-name", "names", multiple=True, metavar="NAME", help="Another host name that browsers use for it."
)
@click.option("--write", "may_write", is_flag=True, help="Let people change and delete studies.")
@_store_option
def dashboard(host: str, port: int, names: tuple[str, ...], may_write: bool, store: str | None) -> None:
    """Serve live pages of all studies, and the Optuna dashboard beside them, read-only, until stopped.

    The token that people have to give is read from HPSEARCH_DASHBOARD_TOKEN; an address that other machines reach needs
    one. A browser gives it once, as /?token=TOKEN.
    """
    from hpsearch.api import store_url
    from hpsearch.server.app import TOKEN_VARIABLE, open_dashboard

    token = os.environ.get(TOKEN_VARIABLE) or None
    url = store_url(store)
    with open_dashboard(url, host=host, port=port, token=token, may_write=may_write, names=names) as server:
        asks = "?token=..." if token else ""
        print(f"http://{host}:{server.server_port}/{asks} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        server.serve_forever()


@main.command()
@_study_options
@_json_option
def check(study_file: str, as_json: bool, **options: Any) -> int:
    """Validate a study file and say what a launch would do; touches nothing."""
    return _check(study_file, as_json, options)


@main.command()
def schema() -> None:
    """Print the JSON schema of study files, for editors."""
    from hpsearch.spec.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@main.command()
@_store_option
@_json_option
def studies(store: str | None, as_json: bool) -> None:
    """List the studies of a store."""
    from hpsearch import api
    from hpsearch.cli import terminal

    rows = api.studies(store=store)
    if as_json:
        print(terminal.to_json({"schema_version": 1, "studies": rows}))
    else:
        _console().print(terminal.studies_table(rows) if rows else "no studies yet")


@main.command()
@click.argument("study")
@click.option("--top", type=_COUNT, default=5, show_default=True, help="Settings to run again.")
@click.option("--seeds", type=_COUNT, default=3, show_default=True, help="New seeds for each.")
@_store_option
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print every event as a line of JSON.")
def finals(study: str, top: int, seeds: int, store: str | None, quiet: bool, as_json: bool) -> int:
    """Run the best settings of a study again with new seeds, to see what was luck.

    The repeats are trials of their own that the sampler is not told of. Repeats that are done are not run again.
    """
    from hpsearch import api
    from hpsearch.cli import terminal

    with _output_may_fail():
        with terminal.progress(_console(stderr=True), quiet=quiet or as_json) as listen:
            found = api.finals(
                study,
                top=top,
                seeds=seeds,
                store=store,
                listen=terminal.json_lines(sys.stdout) if as_json else listen,
            )
        _finish(found, as_json=as_json, quiet=quiet, top=20)
    return found.exit_code


@main.command()
@click.argument("study")
@click.argument("first", type=_TRIAL)
@click.argument("second", type=_TRIAL)
@_store_option
@_json_option
def compare(study: str, first: int, second: int, store: str | None, as_json: bool) -> None:
    """Test whether two trials of a study differ: a paired bootstrap over test examples."""
    from hpsearch import api
    from hpsearch.cli import terminal

    found = api.open_study(study, store=store).compare(first, second)
    if as_json:
        print(terminal.to_json(found))
    else:
        _console().print(terminal.comparison_table(found))


@main.command()
@click.argument("studies", nargs=-1, required=True, metavar="STUDY...")
@_store_option
@click.option("--top", type=_COUNT, help="Only the best so many.")
@click.option("--mixed", is_flag=True, help="Rank scores together that are no like for like.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@_json_option
def rank(
    studies: tuple[str, ...],
    store: str | None,
    top: int | None,
    mixed: bool,
    as_csv: bool,
    markdown: bool,
    as_json: bool,
) -> None:
    """Rank the trials of a study, or of several together, by their test score.

    1= cannot be told from the winner. Scores that cannot be compared are refused, unless --mixed; perplexities of
    different tokenizers are ranked in bits per byte.
    """
    from hpsearch import api
    from hpsearch.cli import terminal
    from hpsearch.reports import text as wording
    from hpsearch.results.leaderboard import flat_rows

    if as_csv + markdown + as_json > 1:
        raise click.UsageError("give one of --csv, --markdown and --json")
    board = api.open_study(studies[0], store=store).board(*studies[1:], top=top, mixed=mixed)
    if as_json:
        print(terminal.to_json(board.to_json()))
    elif markdown:
        print(wording.leaderboard_markdown(board))
    elif as_csv:
        from hpsearch.results.export import spreadsheet_text

        rows = flat_rows(board)
        writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else ["test_rank", "trial"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: spreadsheet_text(value) for name, value in row.items()} for row in rows)
    else:
        _print_board(board)


@main.command()
@click.argument("study")
@click.argument("trial", type=_TRIAL)
@_store_option
@_json_option
def show(study: str, trial: int, store: str | None, as_json: bool) -> None:
    """Show one trial: settings, curve, verdict with its evidence, test score."""
    from hpsearch import api
    from hpsearch.cli import terminal

    row = api.open_study(study, store=store).trial(trial)
    if as_json:
        print(terminal.to_json({"schema_version": 1, "study": study, **row}))
    else:
        console = _console()
        console.print(terminal.trial_report(row, console.width))


@main.command()
@click.argument("studies", nargs=-1, required=True, metavar="STUDY...")
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="File to write [STUDY.html]; - prints it.")
@click.option("--page", metavar="PAGE", help="Another list of figures: a name of dashboards/, or a YAML file.")
@_store_option
def report(studies: tuple[str, ...], output: str | None, page: str | None, store: str | None) -> None:
    """Write a page of figures of a study, or of several side by side: one HTML file that works offline.

    Curves of training against validation loss, leaderboard, search progress, importances, cost, and what the task has.
    """
    from hpsearch import api
    from hpsearch.errors import RunFolderError

    content = api.report(*studies, store=store, page=page)
    if output == "-":
        print(content)
        return
    file = output or f"{'-'.join(studies)}.html"
    try:
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(content)
    except OSError as error:
        raise RunFolderError(f"cannot write {file}: {error.strerror}") from error
    print(f"wrote {file} ({len(content) / 1e6:.1f} MB)", file=sys.stderr)


def _by_option(command: Command) -> Command:
    return click.option(
        "--by",
        type=click.Choice(["test", "validation"]),
        default="test",
        show_default=True,
        help="What the winner is chosen by.",
    )(command)


@main.command()
@click.argument("study")
@_by_option
@_store_option
@_json_option
def best(study: str, by: Any, store: str | None, as_json: bool) -> int:
    """Print the winner: its settings, score and checkpoint.

    While no trial has a test score, the one that leads on validation.
    """
    from hpsearch import api
    from hpsearch.cli import terminal
    from hpsearch.reports import text as wording

    opened = api.open_study(study, store=store)
    board = opened.board(top=1)
    chosen = board.chosen(by)
    if chosen is None:
        raise click.UsageError(wording.leaderboard_notes(board)[0])
    for note in wording.choice_notes(board, by):
        print(note, file=sys.stderr)
    if as_json:
        print(terminal.to_json({"schema_version": 1, "study": study, "by": by, **chosen}))
    else:
        console = _console()
        console.print(terminal.trial_report(opened.trial(chosen["trial"]), console.width))
    return 0


@main.command()
@click.argument("study")
@click.argument("trial", type=_TRIAL, required=False)
@_by_option
@click.option("--output", "-o", type=click.Path(file_okay=False), help="Folder to write [STUDY-trial-N].")
@_store_option
def export(study: str, trial: int | None, by: Any, output: str | None, store: str | None) -> None:
    """Copy the model of a trial, the winner by default, to a folder that transformers loads.

    A trial that has not ended gives its best checkpoint so far.
    """
    from hpsearch import api
    from hpsearch.reports import text as wording

    if trial is None:
        for note in wording.choice_notes(api.open_study(study, store=store).board(top=1), by):
            print(note, file=sys.stderr)
    print(f"wrote {plain(api.export_model(study, trial, folder=output, by=by, store=store))}", file=sys.stderr)


@main.command()
@click.argument("study")
@click.option("--keep", type=_COUNT, help="Ranked trials whose checkpoint stays [as the study says].")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@_store_option
@_json_option
def gc(study: str, keep: int | None, dry_run: bool, store: str | None, as_json: bool) -> None:
    """Remove the checkpoints of a study that are not among the best, and files that belong to no trial.

    A running study does this by itself. What a trial that has not ended needs to go on is never removed.
    """
    from hpsearch import api
    from hpsearch.cli import terminal

    garbage = api.collect(study, keep=keep, dry_run=dry_run, store=store)
    if as_json:
        pieces = [{"folder": str(piece.folder), "why": piece.why, "bytes": piece.size} for piece in garbage]
        print(terminal.to_json({"schema_version": 1, "study": study, "dry_run": dry_run, "removed": pieces}))
        return
    for piece in garbage:
        print(f"{plain(piece.folder)}  {piece.size / 1e6:,.1f} MB  {piece.why}")
    verb = "would be removed" if dry_run else "removed"
    print(f"{len(garbage)} folders, {sum(piece.size for piece in garbage) / 1e6:,.1f} MB {verb}")


@main.command()
@click.argument("study")
@click.argument("trials", type=_TRIAL, nargs=-1, metavar="[TRIAL]...")
@_store_option
def retry(study: str, trials: tuple[int, ...], store: str | None) -> None:
    """Put failed trials, all by default, back into the queue: the next launch trains them again."""
    from hpsearch import api

    numbers = api.retry(study, *trials, store=store)
    put_back = (
        f"put back: {', '.join(map(str, numbers))}; launch the study to run them" if numbers else "none has failed"
    )
    print(put_back, file=sys.stderr)


@main.command()
@click.argument("study", required=False)
@click.option("--repair", is_flag=True, help="Mend what can be mended without a guess.")
@_store_option
@_json_option
def doctor(study: str | None, repair: bool, store: str | None, as_json: bool) -> int:
    """Check that a store is whole: states, curves, ranking, files, leases, and what Optuna's tables say.

    Looks at every study, or at one. Ends in 0 when there is nothing to say or everything was mended, else in 1.
    """
    from hpsearch import api
    from hpsearch.cli import terminal

    findings = api.doctor(study, repair=repair, store=store)
    if as_json:
        print(terminal.to_json({"schema_version": 1, "findings": [finding.__dict__ for finding in findings]}))
    else:
        for finding in findings:
            whose = finding.study + ("" if finding.trial is None else f", trial {finding.trial}")
            print(plain(f"{whose}: {finding.problem}"))
            print(plain(f"    {'mended' if finding.repaired else 'remedy'}: {finding.remedy}"))
        mendable = sum(finding.can_repair and not finding.repaired for finding in findings)
        if not findings:
            print("nothing is wrong")
        elif mendable:
            print(f"{mendable} of {len(findings)} can be mended with --repair")
    return 0 if all(finding.repaired for finding in findings) else EXIT_FOUND


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell completion script, for `eval "$(hpsearch completion bash)"`."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    print(found(main, {}, "hpsearch", "_HPSEARCH_COMPLETE").source())


def _check(study_file: str, as_json: bool, options: dict[str, Any], *, extend: bool = False) -> int:
    from hpsearch import api
    from hpsearch.cli import terminal
    from hpsearch.spec.environment import environment_store
    from hpsearch.spec.load import load_study

    spec = load_study(study_file, **options)
    # A server that the file alone names is not asked: libpq would give it the passwords of PGPASSWORD and ~/.pgpass.
    is_own = bool(options["store"] or environment_store() or spec.store.startswith("sqlite"))
    found = api.check(spec, extend=extend, moves=options["folder"] is not None, contacts_store=is_own)
    print(terminal.to_json(found) if as_json else terminal.check_report(found))
    return 0


def _print_board(board: Any) -> None:
    from hpsearch.cli import terminal
    from hpsearch.reports import text as wording

    console = _console()
    if board.rows:
        console.print(terminal.leaderboard_table(board, console.width))
    for line in wording.leaderboard_notes(board):
        console.print(line, style="dim", markup=False, highlight=False)
    if board.finals:
        console.print()
        console.print(terminal.finals_table(board.finals))
        console.print(terminal.finals_note(board.finals), style="dim", markup=False, highlight=False)


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    # A table that is piped keeps its columns; nothing is folded for want of a terminal's width.
    stream = sys.stderr if stderr else sys.stdout
    # What a study holds is text: nothing in it is markup or the name of an emoji.
    width = None if stream.isatty() else 160
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def _command_again() -> str:
    import shlex

    given = [f"--store={os.environ[_GIVEN_STORE]}"] if _GIVEN_STORE in os.environ else []
    return hide_secrets(shlex.join(["hpsearch", *sys.argv[1:], *given]))
