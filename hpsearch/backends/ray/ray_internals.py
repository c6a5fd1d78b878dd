"""Private parts of Ray, each with the version it was read from (2.60). See `tests/unit/test_internals.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.node import Node

_HELPERS = ("start_monitor", "start_log_monitor")


@contextmanager
def without_helpers() -> Iterator[None]:
    """Let a Ray that is started meanwhile leave out its autoscaler and the reader of its logs.

    A study on one machine has no use for them, and each is a Python process that imports Ray. The server that Ray
    starts even without a dashboard stays: the agent of the node asks for it every second.
    """
    starters = {name: getattr(Node, name) for name in _HELPERS}

    def nothing(node: Any, **_: Any) -> None:
        pass

    try:
        for name in starters:
            setattr(Node, name, nothing)
        yield
    finally:
        for name, starter in starters.items():
            setattr(Node, name, starter)


def dead_processes() -> list[str]:
    """Processes of our own Ray that have ended by themselves, without which it cannot continue."""
    node = ray._private.worker._global_node
    return [name for name, _ in node.dead_processes() if name in ("raylet", "gcs_server")] if node else []


def end_processes() -> None:
    """End what is left of our own Ray, without asking a head that may be gone."""
    ray._private.worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
