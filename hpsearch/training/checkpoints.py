"""Checkpoint files that are whole or not there: written aside, flushed, renamed, named by step and content hash.

Knows files and tensors by name, nothing of models. Tensors go through safetensors, everything else as JSON in its
header: nothing here is pickled, so a checkpoint cannot run code. A file that was cut short or changed fails its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hpsearch.errors import DiskFullError, LeaseLostError, RunFolderError
from hpsearch.files import storage
from hpsearch.files.storage import Folder
from hpsearch.files.trial_log import LOGGER

KEPT = 2
"""Resumable states kept of a run: the last, and the one before it in case the last is damaged."""
_FILE = re.compile(r"(resume|best)-(\d{9})-([0-9a-f]{32})\.safetensors")

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and JSON."""


def write(folder: Folder, kind: str, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Write one checkpoint file and return its name. Raises DiskFullError, RunFolderError.

    It is on the disk, not in a cache, when this returns.
    """
    content = save(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
        metadata={"facts": json.dumps(facts)},
    )
    name = f"{kind}-{step:09d}-{_digest(content)}.safetensors"
    write_whole(folder / name, content)
    return name


def write_whole(file: Folder, content: bytes) -> None:
    """Write a file so that it has its old content or all of the new, whenever the power fails.

    Its folder must be there: one that is gone belonged to an attempt that another has overtaken, and nobody would
    remove what is written there now. Raises DiskFullError, LeaseLostError, RunFolderError.
    """
    if not isinstance(file, Path):
        if not storage.names(file.parent):
            raise LeaseLostError(f"{file.parent} was removed: another launch has taken its trial over")
        storage.write(file, content)
        return
    scratch = file.with_name(f".{file.name}")
    try:
        with scratch.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, file)
        _flush_folder(file.parent)
    except FileNotFoundError:
        raise LeaseLostError(f"{file.parent} was removed: another launch has taken its trial over") from None
    except OSError as error:
        scratch.unlink(missing_ok=True)
        if error.errno in storage.FULL:
            raise DiskFullError(file.parent, len(content)) from error
        raise RunFolderError(f"cannot write {file}: {error.strerror}") from error


def newest(folders: Sequence[Folder]) -> Iterator[tuple[Folder, State]]:
    """The resumable states in these folders, newest first, that pass their hash, each with the file it lies in."""
    found = [
        (int(match[2]), -place, folder, file)
        for place, folder in enumerate(folders)
        for file in storage.names(folder)
        if (match := _FILE.fullmatch(file)) and match[1] == "resume"
    ]
    for _, _, folder, file in sorted(found, reverse=True):
        state = read(folder / file)
        if state is None:
            LOGGER.warning("checkpoint %s is damaged; an earlier one is looked for", folder / file)
        else:
            yield folder / file, state


def read(file: Folder) -> State | None:
    """The content of a checkpoint file; None when it is missing, cut short, changed or none of ours."""
    match = _FILE.fullmatch(file.name)
    content = storage.read(file)
    if match is None or content is None or _digest(content) != match[3]:
        return None
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, json.loads(header["__metadata__"]["facts"])
    except (SafetensorError, KeyError, ValueError):
        return None


def is_whole(file: Folder) -> bool:
    """Whether a checkpoint file passes its hash."""
    match = _FILE.fullmatch(file.name)
    content = storage.read(file)
    return match is not None and content is not None and _digest(content) == match[3]


def names(folder: Folder, kind: str) -> list[str]:
    """Names of the checkpoint files of one kind, oldest first."""
    return [name for name in storage.names(folder) if (match := _FILE.fullmatch(name)) and match[1] == kind]


def forget(folder: Folder, *, keep: Sequence[str] = ()) -> None:
    """Remove the checkpoint files of a folder but those to keep."""
    for name in storage.names(folder):
        if _FILE.fullmatch(name) and name not in keep:
            storage.unlink(folder / name)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, named by what follows."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
