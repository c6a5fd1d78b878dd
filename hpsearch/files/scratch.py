"""Private folders of a process: the one place where sockets, secrets and other scratch files of a launch lie.

Nobody but the user can look into one (mode 0700), whatever a library does to the folders below it: Ray opens the folder
that it is given to everybody. A process that is killed leaves its folder behind; the next one that makes one removes
it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_PREFIX = "hps-"
_OWNER = "owner.json"
"""File in each folder that says which process made it."""


@contextmanager
def private_folder(kind: str = "") -> Iterator[Path]:
    """A folder in the system's temporary folder that is removed afterwards, for this user alone."""
    _collect_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}"))
    try:
        (folder / _OWNER).write_text(json.dumps(this_process()))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket is this user's (or root's); see unix(7), SO_PEERCRED."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return user in (0, os.getuid())


def this_process() -> dict[str, Any]:
    """What tells this process from every other, as far as the system says; see proc(5) and pid_namespaces(7)."""
    found: dict[str, Any] = {"pid": os.getpid()}
    with suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
        found["started"] = _started(os.getpid())
    return found


def is_gone(process: dict[str, Any] | None) -> bool | None:
    """Whether a process of this machine has ended; None when it cannot be seen from here."""
    here = this_process()
    if not process or "started" not in process or "started" not in here:
        return None
    if (process["boot"], process["namespace"]) != (here["boot"], here["namespace"]):
        return None
    try:
        return bool(_started(process["pid"]) != process["started"])
    except OSError:
        return True


def _started(pid: int) -> str:
    """Start time of a process in clock ticks after boot; a zombie counts as gone. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        raise ProcessLookupError(pid)
    return fields[19]


def _collect_abandoned() -> None:
    """Remove the folders of this user's processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Another user's folder, or one that is being made, cannot be read.
        with suppress(OSError, ValueError):
            if folder.lstat().st_uid == os.getuid() and is_gone(json.loads((folder / _OWNER).read_text())):
                shutil.rmtree(folder, ignore_errors=True)
