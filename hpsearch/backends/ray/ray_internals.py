"""Private parts of Ray, each with the version it was read from (2.60). See `tests/unit/test_internals.py`."""

from __future__ import annotations

import ray


def dead_processes() -> list[str]:
    """Processes of our own Ray that have ended by themselves, without which it cannot continue."""
    node = ray._private.worker._global_node
    return [name for name, _ in node.dead_processes() if name in ("raylet", "gcs_server")] if node else []


def end_processes() -> None:
    """End what is left of our own Ray, without asking a head that may be gone."""
    ray._private.worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
