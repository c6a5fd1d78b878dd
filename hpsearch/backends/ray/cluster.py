"""The Ray that trials run on: started on this machine and ended afterwards, or joined.

Ray needs seconds to start, and Tune as long to be imported: the two overlap.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hpsearch.backends import reachable_store
from hpsearch.backends.fork_server import fork_server
from hpsearch.backends.ray.ray_internals import without_helpers
from hpsearch.errors import ClusterError, RunFolderError, UsageError
from hpsearch.files import storage
from hpsearch.files.scratch import private_folder
from hpsearch.files.storage import Folder, locate
from hpsearch.spec.study import StudySpec

if TYPE_CHECKING:
    from hpsearch.backends.ray.tune import RayTune

TUNE = "hpsearch.backends.ray.tune"
CONNECT_S = 5.0
NODE_ANSWERS_S = 60.0
"""What a node gets to start a process that says which versions it has."""
MOST_SOCKET_PATH = 107
RAY_SOCKET_PATH = len("/session_2000-12-31_23-59-59_123456_1234567/sockets/plasma_store")
"""Bytes that Ray adds to the name of its folder."""
START_ATTEMPTS = 3
"""Ray gives a node 30 s to come up, which a loaded machine can miss."""


@contextmanager
def open_backend(spec: StudySpec, note: Callable[[str], None]) -> Iterator[RayTune]:
    """Start a Ray of our own on this machine and end it afterwards, or join the one that the study names."""
    with private_folder() as private, ExitStack() as stack:
        stack.callback(ray.shutdown)
        # Ray opens the folder that it is given to everybody; nobody gets through the one above it.
        scratch = private / "r"
        if spec.address == "local":
            _check_length(scratch)
            # Ray would otherwise leave a token file in the home folder. It reads the variable once in a process: one
            # token serves all launches.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            # The processes of a trial on several devices find each other through Ray.
            with nullcontext() if spec.resources.processes > 1 else fork_server(private) as forks_at:
                with ThreadPoolExecutor(1) as helper:
                    loading = helper.submit(import_module, TUNE)
                    _start(scratch, note)
                    tune = loading.result()
                yield tune.RayTune(spec, scratch, forks_at=forks_at)
            return
        _join(spec.address)
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and (passing := _in_this_folder(spec)):
            note(f"{passing} in the job's own folder, which Ray removes in time: give the job others to find it again")
        backend = import_module(TUNE).RayTune(spec, scratch)
        # Tune looks for this folder on every node.
        with _shared_folder(locate(spec.folder)) as shared:
            _check_nodes(shared)
            backend.results = shared
            yield backend


def _check_length(scratch: Path) -> None:
    """Raise UsageError when Ray's sockets would have longer paths below a folder than the system allows."""
    if len(os.fsencode(scratch)) > MOST_SOCKET_PATH - RAY_SOCKET_PATH:
        raise UsageError(
            f"the temporary folder {scratch.parents[1]} has too long a name: Ray's sockets below it would have paths "
            f"of more than {MOST_SOCKET_PATH} bytes; set TMPDIR to a shorter one, such as /tmp"
        )


def _start(scratch: Path, note: Callable[[str], None]) -> None:
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with without_helpers():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(scratch),
                )
            return
        except Exception as error:
            ray.shutdown()
            _end_what_is_left(scratch)
            if attempt == START_ATTEMPTS:
                raise ClusterError(f"Ray did not start in {attempt} attempts: {error}") from error
            note(f"Ray did not start ({str(error).splitlines()[0]}); trying again")
            time.sleep(attempt)


def _end_what_is_left(scratch: Path) -> None:
    """End the processes of a node that did not come up: Ray keeps no account of it, and they run on."""
    import psutil

    left = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(str(scratch) in part for part in child.cmdline()):
                child.kill()
                left.append(child)
    psutil.wait_procs(left, timeout=5)


def _join(address: str) -> None:
    """Become a driver of a Ray that runs already. Raises ClusterError."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise ClusterError(f"there is no Ray at {address}: {error.strerror or error}") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        said = " ".join(str(error).split())
        remedy = (
            "a cluster that asks for a token gets it from RAY_AUTH_TOKEN; from a machine that is no part of it, use "
            "`hpsearch submit STUDY --address http://HEAD:8265`"
        )
        if "ersion mismatch" in said:
            remedy = "use the versions of the cluster here, or ours there"
        raise ClusterError(f"cannot join the Ray at {address}: {said[:500]}\n{remedy}") from error


def _in_this_folder(spec: StudySpec) -> str:
    """Which of the things that outlive a launch are kept relative to the current folder."""
    passing = ["the store (HPSEARCH_STORE)"] if reachable_store(spec) is None else []
    passing += [] if "://" in spec.folder or Path(spec.folder).is_absolute() else ["the run folder (HPSEARCH_FOLDER)"]
    return " and ".join(passing) + (" lie" if len(passing) > 1 else " lies") if passing else ""


@contextmanager
def _shared_folder(folder: Folder) -> Iterator[Folder]:
    """A folder for this launch in the study's own, which all nodes should reach. Raises RunFolderError."""
    shared = folder / f".tune-{secrets.token_hex(4)}"
    try:
        storage.make(shared)
    except OSError as error:
        raise RunFolderError(f"cannot write {folder}: {error.strerror}") from error
    try:
        yield shared
    finally:
        storage.remove(shared)


def _check_nodes(shared: Folder) -> None:
    """Raise ClusterError when a node has another hpsearch or torch than this driver, or does not reach its files."""
    marker = shared / "marker"
    storage.write(marker, b"")
    ours = _inspect(str(marker))
    problems = []
    looks = []
    for node in alive_nodes():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        look = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_inspect)
        looks.append((f"{node['NodeManagerHostname']} {node['NodeManagerAddress']}", look.remote(str(marker))))
    for name, look in looks:
        try:
            found = ray.get(look, timeout=NODE_ANSWERS_S)
        except Exception as error:
            problems.append(f"{name}: {str(error).strip().splitlines()[-1]}")
            continue
        for what in ours.keys() - {"reached"}:
            if found[what] != ours[what]:
                problems.append(f"{name}: {what} {found[what]}, and {ours[what]} here")
        if not found["reached"]:
            problems.append(f"{name}: does not reach {shared.parent}; give a shared --folder, or HPSEARCH_FOLDER")
    if problems:
        raise ClusterError("nodes of the cluster cannot run this study:\n" + "\n".join(f"  {one}" for one in problems))


def _inspect(marker: str) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("hpsearch", "torch", "transformers")}
    return {**versions, "reached": _is_there(marker)}


def _is_there(marker: str) -> bool:
    try:
        return bool(locate(marker).is_file())
    except Exception:  # of as many kinds as there are object stores
        return False


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's account of each node that is alive."""
    return [node for node in ray.nodes() if node["Alive"]]
