"""Studies as jobs of a Ray cluster: packs what a launch needs, submits it over HTTP, reads its log, stops it.

The job runs `hpsearch launch` on the cluster's head, as anybody could by hand; nothing here takes part in the study.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from hpsearch.backends import GRACE_S, auth_environment, reachable_store
from hpsearch.errors import EXIT_FINISHED, ClusterError, UsageError
from hpsearch.files.scratch import private_folder
from hpsearch.spec.files import expanded
from hpsearch.spec.parsing.environment import masked
from hpsearch.spec.redaction import hide_secrets
from hpsearch.spec.sections import SourceSpec
from hpsearch.spec.study import StudySpec

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STORE_FILE = "store.url"
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MANY_FILES = 20
"""More of them are called by a pattern: there may be more names than fit into a command."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of the cluster that launches a study."""

    id: str
    study: str
    store: str
    """Its URL without a password; empty when the cluster's environment names it."""
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    started_at: datetime | None
    ended_at: datetime | None
    exit_code: int | None
    """Of `hpsearch launch`, when that has ended."""


class Cluster:
    """The jobs of the Ray cluster at an http address. Raises ClusterError when there is none."""

    def __init__(self, address: str | None = None) -> None:
        """`address` is RAY_API_SERVER_ADDRESS by default, then http://127.0.0.1:8265."""
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
        if not self.address.startswith(("http://", "https://")):
            raise UsageError(f"jobs are submitted to http://HEAD:8265 or https://..., not to {self.address!r}")
        if importlib.util.find_spec("aiohttp") is None:
            raise UsageError("jobs of a Ray cluster need more of Ray: pip install 'hpsearch[cluster]'")
        # Ray's client prefers what the environment says to what it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._reached():
            self._client = JobSubmissionClient(self.address)
        for module in (
            "dashboard.modules.dashboard_sdk",
            "dashboard.modules.job.sdk",
            "_private.runtime_env.packaging",
        ):
            logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)

    def submit(
        self,
        study_file: Path,
        spec: StudySpec,
        *,
        arguments: Sequence[str],
        job_id: str | None = None,
    ) -> str:
        """Submit `hpsearch launch` of a study with these arguments; returns the job's id.

        What the study names on this machine (data files, the folder of a pretrained model) goes with it. A store that
        the job could not reach does not: its environment has to name one. Raises ClusterError, UsageError when there
        is a job of this id already.
        """
        job_id = job_id or f"{spec.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        if not _JOB_ID.fullmatch(job_id):
            raise UsageError(f"job id {job_id!r}: expected letters, digits, '.', '_' and '-', 100 at most")
        if any(job.id == job_id for job in self.jobs()):
            raise UsageError(f"there is a job {job_id} at {self.address} already; choose another --job-id")
        with private_folder("job-") as folder:
            package = folder / "package"
            package.mkdir()
            shutil.copyfile(study_file, package / study_file.name)
            command = ["hpsearch", "launch", study_file.name, *arguments, *_pack(spec, package)]
            environment = {"RAY_JOB_STOP_WAIT_TIME_S": f"{GRACE_S + 10:g}"}
            store = reachable_store(spec)
            if store is not None:
                # The command and the environment are shown with the job, and the file stays on the head, where all its
                # users can read it: either half alone says nothing.
                key = secrets.token_bytes(len(store.encode()))
                (package / STORE_FILE).write_bytes(masked(store.encode(), key))
                environment |= {"HPSEARCH_STORE_FILE": STORE_FILE, "HPSEARCH_STORE_KEY": key.hex()}
            with self._reached():
                self._client.submit_job(
                    submission_id=job_id,
                    entrypoint=shlex.join(command),
                    runtime_env={"working_dir": str(package), "env_vars": environment},
                    metadata={"hpsearch_study": spec.name, "hpsearch_store": hide_secrets(store or "")},
                )
        return job_id

    def jobs(self) -> list[Job]:
        """The jobs that launch studies, oldest first. A study that was submitted without us has no name here."""
        with self._reached():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started_at or datetime.max.replace(tzinfo=UTC))

    def job(self, job_id: str) -> Job:
        """One job. Raises UsageError."""
        jobs = self.jobs()
        for job in jobs:
            if job.id == job_id:
                return job
        there = ", ".join(job.id for job in jobs[-5:]) or "none"
        raise UsageError(f"no job {job_id} at {self.address}; jobs there: {there}")

    def log(self, job_id: str) -> str:
        """What a job has said so far. Raises UsageError."""
        self.job(job_id)
        with self._reached():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """What a job says, piece by piece, until it ends. Raises UsageError."""
        self.job(job_id)
        loop = asyncio.new_event_loop()
        try:
            pieces = self._client.tail_job_logs(job_id).__aiter__()
            while True:
                with self._reached():
                    try:
                        yield loop.run_until_complete(pieces.__anext__())
                    except StopAsyncIteration:
                        return
        finally:
            loop.close()

    def wait(self, job_id: str, *, timeout_s: float = 60.0) -> Job:
        """A job that has said its last word, as it ended. Its end comes a moment after its log's."""
        until = time.monotonic() + timeout_s
        while True:
            job = self.job(job_id)
            if job.status not in ("PENDING", "RUNNING") or time.monotonic() > until:
                return job
            time.sleep(0.5)

    def stop(self, job_id: str) -> Job:
        """Ask a job to stop: its trials write their checkpoints first. Returns the job as it was found."""
        job = self.job(job_id)
        if job.status in ("PENDING", "RUNNING"):
            with self._reached():
                self._client.stop_job(job_id)
        return job

    @contextmanager
    def _reached(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            has_token = bool(auth_environment())
            given = "the token in RAY_AUTH_TOKEN is not the cluster's" if has_token else "give it in RAY_AUTH_TOKEN"
            raise ClusterError(f"the Ray cluster at {self.address} asks for a token: {given}") from error
        except (ConnectionError, OSError) as error:
            raise ClusterError(f"there is no Ray cluster that takes jobs at {self.address}") from error
        except RuntimeError as error:
            said = hide_secrets(str(error).strip().splitlines()[-1])
            raise ClusterError(f"the Ray cluster at {self.address} says: {said[:500]}") from error


def exit_code(job: Job) -> int:
    """What the launch ended in, as far as the cluster knows."""
    if job.status == JobStatus.SUCCEEDED.value:
        return EXIT_FINISHED
    return ClusterError.exit_code if job.exit_code in (None, 0) else int(job.exit_code or 0)


def plain_log(text: str) -> str:
    """A log without colours and other commands to a terminal."""
    kept = _ANSI.sub("", text)
    return "".join(char for char in kept if char.isprintable() or char in "\n\t")


def _pack(spec: StudySpec, package: Path) -> list[str]:
    """Copy what a study names on this machine into the package; returns the overrides that say where it is there."""
    overrides = []
    if spec.data.mix:
        sources = []
        for number, source in enumerate(spec.data.mix):
            content = source.model_dump(mode="json", exclude_defaults=True)
            sources.append({**content, **_packed_files(source, package, Path("data") / f"source-{number}")})
        overrides.append(f"--set=data={json.dumps({**_without_sources(spec), 'mix': sources})}")
    elif spec.data.files is not None:
        files = _packed_files(spec.data, package, Path("data"))["files"]
        overrides.append(f"--set=data.files={json.dumps(files)}")
    for name in spec.definition.file_options:
        if (text := getattr(spec.options, name)) is not None:
            overrides.append(f"--set={spec.definition.name}.{name}={json.dumps(text, ensure_ascii=False)}")
    pretrained = Path(spec.model.pretrained or "")
    if pretrained.is_absolute():
        _refuse_links(pretrained, "model.pretrained")
        shutil.copytree(pretrained, package / "model" / pretrained.name)
        overrides.append(f"--set=model.pretrained=model/{pretrained.name}")
    return overrides


def _packed_files(source: SourceSpec, package: Path, place: Path) -> dict[str, Any]:
    """`files` of a source as they are called in the package that they are copied into."""
    found = source.files.model_dump() if source.files is not None else {}
    files = {}
    for split, paths in found.items():
        if isinstance(paths, list) and len(paths) > _MANY_FILES and all(Path(path).is_file() for path in paths):
            files[split] = [_numbered(paths, package, place / split)]
        elif paths:
            files[split] = _copied(paths, package, place / split)
    return {"files": files} if files else {}


def _without_sources(spec: StudySpec) -> dict[str, Any]:
    return spec.data.model_dump(mode="json", exclude_defaults=True, exclude={"mix"})


def _refuse_links(folder: Path, key: str) -> None:
    """Raise UsageError when a folder that is to be sent away has links to what lies elsewhere."""
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{key}: {path} is a link to {path.resolve()}, outside of the folder that goes to the "
                f"cluster; send a copy of the folder that holds the files themselves (cp -rL {folder} COPY)"
            )


