"""Where a study's files lie: a folder that all its nodes reach, or an object store behind a URI. Owns fsspec.

A name without `://` is a folder, of this machine or of a network file system. `s3://bucket/runs`, `gs://bucket/runs`
and whatever else fsspec knows are object stores: what is written there is whole or not there, what is read often
(tokenized data) is copied to each node once. Credentials and endpoints come from the environment, as the store's own
tools read them (AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS): a name that holds any is refused.

An object store that is away is asked again for a while, and then said to have no room: the study waits as it does for
a full disk.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from hpsearch.errors import DiskFullError, RunFolderError
from hpsearch.files.scratch import private_folder

if TYPE_CHECKING:
    from upath import UPath

Folder: TypeAlias = "Path | UPath"
"""A place for files, or a file: pathlib's, or universal_pathlib's with the same methods."""
FULL = {errno.ENOSPC, errno.EDQUOT}
"""Error numbers that say that there is no room."""
PATIENCE_S = 120.0
"""What an object store gets to come back."""
_PROBE = 1
"""Bytes of the file that tells whether an object store is there."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_DEFINITE = (FileNotFoundError, NotADirectoryError, PermissionError)
"""Answers of an object store, where every other error is trouble on the way."""
_T = TypeVar("_T")


def locate(name: str | os.PathLike[str]) -> Folder:
    """The folder of this name: an absolute path, or a URI's place in its object store."""
    text = os.fspath(name)
    if "://" not in text:
        return Path(text).resolve()
    from upath import UPath

    # Another process may have written since a listing was kept.
    options: dict[str, Any] = {} if text.startswith("file:") else {"use_listings_cache": False}
    if text.startswith(("s3:", "s3a:")):
        # By default one that hangs is waited for five times a minute.
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 1}}
    place: Folder = UPath(text.rstrip("/"), **options)
    return place


def problem(name: str) -> str | None:
    """Why a folder cannot have this name, for a person; None when it can."""
    scheme, is_uri, rest = name.partition("://")
    if not is_uri:
        return None
    import fsspec

    if "@" in rest.partition("/")[0]:
        return f"holds credentials; leave them out, and give them to the tools of {scheme} through the environment"
    if not rest.strip("/"):
        return f"names no place in the store, such as {scheme}://bucket/runs"
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        return f"fsspec knows no {scheme}://; expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH"
    except ImportError:
        extra = _EXTRAS.get(scheme)
        return f"{scheme}:// needs a package: " + (
            f"pip install 'hpsearch[{extra}]'" if extra else f"see fsspec's documentation of {scheme}"
        )
    return None


def is_remote(folder: Folder) -> bool:
    """Whether it is in an object store: nothing can be appended, mapped or locked there."""
    return not isinstance(folder, Path)


def make(folder: Folder) -> None:
    """Make a folder that may be there; an object store has none."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def remove(folder: Folder) -> None:
    """Remove a folder and all that is in it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with suppress(*_DEFINITE, RunFolderError):
            _patiently(folder, lambda: folder.fs.rm(folder.path, recursive=True))


def unlink(file: Folder) -> None:
    """Remove a file, if it is there."""
    with suppress(FileNotFoundError):
        _patiently(file, file.unlink)


