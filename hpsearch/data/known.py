"""Prepared data known by its source: files that have not changed are neither read nor tokenized again.

Beside the prepared data, a record for each kind of preparation says which files it was made from, with their sizes,
times and hashes, and what came of it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpsearch.data import pretrained
from hpsearch.data.shards import CARD, FORMAT, DataCard
from hpsearch.data.sources import files_of, names_of
from hpsearch.errors import DataError
from hpsearch.files import storage
from hpsearch.files.storage import Folder
from hpsearch.registry import TASKS
from hpsearch.spec.study import StudySpec

_SETTLED_S = 2.0
"""A file that was written so shortly before it was hashed may have been written again at the same time."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that data is made from."""

    name: str
    size: int
    modified_ns: int
    hash: str
    is_settled: bool
    """Whether any later change shows in its time."""


def source_files(spec: StudySpec) -> list[Path]:
    """The files that a study's data is made from, a pretrained model's tokenizer included."""
    found: list[Path] = []
    names = [n for source in spec.data.sources for files in files_of(source).values() for n in names_of(files)]
    for place in map(Path, names):
        found += sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    model = pretrained.of(spec.model)
    if model is not None:
        found += sorted(file for file in model.iterdir() if file.is_file() and file.suffix not in _WEIGHTS)
    return found


def key_of(spec: StudySpec) -> str | None:
    """Of everything but the files' content that decides prepared data; None where that cannot be told beforehand."""
    data, task = spec.data, spec.definition
    facts: list[Any] = [FORMAT, spec.task, data.model_dump(), spec.tokenizer.model_dump()]
    facts += [task.data_options(spec.options), spec.model.pretrained]
    facts += [importlib.metadata.version("tokenizers")]
    for source in data.sources:
        if source.corpus is not None:
            facts += [sys.version, sys.prefix, _installed()]
        if source.hub is not None:
            commit = pretrained.dataset_commit(source.hub, source.revision)
            if commit is None:
                return None
            facts.append(commit)
    if spec.task not in TASKS.built_in:
        try:
            facts.append(inspect.getsource(sys.modules[type(task).__module__]))
        except OSError:  # there is no file of it
            return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def find(spec: StudySpec, key: str) -> tuple[Folder, DataCard] | None:
    """What was prepared from the same files, if it is there."""
    data = storage.locate(spec.folder) / "data"
    content = storage.read(_record(data, key))
    if content is None:
        return None
    try:
        record = json.loads(content)
        files = [SourceFile(**file) for file in record["files"]]
        card = DataCard(**record["card"])
    except (ValueError, TypeError, KeyError):  # of another version
        return None
    if storage.read(data / card.fingerprint / CARD) is None:
        return None
    now = source_files(spec)
    if [str(file) for file in now] != [file.name for file in files]:
        return None
    if not all(map(_is_unchanged, files)):
        return None
    return data / card.fingerprint, card


def remember(spec: StudySpec, key: str, files: list[SourceFile], card: DataCard) -> None:
    """Record what has been prepared from these files. Raises RunFolderError, DiskFullError."""
    data = storage.locate(spec.folder) / "data"
    storage.make(data / "sources")
    content = {"files": [asdict(file) for file in files], "card": asdict(card)}
    storage.write(_record(data, key), json.dumps(content, indent=1).encode())


def described(file: Path) -> SourceFile:
    """What a file is now, its content hashed."""
    status = status_of(file)
    try:
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise DataError(f"data: {file} cannot be read: {error.strerror}") from error
    is_settled = time.time() - status.st_mtime > _SETTLED_S
    return SourceFile(
        name=str(file), size=status.st_size, modified_ns=status.st_mtime_ns, hash=found, is_settled=is_settled
    )


def status_of(file: Path) -> os.stat_result:
    """Raises DataError."""
    try:
        return file.stat()
    except OSError as error:
        raise DataError(f"data: {file} cannot be read: {error.strerror}") from error


def _is_unchanged(was: SourceFile) -> bool:
    status = status_of(Path(was.name))
    if status.st_size != was.size:
        return False
    return (was.is_settled and status.st_mtime_ns == was.modified_ns) or described(Path(was.name)).hash == was.hash


def _record(data: Folder, key: str) -> Folder:
    return data / "sources" / f"{key}.json"


def _installed() -> list[str]:
    """Versions of the packages that built-in corpora are read from."""
    from hpsearch.data.corpora import CATALOG_PACKAGES

    found = []
    for package in CATALOG_PACKAGES:
        try:
            found.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            found.append("")
    return found