def _copied(paths: Any, package: Path, place: Path) -> Any:
    if isinstance(paths, dict):
        return {side: _copied(path, package, place / side) for side, path in paths.items()}
    if isinstance(paths, list):
        return [_copied(path, package, place / str(index)) for index, path in enumerate(paths)]
    if not Path(paths).exists():  # a pattern
        return _numbered(expanded(paths), package, place)
    (package / place).mkdir(parents=True)
    target = place / Path(paths).name
    if Path(paths).is_dir():
        _refuse_links(Path(paths), "data.files")
        shutil.copytree(paths, package / target)
    else:
        shutil.copyfile(paths, package / target)
    return str(target)


def _numbered(files: Sequence[str], package: Path, place: Path) -> str:
    """Copy files into a folder in their order; returns the pattern that stands for all of them."""
    (package / place).mkdir(parents=True)
    for number, file in enumerate(files):
        shutil.copyfile(file, package / place / f"{number:06d}-{Path(file).name}")
    return str(place / "*")


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id,
        study=metadata.get("hpsearch_study", ""),
        store=metadata.get("hpsearch_store", ""),
        status=details.status.value,
        message=hide_secrets((details.message or "").strip()),
        started_at=_time(details.start_time),
        ended_at=_time(details.end_time),
        exit_code=getattr(details, "driver_exit_code", None),
    )


def _time(milliseconds: int | None) -> datetime | None:
    with suppress(TypeError, ValueError, OSError):
        return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
    return None
