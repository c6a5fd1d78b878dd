"""The Python functions are the commands: the same names, the same arguments, and nothing else is public."""

from __future__ import annotations

import inspect

import click
import pytest

import hpsearch
from hpsearch import api
from hpsearch.cli.main import main
from hpsearch.spec.load import LaunchOptions

ONLY_COMMANDS = {"completion", "dashboard"}
ONLY_FUNCTIONS = {"archive", "open_study"}
"""`launch --restart` archives; `open_study` gives the object that several commands read."""
PRESENTATION = {"as_json", "as_csv", "markdown", "quiet", "detach", "yes"}
OF_THE_COMMAND = {
    "launch": {
        "dry_run": "is `check`",
        "restart": "is `archive`, then `launch`",
        "top": "is `study.leaderboard(top=)`",
    },
    "report": {"output": "the function returns the document"},
    "status": {"address": "a job's study is found first"},
    "logs": {"address": "those of a job are read from the cluster"},
}
NAMES = {"format_": "format", "name": "study"}
"""What an argument of a command is called as an argument of a function."""


def parameters(function: object) -> set[str]:
    found = set(inspect.signature(function).parameters)  # type: ignore[arg-type]
    if "options" in found:
        found = (found - {"options"}) | set(LaunchOptions.__annotations__)
    return found


@pytest.mark.parametrize("name", sorted(set(main.commands) - {name.replace("_", "-") for name in ONLY_COMMANDS}))
def test_a_command_is_a_function_with_its_arguments(name: str) -> None:
    function = name.replace("-", "_")
    command = main.commands[name]
    assert isinstance(command, click.Command)
    wanted = {str(parameter.name) for parameter in command.params} - PRESENTATION - set(OF_THE_COMMAND.get(name, ()))
    # `name` is the study's new name where there is a study file, and else the study.
    names = NAMES if "study_file" not in wanted else {"study_file": "study"}
    wanted = {names.get(argument, argument) for argument in wanted}
    assert wanted <= parameters(getattr(hpsearch, function)), wanted - parameters(getattr(hpsearch, function))


def test_what_is_public_is_a_command_or_says_why_not() -> None:
    functions = {name for name in hpsearch.__all__ if name[0].islower()}
    assert functions - ONLY_FUNCTIONS == {name.replace("-", "_") for name in main.commands} - ONLY_COMMANDS
    assert all(hasattr(api, name) for name in functions)
    assert all(getattr(api, name).__doc__ for name in functions)
