"""The `hpsearch` command: parse, call one function, print. Data goes to stdout, progress and errors to stderr."""

from __future__ import annotations

import os
import sys
import traceback
from gc import set_threshold
from typing import Any

import click

from hpsearch.cli import cluster, launch, maintenance, results
from hpsearch.cli.process import leave, open_closed_streams, shown, take_debug_from_anywhere
from hpsearch.errors import (
    EXIT_BUG,
    EXIT_IO,
    EXIT_SIGINT,
    HpsearchError,
)

EXIT_CODES = """\b
Exit codes:
  0  finished
  1  doctor found something that it did not repair
  2  the command, the study file or the data cannot be used as given
  3  finished, but no trial can be ranked or more than half of them failed
  4  another driver holds the study
  69 the store cannot be reached, read or written
  70 a bug of hpsearch
  74 files of the run cannot be written
  75 Ray could not be started or was lost; launch again to resume
  129, 130, 143 stopped by SIGHUP, SIGINT or SIGTERM; launch again to resume"""


class Group(click.Group):
    """Turns every error into one message and the exit code that it is documented to have."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self._main(*args, **kwargs)
        except SystemExit as end:
            if "pyarrow" in sys.modules:
                leave(end.code)
            raise

    def _main(self, *args: Any, **kwargs: Any) -> Any:
        open_closed_streams()
        set_threshold(50_000)  # rows by the thousand are made and kept: to look through them again and again is slow
        kwargs["standalone_mode"] = False
        take_debug_from_anywhere()
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
            print(f"Error: {shown(str(error))}", file=sys.stderr)
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
                f"Error: {type(error).__name__}: {shown(str(error))}\n"
                "This is a bug of hpsearch; run the command again with --debug to see where.",
                file=sys.stderr,
            )
            sys.exit(EXIT_BUG)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(
    cls=Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="hpsearch")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Find the hyperparameters of a language model: Optuna decides, Ray Tune runs, SQL remembers.

    Write a study file, then: hpsearch check STUDY; hpsearch launch STUDY; hpsearch rank NAME.
    """


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell completion script, for `eval "$(hpsearch completion bash)"`."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    print(found(main, {}, "hpsearch", "_HPSEARCH_COMPLETE").source())


for command in (
    launch.init,
    launch.launch,
    launch.check,
    launch.finals,
    results.studies,
    results.status,
    results.watch,
    results.rank,
    results.show,
    results.compare,
    results.best,
    results.report,
    results.export,
    results.export_data,
    cluster.submit,
    cluster.jobs,
    cluster.logs,
    cluster.stop,
    maintenance.gc,
    maintenance.retry,
    maintenance.doctor,
    maintenance.dashboard,
    maintenance.schema,
    completion,
):
    main.add_command(command)
