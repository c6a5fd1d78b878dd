"""Options that several commands share, and the console that they print on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click

from hpsearch.registry import TRACKERS
from hpsearch.spec.redaction import has_secret
from hpsearch.spec.settings import MOST

Command = TypeVar("Command", bound=Callable[..., Any])
TRIAL_NUMBER = click.IntRange(0, MOST)
COUNT = click.IntRange(1, MOST)


def _without_password(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse a store's password, because `ps` shows a command line to everybody."""
    given = [value] if isinstance(value, str) else [one.partition("=")[2] for one in value or () if "store" in one]
    if any(map(has_secret, given)):
        raise click.UsageError(
            f"{parameter.opts[0]}: a password on the command line is seen by every user of this machine; set "
            "HPSEARCH_STORE to the URL, or HPSEARCH_STORE_FILE to a file that holds it"
        )
    return value


def store_option(
    command: Command, *, text: str = "The study store [HPSEARCH_STORE, sqlite:///hpsearch.db]."
) -> Command:
    return click.option("--store", metavar="URL", callback=_without_password, help=text)(command)


def set_option(command: Command) -> Command:
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_without_password,
        help="Override a key, such as search.num_layers.max=4.",
    )(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def study_options(command: Command) -> Command:
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
        partial(store_option, text="The study store, over HPSEARCH_STORE and the file's."),
        click.option("--name", help="Another name for the study."),
        click.option("--trials", type=COUNT, help="Another number of trials."),
        set_option,
        click.argument("study_file", metavar="STUDY"),
    ):
        command = option(command)
    return command


def _known_tracker(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if (problem := TRACKERS.problem(name)) is not None:
            raise click.BadParameter(problem)
    return value


def track_option(command: Command) -> Command:
    return click.option(
        "--track",
        multiple=True,
        metavar="NAME",
        callback=_known_tracker,
        help="Copy curves and results live to this tool, too: tensorboard, mlflow, wandb (each is an extra), or "
        "package.module:Tracker.",
    )(command)


def cluster_option(command: Command) -> Command:
    return click.option(
        "--address", metavar="URL", help="The cluster [RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265]."
    )(command)


def by_option(command: Command) -> Command:
    return click.option(
        "--by",
        type=click.Choice(["test", "validation"]),
        default="test",
        show_default=True,
        help="What the winner is chosen by.",
    )(command)


def open_console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    # A table that is piped keeps its columns; nothing is folded for want of a terminal's width.
    stream = sys.stderr if stderr else sys.stdout
    # What a study holds is text: nothing in it is markup or the name of an emoji.
    width = None if stream.isatty() else 160
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)
