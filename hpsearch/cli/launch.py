"""Commands that run trials, and what they say first: check, launch, finals."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from hpsearch.cli.options import COUNT, json_option, open_console, store_option, study_options, track_option
from hpsearch.cli.process import command_again, output_may_fail
from hpsearch.cli.results import print_board
from hpsearch.errors import (
    EXIT_CLUSTER,
)


@click.command()
@study_options
@click.option("--dry-run", is_flag=True, help="Only say what would be done, as `check`.")
@click.option("--extend", is_flag=True, help="Accept a larger budget or a wider space than the study has.")
@click.option("--restart", is_flag=True, help="Archive the study of this name under another name, and start a new one.")
@click.option("--yes", is_flag=True, help="Do not ask before --restart.")
@track_option
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print every event as a line of JSON.")
@click.option("--top", type=COUNT, default=20, show_default=True, help="Rows of the leaderboard at the end.")
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
    """Run a study to the end of its budget, or resume one that was stopped.

    Ends with the leaderboard. Ctrl-C lets the running trials write a checkpoint; the same command resumes from there.
    """
    if dry_run:
        return _check(study_file, as_json, options, extend=extend)
    from hpsearch import api
    from hpsearch.cli import live

    if restart and not os.environ.get(_RESTARTS):
        _put_aside(study_file, options, yes)
    with output_may_fail():
        with live.progress(open_console(stderr=True), quiet=quiet or as_json) as listen:
            study = api.launch(
                study_file,
                **options,
                extend=extend,
                track=track,
                listen=live.json_lines(sys.stdout) if as_json else listen,
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
        print(f"{show_cursor}stopped. To resume:\n  {command_again()}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(stopped_with)
    restarts = int(os.environ.get(_RESTARTS, 0)) + 1
    if restarts > MAX_RESTARTS:
        print(f"Error: Ray was lost {restarts} times; launch again to resume", file=sys.stderr, flush=True)
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
            raise click.UsageError("--restart asks before it archives a study; give --yes where nobody can answer")
        click.confirm(f"Archive the study '{spec.name}' and start a new one? Nothing is deleted.", abort=True, err=True)
    archived = api.archive(spec.name, store=spec.store)
    if archived:
        print(f"the old study is kept as '{archived}'", file=sys.stderr)


def _finish(study: Any, *, as_json: bool, quiet: bool, top: int) -> None:
    """Print the end of a launch: the leaderboard, and the command that resumes it."""
    from hpsearch.cli import output

    board = study.board(top=top)
    if as_json:
        print(output.to_json({"event": "leaderboard", **board.to_json()}).replace("\n", ""))
    else:
        print_board(board)
    if study.stop_reason and not quiet:
        print(f"\n{study.stop_reason}. To resume:\n  {command_again()}", file=sys.stderr)
    elif study.exit_code and not quiet:
        print("\nMost trials failed, or none can be ranked: see `hpsearch show STUDY TRIAL`.", file=sys.stderr)


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("-o", "--output", default="study.yaml", show_default=True, help="The study file to write.")
@click.option("--task", help="What to train, where the data does not tell.")
@click.option("--pretrained", help="A model to fine-tune: a folder, or a name on the hub.")
@json_option
def init(files: tuple[str, ...], output: str, task: str | None, pretrained: str | None, as_json: bool) -> int:
    """Look at FILES of text and write a first study file for them; asks nothing, overwrites nothing."""
    from hpsearch import api
    from hpsearch.cli import output as printed

    made = api.init(files, output=output, task=task, pretrained=pretrained)
    if as_json:
        print(printed.to_json(made))
        return 0
    for note in made.notes:
        print(note)
    print(f"\nwrote {made.path}. Next:\n  hpsearch check {made.path}\n  hpsearch launch {made.path}")
    return 0


@click.command()
@study_options
@click.option("--full", is_flag=True, help="Read all of a large corpus, where a part is enough for an estimate.")
@json_option
def check(study_file: str, as_json: bool, full: bool, **options: Any) -> int:
    """Validate a study file and say what a launch would do; touches nothing."""
    return _check(study_file, as_json, options, full=full)


@click.command()
@click.argument("study")
@click.option("--top", type=COUNT, default=5, show_default=True, help="Settings to run again.")
@click.option("--seeds", type=COUNT, default=3, show_default=True, help="New seeds for each.")
@store_option
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print every event as a line of JSON.")
def finals(study: str, top: int, seeds: int, store: str | None, quiet: bool, as_json: bool) -> int:
    """Run the best settings of a study again with new seeds, to see what was luck.

    The repeats are trials of their own that the sampler is not told of. Repeats that are done are not run again.
    """
    from hpsearch import api
    from hpsearch.cli import live

    with output_may_fail():
        with live.progress(open_console(stderr=True), quiet=quiet or as_json) as listen:
            found = api.finals(
                study,
                top=top,
                seeds=seeds,
                store=store,
                listen=live.json_lines(sys.stdout) if as_json else listen,
            )
        _finish(found, as_json=as_json, quiet=quiet, top=20)
    return found.exit_code


def _check(study_file: str, as_json: bool, options: dict[str, Any], *, extend: bool = False, full: bool = False) -> int:
    from hpsearch import api
    from hpsearch.cli import output, summaries

    found = api.check(study_file, extend=extend, full=full, **options)
    print(output.to_json(found) if as_json else summaries.check_report(found))
    return 0
