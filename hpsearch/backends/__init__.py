"""Backend name to the module that runs trials; modules are imported on use.

A backend starts what it needs when it is entered, runs the trials of a StudyRun until there are none left, and gives
everything back when it is left. It takes no decision.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from hpsearch.spec import StudySpec
from hpsearch.study import StudyRun

BACKENDS = {"ray": "hpsearch.backends.ray_tune", "inline": "hpsearch.backends.inline"}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What a backend found and how it will use it."""

    parallel: int
    cpus_per_trial: int
    gpus_per_trial: float
    where: str
    """In words, for a person."""


class Backend(Protocol):
    placement: Placement

    def run(self, run: StudyRun) -> None:
        """Run trials until `run.next_trial()` gives none and the run is not waiting.

        Raises StopRequestedError, ClusterError.
        """


def open_backend(spec: StudySpec, note: Callable[[str], None]) -> AbstractContextManager[Backend]:
    backend: AbstractContextManager[Backend] = import_module(BACKENDS[spec.backend]).open_backend(spec, note)
    return backend