def names(folder: Folder) -> list[str]:
    """Names of what is in a folder; none when it is not there."""
    try:
        return _patiently(folder, lambda: sorted(place.name for place in folder.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return []


def size(folder: Folder) -> int:
    """Bytes of the files in a folder and below."""
    if isinstance(folder, Path):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return _patiently(folder, lambda: int(folder.fs.du(folder.path)))


def read(file: Folder) -> bytes | None:
    """The content of a file; None when it cannot be read."""
    try:
        return _patiently(file, file.read_bytes)
    except OSError:
        return None


def write(file: Folder, content: bytes) -> None:
    """Write a file: a reader finds the old content or the new.

    Raises DiskFullError when there is no room or an object store stays away, else RunFolderError.
    """
    try:
        if isinstance(file, Path):
            aside = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
            try:
                aside.write_bytes(content)
                aside.replace(file)
            finally:
                aside.unlink(missing_ok=True)
        else:
            _patiently(file, lambda: file.write_bytes(content))
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(file.parent, len(content)) from error
        raise RunFolderError(f"cannot write {file}: {error.strerror or error}") from error


def has_room(folder: Folder, needed: int) -> bool:
    """Whether this many bytes can be expected to fit."""
    if isinstance(folder, Path):
        make(folder)
        return shutil.disk_usage(folder).free > needed
    probe = folder / ".probe"
    try:
        probe.write_bytes(b"?" * _PROBE)
        probe.unlink()
    except Exception:  # as many kinds as there are object stores
        return False
    return True


@contextmanager
def filled(target: Folder, *, last: str | None = None) -> Iterator[Path]:
    """A folder of this machine to fill; what is in it is in `target` then. With `last`, that file comes last.

    In a folder of this machine that is the target itself. Raises RunFolderError, DiskFullError.
    """
    if isinstance(target, Path):
        yield target
        return
    with private_folder("out-") as scratch:
        yield scratch
        sent(scratch, target, last=last)


def sent(source: Path, target: UPath, *, last: str | None = None) -> None:
    """Copy a folder of this machine to an object store; with `last`, that file comes last.

    Raises RunFolderError, DiskFullError.
    """
    files = sorted((file for file in source.rglob("*") if file.is_file()), key=lambda f: (f.name == last, f))
    for file in files:
        there = target / file.relative_to(source).as_posix()
        try:
            _patiently(there, partial(there.fs.put_file, str(file), there.path))
        except _DEFINITE as error:
            raise RunFolderError(f"cannot write {there}: {error}") from error


def copied(source: Folder, target: Path, *, without: Collection[str] = ()) -> None:
    """Copy a folder but some names in it to this machine, where `target` is not there yet. Whole, or not there.

    Raises RunFolderError.
    """
    scratch = target.with_name(f".copying-{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        if isinstance(source, Path):
            shutil.copytree(source, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*without))
        else:
            for there in _patiently(source, lambda: source.fs.find(source.path)):
                file = scratch / there.removeprefix(source.path).lstrip("/")
                if file.name in without:
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                _patiently(source, partial(source.fs.get_file, there, str(file)))
        scratch.rename(target)
    except OSError as error:
        raise RunFolderError(f"cannot copy {source} to {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def cached(folder: Folder) -> Path:
    """A folder that never changes, on this machine: itself, or the node's copy, made once for all processes."""
    if isinstance(folder, Path):
        return folder
    from filelock import FileLock

    # The name is the fingerprint of the content, wherever it came from.
    copy = cache_folder() / folder.name
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy}.lock"):
            if not copy.is_dir():
                copied(folder, copy)
    except OSError as error:
        raise RunFolderError(f"cannot write the node's cache {copy.parent}: {error.strerror or error}") from error
    return copy


def cache_folder() -> Path:
    """Where this machine keeps copies; it can be removed while nothing runs."""
    base = os.environ.get("HPSEARCH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hpsearch"
    return Path(base).expanduser() / "data"


def _patiently(place: Folder, action: Callable[[], _T]) -> _T:
    """What an object store answers, in the end. Raises what it says, and DiskFullError when it stays away."""
    if not is_remote(place):
        return action()
    until = time.monotonic() + PATIENCE_S
    wait = 0.5
    while True:
        try:
            return action()
        except _DEFINITE:
            raise
        except Exception as error:  # as many kinds as there are object stores
            if time.monotonic() + wait > until:
                why = f"{place} has been out of reach for {PATIENCE_S:.0f} s: {error}"
                raise DiskFullError(place, _PROBE, why) from error
        time.sleep(wait)
        wait = min(2 * wait, 10.0)
