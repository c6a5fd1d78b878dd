"""What a name under `data.files` stands for, and what format a file has."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Literal

Format = Literal["text", "json", "csv", "parquet"]
_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def format_of(name: str | Path) -> Format | None:
    """By the last suffix but one of compression; None when it says nothing. Parquet files compress themselves."""
    file = Path(name)
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        found = _FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if found == "parquet" else found
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` has written this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def expanded(name: str) -> list[str]:
    """The files that a name stands for, in order: itself, what a pattern fits, or what is below a folder.

    A folder that `save_to_disk` has written counts as a file.
    """
    place = Path(name)
    if place.is_dir() and not is_saved_dataset(place):
        found = (file for file in place.rglob("*") if format_of(file) and file.is_file())
        return sorted(str(file) for file in found if not any(part[0] == "." for part in file.relative_to(place).parts))
    if place.exists() or not glob.has_magic(name):
        return [name]
    return sorted(found for found in glob.glob(name, recursive=True) if Path(found).is_file())


_SPLIT_NAMES = {"train": "train|training", "validation": "validation|valid|val|dev|eval", "test": "test|testing"}


def split_called(name: str) -> str | None:
    """The split that a file's or folder's name begins with (train-00000-of-00002.parquet, test_data.csv, dev)."""
    return next((s for s, names in _SPLIT_NAMES.items() if re.match(rf"({names})(?![a-z])", name.lower())), None)


def split_by_name(files: list[str], below: Path | None = None) -> dict[str, list[str]]:
    """Files by the split that their names begin with, or those of the folders that they are in, below this one.

    All are of the training split where none is called by a held-out one. Raises ValueError where some are, and it
    cannot be told what the others are.
    """
    found: dict[str | None, list[str]] = {}
    for file in files:
        place = Path(file)
        folders = place.relative_to(below).parent.parts if below and place != below else ()
        named = map(split_called, (place.name, *reversed(folders)))
        found.setdefault(next(filter(None, named), None), []).append(file)
    if len(files) == 1 or not found.keys() & {"validation", "test"}:
        return {"train": files}
    if "train" not in found or None in found:
        of = Path((found.get(None) or files)[0]).name
        raise ValueError(f"some files are called by their splits, and {of} is not: name the files of each split")
    return {str(split): own for split, own in found.items()}
