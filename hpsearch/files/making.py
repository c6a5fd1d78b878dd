"""The folder that data is prepared in: one process at a time, continued after a kill, never taken for prepared data."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpsearch.files import storage
from hpsearch.files.storage import Folder

_ABANDONED_S = 3 * 24 * 3600.0


@contextmanager
def making_folder(data: Folder, key: str | None, waiting: Callable[[], None]) -> Iterator[Path]:
    """A folder for this process alone, beside the prepared data, or in the node's cache if that is in an object store.

    With a key, it is the one of an earlier process that was killed; another process of this machine that has it is
    waited for, after a call of `waiting`. Without a key, or where folders cannot be locked, it is a new one. It is
    removed in the end, unless this process is killed or interrupted.
    """
    parent = data if isinstance(data, Path) else storage.cache_folder()
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    # Two machines may share the folder and not its locks.
    machine = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    place = parent / f".making-{key}-{machine}"
    lock = None if key is None else _locked(place, waiting)
    if lock is None:
        with tempfile.TemporaryDirectory(prefix=".making-", dir=parent, ignore_cleanup_errors=True) as alone:
            held = _locked(Path(alone), waiting)
            yield Path(alone)
            if held is not None:
                os.close(held)
        return
    try:
        yield place
        shutil.rmtree(place, ignore_errors=True)
    except Exception:
        shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _locked(place: Path, waiting: Callable[[], None]) -> int | None:
    """A descriptor that holds the lock of a folder, which is made if it is not there; None where there are no locks."""
    has_waited = False
    while True:
        place.mkdir(exist_ok=True)
        try:
            lock = os.open(place, os.O_RDONLY)
        except FileNotFoundError:  # its process has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not has_waited:
                waiting()
                has_waited = True
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            os.close(lock)
            return None
        # The one that was waited for has removed the folder.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), place.stat()):
                return lock
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove what processes have left that were killed days ago and never run again."""
    for place in parent.glob(".making-*"):
        with suppress(OSError):
            if time.time() - place.stat().st_mtime < _ABANDONED_S:
                continue
            lock = os.open(place, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place, ignore_errors=True)
            finally:
                os.close(lock)
