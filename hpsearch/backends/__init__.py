"""Backend name to the module that runs trials; modules are imported on use.

A backend starts what it needs when it is entered, runs the trials of a StudyRun until there are none left, and gives
everything back when it is left. It takes no decision.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hpsearch.spec.study import DEFAULT_STORE, StudySpec

if TYPE_CHECKING:
    from hpsearch.driver.run.study_run import StudyRun

GRACE_S = 20.0
"""What running trials get to write a checkpoint when the study is asked to stop; Kubernetes gives a pod 30 s."""
BACKENDS = {"ray": "hpsearch.backends.ray.cluster", "inline": "hpsearch.backends.inline"}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What a backend found and how it will use it."""

    parallel: int
    cpus_per_process: int
    gpus_per_trial: float
    bundles: Sequence[Mapping[str, float]] = ()
    """What each process of a trial takes of a node, by Ray's names."""
    across_nodes: bool = False
    is_packed: bool = False
    """Whether a trial takes the part of a GPU that its memory asks for, once that is known."""
    where: str
    """In words, for a person."""


class Backend(Protocol):
    placement: Placement

    def run(self, run: StudyRun) -> None:
        """Run trials until `run.next_trial()` gives none and the run is not waiting.

        Raises StopRequestedError, ClusterError.
        """


def auth_environment() -> dict[str, str]:
    """What makes Ray use the token of a cluster where there is one: by itself it does so only where it starts one.

    To be put into the environment before Ray is imported. https://docs.ray.io/en/latest/ray-security/token-auth.html
    """
    has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if has_token or (Path.home() / ".ray" / "auth_token").is_file():
        return {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
    return {}


def reachable_store(spec: StudySpec) -> str | None:
    """The study's store, if a job elsewhere could reach it: no file beside this machine's current folder."""
    if spec.store == DEFAULT_STORE or re.match(r"sqlite(\+\w+)?:///(?!/)", spec.store):
        return None
    return spec.store


def open_backend(spec: StudySpec, note: Callable[[str], None]) -> AbstractContextManager[Backend]:
    backend: AbstractContextManager[Backend] = import_module(BACKENDS[spec.backend]).open_backend(spec, note)
    return backend
