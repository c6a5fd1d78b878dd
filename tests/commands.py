"""The `hpsearch` command in a process of its own, forked from one that has imported what commands import.

To import torch and transformers takes seconds, which most tests of a command would spend for nothing. What is forked is
never this process: the standard library's fork server has no threads and has run no test.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "transformers", "optuna", "alembic.command", "pandas", "hpsearch.cli.main", "hpsearch.driver.launch",
     "hpsearch.driver.plan", "hpsearch.worker.run", "hpsearch.cli.tables", "hpsearch.cli.live", __name__]
)  # fmt: skip

HPSEARCH = (sys.executable, "-m", "hpsearch")
"""The command, in a process of its own from the start."""


def run_command(
    arguments: Sequence[str], *, folder: Path, environment: dict[str, str], timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Its exit code and what it has written; what it prints goes into files, not to a terminal."""
    with tempfile.TemporaryDirectory(prefix="hps-command-") as place:
        out, errors = Path(place) / "out", Path(place) / "errors"
        process = FORKS.Process(
            target=_become, args=(tuple(arguments), str(folder), environment, str(out), str(errors))
        )
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(["hpsearch", *arguments], timeout_s, errors.read_text())
        return subprocess.CompletedProcess(
            ["hpsearch", *arguments], process.exitcode, out.read_text(), errors.read_text()
        )


def _become(arguments: tuple[str, ...], folder: str, environment: dict[str, str], out: str, errors: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, out, os.O_WRONLY | os.O_CREAT),
        (2, errors, os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["hpsearch", *arguments]
    from hpsearch.cli.main import main

    main()
