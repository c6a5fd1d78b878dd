"""Commands that read a store: studies, status, watch, rank, show, compare, best, report, exports."""

from __future__ import annotations

import csv
import os
import sys
from typing import Any

import click

from hpsearch.cli.options import COUNT, TRIAL_NUMBER, by_option, cluster_option, json_option, open_console, store_option
from hpsearch.errors import (
    plain,
)


@click.command()
@click.argument("name", metavar="STUDY|JOB")
@cluster_option
@store_option
@json_option
def status(name: str, address: str | None, store: str | None, as_json: bool) -> None:
    """Say how far a study is, by its name or by the job that launches it; read from the store."""
    from hpsearch import api
    from hpsearch.cli import output, summaries
    from hpsearch.errors import StoreError, UnknownStudyError

    job = None
    try:
        found = api.status(name, store=store)
    except (UnknownStudyError, StoreError):
        if address is None and "RAY_API_SERVER_ADDRESS" not in os.environ:
            raise
        from hpsearch.backends.ray.jobs import Cluster

        job = Cluster(address).job(name)
        if not job.study:
            raise click.UsageError(f"job {name} was not submitted by hpsearch: give the study's name") from None
        found = api.status(job.study, store=store)
    if as_json:
        also = {} if job is None else {"job": job}
        print(output.to_json({"schema_version": 1, **vars(found), **also}))
        return
    if job is not None:
        print(f"job     {plain(name)}: {job.status}")
    print(summaries.status_report(found))


@click.command()
@click.argument("study")
@store_option
def watch(study: str, store: str | None) -> None:
    """Watch a study run, on any machine that reaches its store; ends when it is finished."""
    from hpsearch import api
    from hpsearch.cli import live

    live.watch_study(api.watch(study, store=store), open_console())


@click.command("export-data")
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
@store_option
def export_data(study: str, format_: str, output: str | None, store: str | None) -> None:
    """Write trials, curves and scores of a study as tables for other tools."""
    from hpsearch import api

    for file in api.export_data(study, output or f"{study}-data", format=format_, store=store):
        print(f"wrote {file}", file=sys.stderr)


@click.command()
@store_option
@json_option
def studies(store: str | None, as_json: bool) -> None:
    """List the studies of a store."""
    from hpsearch import api
    from hpsearch.cli import output, tables

    rows = api.studies(store=store)
    if as_json:
        print(output.to_json({"schema_version": 1, "studies": rows}))
    else:
        open_console().print(tables.studies_table(rows) if rows else "no studies yet")


@click.command()
@click.argument("study")
@click.argument("first", type=TRIAL_NUMBER)
@click.argument("second", type=TRIAL_NUMBER)
@store_option
@json_option
def compare(study: str, first: int, second: int, store: str | None, as_json: bool) -> None:
    """Test whether two trials of a study differ: a paired bootstrap over test examples."""
    from hpsearch import api
    from hpsearch.cli import output, tables

    found = api.compare(study, first, second, store=store)
    if as_json:
        print(output.to_json({"schema_version": 1, **vars(found)}))
    else:
        open_console().print(tables.comparison_table(found))


@click.command()
@click.argument("studies", nargs=-1, required=True, metavar="STUDY...")
@store_option
@click.option("--top", type=COUNT, help="Only the best n.")
@click.option("--mixed", is_flag=True, help="Rank scores together that are not comparable.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@json_option
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
    from hpsearch.cli import output
    from hpsearch.reports import text as wording
    from hpsearch.results.leaderboard import flat_rows

    if as_csv + markdown + as_json > 1:
        raise click.UsageError("give one of --csv, --markdown and --json")
    board = api.rank(*studies, top=top, mixed=mixed, store=store)
    if as_json:
        print(output.to_json(board.to_json()))
    elif markdown:
        print(wording.leaderboard_markdown(board))
    elif as_csv:
        from hpsearch.results.export import spreadsheet_text

        rows = flat_rows(board)
        writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else ["test_rank", "trial"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: spreadsheet_text(value) for name, value in row.items()} for row in rows)
    else:
        print_board(board)


@click.command()
@click.argument("study")
@click.argument("trial", type=TRIAL_NUMBER)
@store_option
@json_option
def show(study: str, trial: int, store: str | None, as_json: bool) -> None:
    """Show one trial: settings, curve, verdict with its evidence, test score."""
    from hpsearch import api
    from hpsearch.cli import output, summaries

    row = api.show(study, trial, store=store)
    if as_json:
        print(output.to_json({"schema_version": 1, "study": study, **vars(row)}))
    else:
        console = open_console()
        console.print(summaries.trial_report(row, console.width))


@click.command()
@click.argument("studies", nargs=-1, required=True, metavar="STUDY...")
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="File to write [STUDY.html]; - prints it.")
@click.option("--page", metavar="PAGE", help="Another list of figures: a name of dashboards/, or a YAML file.")
@store_option
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


@click.command()
@click.argument("study")
@by_option
@store_option
@json_option
def best(study: str, by: Any, store: str | None, as_json: bool) -> int:
    """Print the winner: its settings, score and checkpoint.

    While no trial has a test score, the one that leads on validation.
    """
    from hpsearch import api
    from hpsearch.cli import output, summaries
    from hpsearch.reports import text as wording

    opened = api.open_study(study, store=store)
    board = opened.board(top=1)
    chosen = board.chosen(by)
    if chosen is None:
        raise click.UsageError(wording.leaderboard_notes(board)[0])
    for note in wording.choice_notes(board, by):
        print(note, file=sys.stderr)
    if as_json:
        print(output.to_json({"schema_version": 1, "study": study, "by": by, **vars(chosen)}))
    else:
        console = open_console()
        console.print(summaries.trial_report(opened.trial(chosen.trial), console.width))
    return 0


@click.command()
@click.argument("study")
@click.argument("trial", type=TRIAL_NUMBER, required=False)
@by_option
@click.option("--output", "-o", type=click.Path(file_okay=False), help="Folder to write [STUDY-trial-N].")
@store_option
def export(study: str, trial: int | None, by: Any, output: str | None, store: str | None) -> None:
    """Copy the model of a trial, the winner by default, to a folder that transformers loads.

    A trial that has not ended gives its best checkpoint so far.
    """
    from hpsearch import api
    from hpsearch.reports import text as wording

    if trial is None:
        for note in wording.choice_notes(api.open_study(study, store=store).board(top=1), by):
            print(note, file=sys.stderr)
    print(f"wrote {plain(api.export(study, trial, output=output, by=by, store=store))}", file=sys.stderr)


def print_board(board: Any) -> None:
    from hpsearch.cli import tables
    from hpsearch.reports import text as wording

    console = open_console()
    if board.rows:
        console.print(tables.leaderboard_table(board, console.width))
    for line in wording.leaderboard_notes(board):
        console.print(line, style="dim", markup=False, highlight=False)
    if board.finals:
        console.print()
        console.print(tables.finals_table(board.finals))
        console.print(tables.finals_note(board.finals), style="dim", markup=False, highlight=False)
